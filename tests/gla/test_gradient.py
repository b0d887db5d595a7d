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
from gla import api
from reference import gla as reference
from tests.gla import oracle
from tests.gla.test_channel import extremes
from tpukit import interpret

PLAN = gla.Plan(heads=2, interleave=2, window=32, inputs=2, states=2, lookahead=1)
NAMES = ("q", "k", "v", "pool", "g", "beta")  # the last one with the delta rule
F32 = 1e-5  # relative, of sums of up to 300 products of f32 products
RAGGED = dict(lengths=[1, 0, 40, 3, 17, 5, 30], slots=[1, 0, 3, -1, 2, 3, 4], gap=5, tokens=112)


def flat(batch):
    """What is differentiated, and the rest."""
    q, k, v, pool, *rows = batch.args()
    beta = () if batch.beta is None else (batch.strength,)
    return (q, k, v, pool, jnp.asarray(batch.g), *beta), rows


DECAYS = {1: gla.HeadDecay, 2: gla.TokenDecay, 3: gla.ChannelDecay}


@functools.cache
def pullback(function, rank, with_decay=True, **options):
    """A jitted function of arrays, rows and cotangents to gradients; `rank` of the decays."""

    @jax.jit
    def gradients(arrays, rows, cotangents):
        kind = DECAYS[rank]

        def call(q, k, v, pool, g, *beta):
            gates = {"decay": kind(g), "beta": beta[0] if beta else None}
            return function(q, k, v, pool, *rows, **gates, **options)

        if with_decay:
            return jax.vjp(call, *arrays)[1](cotangents)
        return jax.vjp(lambda *arrays_: call(*arrays_, arrays[4]), *arrays[:4])[1](cotangents)

    return gradients


exact_pullback = functools.cache(pullback.__wrapped__)  # kept when `pullback` is cleared


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
        function = exact_pullback(reference.recurrent, batch.g.ndim, dtype=jnp.float64, **options)
        return dict(zip(NAMES, map(np.asarray, function(arrays, rows, cotangents)), strict=False))


def check_f32(batch, plan=PLAN, limit=F32, seed=1, **options):
    cotangents = cotangents_of(batch, seed)
    found = gradients(batch, cotangents, plan, **options)
    wanted = exact(batch, cotangents, **options)
    assert set(found) == set(wanted) == set(NAMES[: len(wanted)])
    for name in wanted:
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
    for name, other in zip(NAMES, plain, strict=False):
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
    for name in found:  # the final state's rounding has no gradient of its own
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


# The delta rule: the kernel forward, the reference backward.

KINDS = {"head": {}, "token": {"per_token": True}, "channel": {"per_channel": True}}
ONE = dataclasses.replace(PLAN, heads=1, interleave=1)


def delta_batch(seed, lengths, kind, **options):
    options = {"dtype": np.float32, "dims": (64, 64), "heads": 1, "qk_heads": 1} | options
    return oracle.random_batch(seed, lengths, delta=True, **KINDS[kind], **options)


@pytest.fixture
def no_forward(monkeypatch):
    """Leaves out the kernel, on which these gradients do not depend and which compiles slowly."""
    nothing = lambda call, *_: (jnp.zeros_like(call.arrays[2]), call.arrays[3])  # noqa: E731
    pullback.cache_clear()
    monkeypatch.setattr(api, "launch", nothing)
    yield
    pullback.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_delta_rule(kind):
    options = {"slots": RAGGED["slots"], "gap": 5, "tokens": 112, "heads": 2, "qk_heads": 1}
    batch = delta_batch(52, RAGGED["lengths"], kind, **options)
    found = check_f32(batch)
    dead = np.r_[0:5, 46:49, 101:112]
    assert not any(found[name][dead].any() for name in ("q", "k", "v", "beta"))
    assert kind == "head" or not found["g"][dead].any()


def test_delta_rule_runs_the_kernel_forward():
    batch = delta_batch(59, [20, 1], "token")
    (q, k, v, pool, g, beta), rows = flat(batch)

    def forward(v):
        gates = {"decay": gla.TokenDecay(g), "beta": beta, "plan": ONE}
        return gla.gla(q, k, v, pool, *rows, **gates, implementation="interpret")

    assert "pallas_call" in str(jax.make_jaxpr(lambda v: jax.vjp(forward, v)[0])(v))


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("kind", KINDS)
def test_delta_rule_with_the_strongest_decays(kind):
    batch = extremes(delta_batch(53, [150, 1, 9], kind, known=[True] * 3))
    if kind == "head":
        batch = dataclasses.replace(batch, g=np.float32([-29.9]))
    found = check_f32(batch, ONE)["g"]
    clipped = (batch.g >= 0) | (batch.g <= -30)
    assert not found[clipped].any() and found[~clipped].any()


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("keys", ["same", "opposite"])
def test_delta_rule_with_keys_that_repeat(keys):
    """Hardly any decay, full strength: what is written is taken back by the next token."""
    batch = delta_batch(54, [64, 1], "token")
    batch.beta[:], batch.g[:] = 1, -1e-2
    batch.k[:] = batch.k[0]
    if keys == "opposite":
        batch.k[1::2] *= -1
    check_f32(batch, ONE)


