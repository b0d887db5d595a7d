"""The kernel, interpreted: accuracy gates, bit-exact gates, and drawn batches."""

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
from gla import channel, chunk
from reference import gla as reference
from tests.gla import oracle
from tpukit import interpret

LATE, EAGER = interpret.MODES
PLAN = gla.Plan(heads=2, interleave=2)


@functools.cache
def compiled(mode, plan, batch_invariant, scale, reverse):
    """A jitted kernel per static choice; the mode only keeps traces apart."""

    @jax.jit
    def kernel(*args, **more):
        *rest, g, beta = args
        decay = oracle.decay_of(g)
        options = {"plan": plan, "batch_invariant": batch_invariant, "scale": scale} | more
        options["reverse"] = reverse
        return gla.gla(*rest, decay=decay, beta=beta, implementation="interpret", **options)

    return kernel


def run(batch, mode=LATE, plan=PLAN, batch_invariant=False, scale=None, reverse=False, **more):
    """Output and pool of the kernel under the strict harness, as numpy arrays."""
    kernel = compiled(mode, plan, batch_invariant, scale, reverse)
    with interpret.strict(mode):
        o, pool = kernel(*batch.args(), jnp.asarray(batch.g), batch.strength, **more)
        return np.asarray(o), np.asarray(pool)


# Gate A allows the one rounding of the output 1.25 times, row by row twice. Requests of several
# tokens may in addition round an operand to the neighbouring bf16 where f32 and float64 differ in
# the last bit: measured at most 2e-4 of the row's norm.
FLIPS = 4e-4
STATE_A = 2e-4  # states are f32: what is left is flips, an eighth of one rounding of all operands


def check_gates(batch, o, pool, **cut):
    """Gates A and B for bf16 operands."""
    wanted, states = oracle.rounded(batch, **cut)
    rounding = oracle.error(oracle.bf16(wanted), wanted)
    assert oracle.error(o, wanted) <= 1.25 * rounding + FLIPS
    rows = np.abs(wanted).max(axis=(1, 2)) > 0
    per_row = oracle.error(o[rows], wanted[rows], axis=(1, 2))
    assert per_row <= 2 * oracle.error(oracle.bf16(wanted[rows]), wanted[rows], axis=(1, 2)) + FLIPS
    assert not o[~rows].any()
    if batch.pool.dtype == np.float32:
        assert oracle.error(pool, states) <= STATE_A
    reverse = cut.get("reverse", False)
    exact, exact_states = oracle.exact(batch, reverse=reverse)
    options = {"operands": jnp.bfloat16, "chunk": cut.get("window", 128), "reverse": reverse}
    plain, plain_states = oracle.chunked(batch, **options)
    assert oracle.error(o, exact) <= min(3.5e-3, 1.1 * oracle.error(plain, exact) + 1e-7)
    assert oracle.error(pool, exact_states) <= 1.1 * oracle.error(plain_states, exact_states) + 1e-7


LENGTHS = {
    "decode": [1] * 20,
    "lengths around a group": [15, 16, 17, 1, 2, 0, 31],
    "lengths around a window": [127, 1, 129, 128],
    "long": [300, 1, 45],
}


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_bf16(name, per_token):
    batch = oracle.random_batch(5, LENGTHS[name], per_token=per_token)
    check_gates(batch, *run(batch))


@pytest.mark.parametrize("per_token", [False, True])
def test_bf16_reversed(per_token):
    options = {"tokens": 330, "slots": [3, 1, -1, 0, 2, 3, 2], "per_token": per_token}
    batch = oracle.random_batch(5, [3, 150, 5, 0, 129, 1, 1], gap=5, **options)
    check_gates(batch, *run(batch, reverse=True), reverse=True)


@pytest.mark.parametrize("per_token,reverse", [(False, False), (True, False), (True, True)])
def test_f32(per_token, reverse):
    batch = oracle.random_batch(6, [150, 1, 1, 33], dtype=np.float32, per_token=per_token)
    o, pool = run(batch, reverse=reverse)
    wanted, states = oracle.exact(batch, reverse=reverse)
    assert oracle.error(o, wanted) < 3e-6
    assert oracle.error(o, wanted, axis=(1, 2)) < 1e-5
    assert oracle.error(pool, states) < 3e-6


@pytest.mark.parametrize("dims", [(64, 64), (256, 256), (64, 256), (256, 128)], ids=str)
def test_dims(dims):
    batch = oracle.random_batch(7, [1, 40, 1], dims=dims)
    check_gates(batch, *run(batch))


@pytest.mark.parametrize("heads,plan", [(4, 2), (4, 4), (8, 4)])
def test_grouped_heads_and_heads_over_grid_steps(heads, plan):
    batch = oracle.random_batch(8, [1, 50, 20, 1], qk_heads=2, heads=heads)
    check_gates(batch, *run(batch, plan=gla.Plan(heads=plan, interleave=2)))


@pytest.mark.parametrize("per_token", [False, True])
def test_bf16_state(per_token):
    batch = oracle.random_batch(9, [200, 1, 30], state=ml_dtypes.bfloat16, per_token=per_token)
    o, pool = run(batch)
    assert pool.dtype == ml_dtypes.bfloat16
    check_gates(batch, o, pool)


