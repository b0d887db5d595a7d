"""Gradients of the kernel against float64 differentiation of the definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gla
from reference import gla as reference
from tests.gla import oracle
from tpukit import interpret

PLAN = gla.Plan(heads=2, interleave=2, window=32, inputs=2, states=2, lookahead=1)
NAMES = ("q", "k", "v", "pool", "g")
F32 = 1e-5  # relative, of sums of up to 300 products of f32 products
RAGGED = dict(lengths=[1, 0, 40, 3, 17, 5, 30], slots=[1, 0, 3, -1, 2, 3, 4], gap=5, tokens=112)


def flat(batch):
    """What is differentiated, and the rest."""
    q, k, v, pool, *rows = batch.args()
    return (q, k, v, pool, jnp.asarray(batch.g)), rows


DECAYS = {1: gla.HeadDecay, 2: gla.TokenDecay, 3: gla.ChannelDecay}


@functools.cache
def pullback(function, rank, with_decay=True, **options):
    """A jitted function of arrays, rows and cotangents to gradients; `rank` of the decays."""

    @jax.jit
    def gradients(arrays, rows, cotangents):
        kind = DECAYS[rank]

        def call(q, k, v, pool, g):
            return function(q, k, v, pool, *rows, decay=kind(g), **options)

        if with_decay:
            return jax.vjp(call, *arrays)[1](cotangents)
        return jax.vjp(lambda *arrays_: call(*arrays_, arrays[4]), *arrays[:4])[1](cotangents)

    return gradients


def kernel(rank, plan=PLAN, **options):
    return pullback(gla.gla, rank, implementation="interpret", plan=plan, **options)


def cotangents_of(batch, seed):
    draw = np.random.default_rng(seed).standard_normal
    d_o = draw(batch.v.shape).astype(batch.v.dtype)
    return jnp.asarray(d_o), jnp.asarray(draw(batch.pool.shape).astype(batch.pool.dtype))


def gradients(batch, cotangents, plan=PLAN, **options):
    """Of the kernel, under the strict harness."""
    with interpret.strict():
        found = kernel(batch.g.ndim, plan, **options)(*flat(batch), cotangents)
        return dict(zip(NAMES, map(np.asarray, found), strict=False))


def exact(batch, cotangents, **options):
    """Float64 derivatives of the recurrence."""
    with jax.enable_x64(True):
        arrays, rows = flat(batch)
        arrays, cotangents = jax.tree.map(
            lambda x: jnp.asarray(oracle.wide(x), jnp.float64), (arrays, cotangents)
        )
        function = pullback(reference.recurrent, batch.g.ndim, dtype=jnp.float64, **options)
        return dict(zip(NAMES, map(np.asarray, function(arrays, rows, cotangents)), strict=True))


def check_f32(batch, plan=PLAN, limit=F32, seed=1, **options):
    cotangents = cotangents_of(batch, seed)
    found = gradients(batch, cotangents, plan, **options)
    wanted = exact(batch, cotangents, **options)
    for name in NAMES:
        assert found[name].dtype == np.float32
        assert np.isfinite(found[name]).all(), name
        assert oracle.error(found[name], wanted[name]) < limit, name
    return found


@pytest.mark.parametrize("per_token,reverse", [(False, False), (True, False), (True, True)])
def test_f32(per_token, reverse):
    batch = oracle.random_batch(40, **RAGGED, dtype=np.float32, per_token=per_token)
    found = check_f32(batch, reverse=reverse)
    dead = np.r_[0:5, 46:49, 101:112]  # of no request, and of a null one
    for name in ("q", "k", "v") + ("g",) * per_token:
        assert not found[name][dead].any()


@pytest.mark.parametrize("per_token,reverse", [(False, True), (True, False)])
def test_bf16(per_token, reverse):
    """No worse than the reference's own gradients with operands that are rounded to bf16."""
    batch = oracle.random_batch(41, **RAGGED, per_token=per_token, qk_heads=1)
    cotangents = cotangents_of(batch, 2)
    found = gradients(batch, cotangents, reverse=reverse)
    wanted = exact(batch, cotangents, reverse=reverse)
    rounding = {"chunk": 32, "operands": jnp.bfloat16, "reverse": reverse}
    plain = pullback(reference.chunked, batch.g.ndim, **rounding)(*flat(batch), cotangents)
    for name, other in zip(NAMES, plain, strict=True):
        assert found[name].dtype == other.dtype
        limit = min(1.1 * oracle.error(other, wanted[name]) + 1e-6, 8e-3)
        if name == "g" and per_token:  # a sum of errors over time
            limit = 1.5e-2
        assert oracle.error(found[name], wanted[name]) <= limit, name


@pytest.mark.parametrize("per_token,window", [(False, 32), (True, 64), (False, 128), (True, 256)])
def test_strong_decays_at_every_window(per_token, window):
    g = np.float32([-0.93, -29.9])
    batch = oracle.random_batch(42, [300], dtype=np.float32, known=[True])
    batch = dataclasses.replace(batch, g=np.tile(g, (300, 1)) if per_token else g)
    check_f32(batch, dataclasses.replace(PLAN, window=window))


def test_decays_that_are_clipped_have_no_gradient():
    batch = oracle.random_batch(43, **RAGGED, dtype=np.float32, per_token=True)
    batch.g[8:16] = np.float32([0.5, -30.5, 0.0, -30.0])[:, None].repeat(2, 0)
    found = check_f32(batch)["g"]
    assert not found[8:16].any() and found[16:46].all()


def test_dims_and_grouped_heads():
    batch = oracle.random_batch(44, [3, 40], heads=4, dims=(256, 64), dtype=np.float32)
    check_f32(batch)