@pytest.mark.usefixtures("no_forward")
def test_delta_rule_in_bf16():
    """Gradients in the types of what they are of, and no worse than their rounding."""
    batch = delta_batch(55, [40, 1, 17], "token", dtype=ml_dtypes.bfloat16, known=[True] * 3)
    cotangents = cotangents_of(batch, 7)
    found, wanted = gradients(batch, cotangents, ONE), exact(batch, cotangents)
    for name in ("q", "k", "v", "pool", "g", "beta"):
        rounded = found[name].dtype == ml_dtypes.bfloat16
        assert rounded == (name in "qkv"), name
        assert oracle.error(found[name], wanted[name]) < (2.0**-9 if rounded else F32), name


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("kind,part", [("token", "o"), ("channel", "state"), ("token", "both")])
def test_delta_rule_in_the_batch_form(kind, part):
    rng = np.random.default_rng(56)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    g = -jnp.abs(draw(2, 20, 1, *(64,) * (kind == "channel")))
    q, k, v, state = (*(draw(2, 20, 1, 64) / 8 for _ in range(3)), draw(2, 1, 64, 64))
    arrays = (q, k, v, state, g, jax.nn.sigmoid(draw(2, 20, 1)))
    cotangents = (draw(*v.shape) * (part != "state"), draw(*state.shape) * (part != "o"))
    decay_of = {"token": gla.TokenDecay, "channel": gla.ChannelDecay}[kind]

    def call(q, k, v, state, g, beta):
        options = {"beta": beta, "initial_state": state, "plan": ONE}
        return gla.gla_batch(q, k, v, decay=decay_of(g), implementation="interpret", **options)

    def loss(*arrays):  # a result that is not in it has no cotangent at all
        o, final = call(*arrays)
        terms = {"o": jnp.vdot(o, cotangents[0]), "state": jnp.vdot(final, cotangents[1])}
        return terms[part] if part in terms else terms["o"] + terms["state"]

    found = jax.jit(jax.grad(loss, argnums=tuple(range(6))))(*arrays)
    with jax.enable_x64(True):
        row = lambda x: jnp.asarray(oracle.wide(x)).reshape(40, *x.shape[2:])  # noqa: E731
        flat_arrays = (
            *map(row, arrays[:3]),
            jnp.asarray(oracle.wide(state)),
            *map(row, arrays[4:]),
        )
        rows = (jnp.arange(2), jnp.arange(3) * 20, jnp.ones(2, bool))
        function = pullback(reference.recurrent, g.ndim - 1, dtype=jnp.float64)
        wanted = function(flat_arrays, rows, (row(cotangents[0]), cotangents[1].astype(float)))
    for name, x, y in zip(NAMES, found, wanted, strict=True):
        assert np.isfinite(x).all() and oracle.error(x.reshape(y.shape), y) < F32, name


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("where", ["k", "beta"])
def test_delta_rule_nan_stays_in_its_request(where):
    clean = delta_batch(57, [5, 40, 20], "token", known=[True] * 3)
    cotangents = cotangents_of(clean, 8)
    bad = dataclasses.replace(clean, **{where: getattr(clean, where).copy()})
    getattr(bad, where)[8] = np.nan
    found, wanted = gradients(bad, cotangents, ONE), gradients(clean, cotangents, ONE)
    others = np.r_[0:5, 45:65]
    assert np.isnan(found["v"][5:45]).any()
    for name in ("q", "k", "v", "g", "beta"):
        assert oracle.same_bits(found[name][others], wanted[name][others]), name
    keep = np.setdiff1d(np.arange(len(clean.pool)), [clean.slots[1]])
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
    for name, x in zip(NAMES[:5], found, strict=True):
        one, two = (part[name] for part in parts)
        wanted = one + two if name in ("pool", "g") else np.concatenate([one, two])
        assert oracle.error(x, wanted) < F32, name