@pytest.mark.parametrize("window", [32, 64, 256])
def test_windows(window):
    batch = oracle.random_batch(10, [100, 1, 280])
    plan = gla.Plan(heads=2, interleave=1, window=window, inputs=2, states=2, lookahead=1)
    check_gates(batch, *run(batch, plan=plan), window=window)


def test_gaps_and_rows_that_fill_no_group():
    batch = oracle.random_batch(11, [3, 20, 1], gap=7, tokens=45)
    o, pool = run(batch)
    check_gates(batch, o, pool)
    assert not o[:7].any() and not o[31:].any()


def test_scale():
    batch = oracle.random_batch(12, [20, 1], dtype=np.float32)
    assert oracle.error(run(batch, scale=-0.5)[0], oracle.exact(batch, -0.5)[0]) < 3e-6


@pytest.mark.parametrize("per_token", [False, True])
def test_races_and_both_dma_modes(per_token):
    batch = oracle.random_batch(13, [1, 1, 20, 1, 37, 0, 1, 1], per_token=per_token)
    plan = gla.Plan(heads=2, interleave=2, window=32, inputs=2, states=2, lookahead=1)
    late = run(batch, LATE, plan)
    eager = run(batch, EAGER, plan)
    again = run(batch, LATE, plan)
    for a, b, c in zip(late, eager, again, strict=True):
        assert oracle.same_bits(a, b) and oracle.same_bits(a, c)


def test_many_requests_reuse_the_rings():
    batch = oracle.random_batch(14, [1, 2] * 20, known=[True, False] * 20)
    check_gates(batch, *run(batch))


def test_other_slots_are_untouched():
    batch = oracle.random_batch(15, [3, 1, 0, 5], slots=[1, -1, 2, 99])
    _, pool = run(batch)
    keep = np.setdiff1d(np.arange(len(pool)), [1])
    assert oracle.same_bits(pool[keep], batch.pool[keep])
    assert not oracle.same_bits(pool[1], batch.pool[1])


def test_the_last_of_repeated_slots_is_kept():
    batch = oracle.random_batch(16, [4, 1, 6, 1], slots=[2, 3, 2, 2], known=[True] * 4)
    check_gates(batch, *run(batch))


def embed(batch, before, after, seed, slot):
    """The first request of `batch` behind other requests, and in front of more."""
    kind = {"per_token": batch.g.ndim == 2, "per_channel": batch.g.ndim == 3}
    kind["delta"] = batch.beta is not None
    other = oracle.random_batch(seed, [*before, len(batch.q), *after], **kind)
    row = sum(before)
    part = slice(row, row + len(batch.q))
    for name in ("q", "k", "v"):
        getattr(other, name)[part] = getattr(batch, name)
    n = len(before)
    other.known[n] = batch.known[0]
    other.pool[other.slots[n]] = batch.pool[batch.slots[0]]
    if batch.beta is not None:
        other.beta[part] = batch.beta
    if batch.g.ndim > 1:
        other.g[part] = batch.g
    else:
        other = dataclasses.replace(other, g=batch.g)
    return other, part, n


@pytest.fixture
def ordered_sums(monkeypatch):
    """Matrix products that add in the order of the contraction, wherever an element lies.

    The CPU's own products do not: an element's last bit can depend on its place in the matrix.
    """

    def matmul(a, b, contract):
        a = a.astype(jnp.float32) if contract[0] == (1,) else a.astype(jnp.float32).T
        b = b.astype(jnp.float32) if contract[1] == (0,) else b.astype(jnp.float32).T

        def add(j, total):
            left = jax.lax.dynamic_slice_in_dim(a, j, 1, 1)
            return total + left * jax.lax.dynamic_slice_in_dim(b, j, 1, 0)

        zero = jnp.zeros((a.shape[0], b.shape[1]), jnp.float32)
        return jax.lax.fori_loop(0, a.shape[1], add, zero)

    compiled.cache_clear()
    for module in (channel, chunk):
        monkeypatch.setattr(module, "matmul", matmul)
    yield
    compiled.cache_clear()


@pytest.mark.usefixtures("ordered_sums")
@pytest.mark.parametrize("length,per_token", [(1, False), (40, True), (200, False)])
def test_batch_invariance(length, per_token):
    alone = oracle.random_batch(17, [length], known=[True], per_token=per_token)
    wanted = run(alone, batch_invariant=True)
    for before, after in (([3, 1, 9], [2]), ([70], [])):
        batch, part, n = embed(alone, before, after, 18, 0)
        o, pool = run(batch, batch_invariant=True)
        assert oracle.same_bits(o[part], wanted[0])
        assert oracle.same_bits(pool[batch.slots[n]], wanted[1][alone.slots[0]])