def test_a_decay_per_channel():
    batch = oracle.random_batch(51, [3, 20], dims=(64, 64), dtype=np.float32, per_token=True)
    g = np.repeat(batch.g[..., None], 64, axis=2) * np.linspace(0.1, 1, 64, dtype=np.float32)
    check_f32(dataclasses.replace(batch, g=g))


def test_bf16_state():
    state = {"state": ml_dtypes.bfloat16, "known": [True, True]}
    batch = oracle.random_batch(45, [33, 20], dtype=np.float32, **state)
    cotangents = cotangents_of(batch, 3)
    found, wanted = gradients(batch, cotangents), exact(batch, cotangents)
    assert found["pool"].dtype == ml_dtypes.bfloat16
    for name in NAMES:  # the final state's rounding has no gradient of its own
        assert oracle.error(found[name], wanted[name]) < (4e-3 if name == "pool" else F32), name


def test_decays_that_are_constant_change_nothing_else():
    batch = oracle.random_batch(46, **RAGGED, qk_heads=1)
    cotangents = cotangents_of(batch, 4)
    learned = gradients(batch, cotangents, reverse=True)
    fixed = gradients(batch, cotangents, reverse=True, with_decay=False)
    assert "g" not in fixed
    for name in NAMES[:4]:
        assert oracle.same_bits(learned[name], fixed[name])


@pytest.mark.parametrize("part", ["o", "state"])
def test_a_loss_of_one_result_only(part):
    """The other one's cotangent is not even zero, but missing."""
    rng = np.random.default_rng(47)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    arrays = (*(draw(2, 40, 2, 128) for _ in range(3)), draw(2, 2, 128, 128))
    decay = gla.HeadDecay(jnp.asarray([-0.1, -1.0]))

    @functools.partial(jax.jit, static_argnames="implementation")
    def gradient(arrays, implementation):
        def loss(q, k, v, state):
            options = {"plan": PLAN, "implementation": implementation, "initial_state": state}
            o, final = gla.gla_batch(q, k, v, decay=decay, **options)
            return jnp.sum(jnp.sin(o)) if part == "o" else jnp.sum(jnp.sin(final))

        return jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)

    with interpret.strict():
        found = jax.block_until_ready(gradient(arrays, "interpret"))
    for x, y in zip(found, gradient(arrays, "reference"), strict=True):
        assert oracle.error(x, y) < F32


@pytest.mark.parametrize("where", ["q", "k", "v", "pool", "g"])
def test_nan_stays_in_its_request(where):
    options = {"dtype": np.float32, "known": [True] * 7, "per_token": True}
    options = {**RAGGED, **options, "slots": range(7)}
    clean = oracle.random_batch(48, **options)
    cotangents = cotangents_of(clean, 5)
    wanted = gradients(clean, cotangents)
    bad = dataclasses.replace(clean, **{where: getattr(clean, where).copy()})
    slot, mine = clean.slots[2], np.arange(6, 46)
    getattr(bad, where)[slot if where == "pool" else mine[3]] = np.nan
    found = gradients(bad, cotangents)
    assert np.isnan([found[name][mine].sum() for name in NAMES[:3]]).any()
    others = np.setdiff1d(np.arange(112), mine)
    for name in ("q", "k", "v", "g"):
        assert oracle.same_bits(found[name][others], wanted[name][others])
    keep = np.setdiff1d(np.arange(len(clean.pool)), [slot])
    assert oracle.same_bits(found["pool"][keep], wanted["pool"][keep])


@settings(max_examples=6)
@example(lengths=[0] * 7, slots=[0] * 7, known=[True] * 7, reverse=False, seed=0)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 1, 2, 5, 15, 16]), min_size=7, max_size=7),
    slots=st.lists(st.integers(-2, 10), min_size=7, max_size=7),
    known=st.lists(st.booleans(), min_size=7, max_size=7),
    reverse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_drawn_batches(lengths, slots, known, reverse, seed):
    options = {"tokens": 112, "slots": slots, "known": known, "dtype": np.float32}
    batch = oracle.random_batch(seed, lengths, per_token=True, **options)
    check_f32(batch, reverse=reverse)


def test_inside_shard_map_a_replicated_decay_gets_the_sum():
    batch = oracle.random_batch(49, [40, 9], dtype=np.float32, per_token=False)
    (q, k, v, pool, g), rows = flat(batch)
    cotangents = cotangents_of(batch, 6)
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spread, whole = jax.P("data"), jax.P()
    twice = lambda x: jnp.concatenate([x, 2 * x])  # noqa: E731

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spread, spread, spread, whole, whole, spread),
        out_specs=(spread, spread, spread, whole, whole),
    )
    def sharded(q, k, v, pool, g, d_o):
        def call(*args):
            *arrays, g = args
            options = {"implementation": "interpret", "plan": PLAN}
            return gla.gla(*arrays, *rows, decay=gla.HeadDecay(g), **options)[0]

        return jax.vjp(call, q, k, v, pool, g)[1](d_o)

    d_o, d_pool = cotangents
    with interpret.strict():
        found = sharded(twice(q), twice(k), twice(v), pool, g, twice(d_o))
        found = jax.block_until_ready(found)
    parts = []
    for n in (1, 2):
        part = dataclasses.replace(batch, q=n * batch.q, k=n * batch.k, v=n * batch.v)
        parts.append(exact(part, (n * d_o, 0 * d_pool)))
    for name, x in zip(NAMES, found, strict=True):
        one, two = (part[name] for part in parts)
        wanted = one + two if name in ("pool", "g") else np.concatenate([one, two])
        assert oracle.error(x, wanted) < F32, name