def test_without_batch_invariance_only_the_first_row_modulo_16_matters():
    alone = oracle.random_batch(19, [150], known=[True])
    batches = [
        embed(alone, before, after, seed, 0)
        for before, after, seed in (([5], [3], 1), ([21], [], 2), ([1, 4], [9], 3))
    ]
    results = [(run(batch), batch, part, n) for batch, part, n in batches]
    (o, pool), batch, part, n = results[0]
    for (other, other_pool), other_batch, other_part, m in results[1:]:
        assert oracle.same_bits(o[part], other[other_part])
        assert oracle.same_bits(pool[batch.slots[n]], other_pool[other_batch.slots[m]])


@pytest.mark.parametrize("where", ["q", "k", "v", "pool", "g"])
@pytest.mark.parametrize("lengths", [[5, 20, 40], [1, 1, 1]], ids=["chunks", "decode"])
def test_nan_stays_in_its_request(where, lengths):
    clean = oracle.random_batch(20, lengths, known=[True] * 3, per_token=True)
    wanted = run(clean)
    bad = dataclasses.replace(clean, **{where: getattr(clean, where).copy()})
    row = clean.cu[1]
    getattr(bad, where)[clean.slots[1] if where == "pool" else row] = np.nan
    if where != "pool" and lengths[1] > 1:
        getattr(bad, where)[row + 3] = np.inf if where != "g" else np.nan
    o, pool = run(bad)
    mine = slice(row, clean.cu[2])
    assert np.isnan(o[mine].astype(np.float32)).any()
    others = np.r_[0:row, clean.cu[2] : len(o)]
    assert oracle.same_bits(o[others], wanted[0][others])
    keep = np.setdiff1d(np.arange(len(pool)), [clean.slots[1]])
    assert oracle.same_bits(pool[keep], wanted[1][keep])


@settings(max_examples=12)
@example(lengths=[0, 0, 0, 0, 0, 0], slots=[0] * 6, known=[True] * 6, seed=0)
@example(lengths=[96, 0, 0, 0, 0, 0], slots=[5, 4, 3, 2, 1, 0], known=[False] * 6, seed=0)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 1, 2, 5, 15, 16, 17]), min_size=6, max_size=6),
    slots=st.lists(st.integers(-2, 9), min_size=6, max_size=6),
    known=st.lists(st.booleans(), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_drawn_batches(lengths, slots, known, seed):
    options = {"tokens": 96, "slots": slots, "known": known, "dtype": np.float32}
    batch = oracle.random_batch(seed, lengths, **options)
    o, pool = run(batch)
    wanted, states = oracle.exact(batch)
    last = {slot: n for n, slot in enumerate(slots) if lengths[n] and 0 <= slot < len(pool)}
    for slot in set(range(len(pool))) - set(last):
        assert oracle.same_bits(pool[slot], batch.pool[slot])
    assert oracle.error(o, wanted) < 3e-6
    assert oracle.error(pool, states) < 3e-6


def test_batch_form_and_chained_states():
    rng = np.random.default_rng(21)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 40, 2, 128)), jnp.float32) for _ in range(3))
    decay = gla.TokenDecay(-jnp.asarray(rng.uniform(0, 1, (2, 40, 2)), jnp.float32))
    options = {"implementation": "interpret", "plan": PLAN}
    with interpret.strict():
        o, final = gla.gla_batch(q, k, v, decay=decay, **options)
        first = gla.TokenDecay(decay.g[:, :24])
        rest = gla.TokenDecay(decay.g[:, 24:])
        a, middle = gla.gla_batch(q[:, :24], k[:, :24], v[:, :24], decay=first, **options)
        b, end = gla.gla_batch(
            q[:, 24:], k[:, 24:], v[:, 24:], decay=rest, initial_state=middle, **options
        )
    want, want_final = gla.gla_batch(q, k, v, decay=decay, implementation="reference")
    assert oracle.error(o, want) < 3e-6 and oracle.error(final, want_final) < 3e-6
    assert oracle.error(jnp.concatenate([a, b], axis=1), o) < 3e-6
    assert oracle.error(end, final) < 3e-6


def test_auto_is_the_reference_here_and_interpret_is_not(monkeypatch):
    batch = oracle.random_batch(22, [20, 1])
    auto = gla.gla(*batch.args(), decay=batch.decay)
    plain = reference.chunked(*batch.args(), decay=batch.decay)
    assert oracle.same_bits(auto[0], plain[0])

    def refuse(*args, **kwargs):
        raise AssertionError("the fallback ran")

    monkeypatch.setattr(reference, "chunked", refuse)
    run(batch)


def test_inside_shard_map():
    batch = oracle.random_batch(23, [1, 30], qk_heads=4, heads=4)
    mesh = jax.make_mesh((2,), ("h",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    by_head, whole = jax.P(None, "h"), jax.P()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, by_head, whole, whole, whole, jax.P("h")),
        out_specs=(by_head, by_head),
    )
    def sharded(*args):
        *rest, g = args
        return gla.gla(*rest, decay=gla.HeadDecay(g), implementation="interpret", plan=PLAN)

    with interpret.strict():
        o, pool = sharded(*batch.args(), jnp.asarray(batch.g))
        o, pool = np.asarray(o), np.asarray(pool)
    one, one_pool = run(batch)
    assert oracle.same_bits(o, one) and oracle.same_bits(pool, one_pool)
