"""The delta rule, with every kind of decay: the reference and the kernel, interpreted."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import gla
from gla import delta
from reference import gla as reference
from tests.gla import oracle
from tests.gla.test_channel import MEDIUM, SMALL, extremes
from tests.gla.test_gla import LATE, compiled, embed, ordered_sums, run
from tpukit import interpret
from tpukit.errors import ArgumentError

__all__ = ["ordered_sums"]
DECAYS = {"head": {}, "token": {"per_token": True}, "channel": {"per_channel": True}}
ONE = {"qk_heads": 1, "heads": 1}
SINGLE = dataclasses.replace(SMALL, heads=1, interleave=1)


def delta_batch(seed, lengths, kind="token", **options):
    return oracle.random_batch(seed, lengths, delta=True, **DECAYS[kind], **options)


# As check_gates of test_gla, with what the rule adds: an inverse and a difference, both rounded, of
# values that are themselves sums. An operand that flips moves all later tokens of its chunk.
FLIPS = 1e-3


def check_gates(batch, o, pool, window, **cut):
    """Gates A and B for bf16 operands."""
    wanted, states = oracle.rounded(batch, window=window, **cut)
    rounding = oracle.error(oracle.bf16(wanted), wanted)
    assert oracle.error(o, wanted) <= 1.25 * rounding + FLIPS
    if batch.pool.dtype == np.float32:
        assert oracle.error(pool, states) <= FLIPS
    exact, exact_states = oracle.exact(batch)
    options = {"operands": jnp.bfloat16, "chunk": window}
    plain, plain_states = oracle.chunked(batch, **options)
    assert oracle.error(o, exact) <= 1.1 * oracle.error(plain, exact) + 1e-7
    assert oracle.error(pool, exact_states) <= 1.1 * oracle.error(plain_states, exact_states) + 1e-7


@pytest.mark.parametrize("kind", DECAYS)
def test_the_reference_is_the_definition(kind):
    lengths = [1, 0, 17, 1, 64, 100]
    batch = delta_batch(1, lengths, kind, dtype=np.float32, qk_heads=1, dims=(64, 128), gap=3)
    wanted, states = oracle.exact(batch)
    gates = {"decay": batch.decay, "beta": batch.strength}
    for function, options in ((reference.recurrent, {}), (reference.chunked, {"chunk": 32})):
        o, pool = function(*batch.args(), **gates, **options)
        assert oracle.error(o, wanted) < 1e-6 and oracle.error(pool, states) < 1e-6


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_gradients_of_the_reference(kind):
    batch = delta_batch(2, [40], kind, dtype=np.float32, known=[True], dims=(64, 64), **ONE)
    wrap = type(batch.decay)

    def gradients(function):
        def loss(q, k, v, pool, g, beta):
            gates = {"decay": wrap(g), "beta": beta}
            o, new = function(q, k, v, pool, *batch.args()[4:], **gates)
            return jnp.sum(o * jnp.cos(o)) + jnp.sum(new**2)

        arrays = (*batch.args()[:4], jnp.asarray(batch.g), batch.strength)
        return jax.jit(jax.grad(loss, argnums=range(6)))(*arrays)

    for a, b in zip(gradients(reference.chunked), gradients(reference.recurrent), strict=True):
        assert np.isfinite(a).all() and oracle.error(a, b) < 2e-5


@pytest.mark.parametrize("kind", DECAYS)
def test_bf16(kind):
    batch = delta_batch(3, [1, 1, 40, 0, 1, 64, 17, 150], kind, gap=5, qk_heads=1)
    check_gates(batch, *run(batch, plan=MEDIUM), window=64)


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_f32_and_strong_decays(kind):
    batch = delta_batch(4, [1, 70, 1, 33], kind, dtype=np.float32, **ONE)
    plan = dataclasses.replace(SINGLE, window=64)
    for case in (batch, extremes(batch)):
        o, pool = run(case, plan=plan)
        wanted, states = oracle.exact(case)
        limit = 1e-5 if kind == "token" and case is not batch else 1e-6  # long sums lose digits
        assert oracle.error(o, wanted) < limit and oracle.error(pool, states) < limit


def test_the_widest_window():
    batch = delta_batch(5, [128, 1, 60], "token", **ONE)
    plan = dataclasses.replace(SINGLE, window=128)
    check_gates(batch, *run(batch, plan=plan), window=128)


@pytest.mark.parametrize("keys", ["same", "opposite", "long"])
def test_keys_for_which_powers_would_explode(keys):
    """Without decay and at full strength; a power series of N would lose all digits."""
    norm = 2**0.5 if keys == "long" else 1.0
    batch = delta_batch(6, [64, 1], "token", dtype=np.float32, keys=norm, **ONE)
    batch.beta[:], batch.g[:] = 1, 0
    if keys != "long":
        batch.k[:] = batch.k[0]
    if keys == "opposite":
        batch.k[1::2] *= -1
    o, pool = run(batch, plan=dataclasses.replace(SINGLE, window=64))
    wanted, states = oracle.exact(batch)
    assert oracle.error(o, wanted) < 1e-5 and oracle.error(pool, states) < 1e-5


def test_dims_grouped_heads_and_state_types():
    options = {"qk_heads": 2, "heads": 4, "dims": (64, 256), "state": ml_dtypes.bfloat16}
    batch = delta_batch(7, [1, 50, 20, 1], "token", **options)
    o, pool = run(batch, plan=dataclasses.replace(SMALL, heads=4))
    assert pool.dtype == ml_dtypes.bfloat16
    check_gates(batch, o, pool, window=32)


def test_heads_over_grid_steps_races_and_both_dma_modes():
    batch = delta_batch(8, [1, 1, 20, 1, 37, 0, 1, 1], "channel", qk_heads=2, heads=4)
    late, eager = run(batch, LATE, SMALL), run(batch, interpret.MODES[1], SMALL)
    check_gates(batch, *late, window=32)
    for a, b in zip(late, eager, strict=True):
        assert oracle.same_bits(a, b)


@pytest.mark.usefixtures("ordered_sums")
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_batch_invariance(kind):
    alone = delta_batch(9, [40], kind, known=[True])
    wanted = run(alone, plan=SMALL, batch_invariant=True)
    batch, part, n = embed(alone, [3, 1, 9], [2], 10, 0)
    o, pool = run(batch, plan=SMALL, batch_invariant=True)
    assert oracle.same_bits(o[part], wanted[0])
    assert oracle.same_bits(pool[batch.slots[n]], wanted[1][alone.slots[0]])


@pytest.mark.parametrize("lengths", [[5, 20, 40], [1, 1, 1]], ids=["chunks", "decode"])
def test_nan_stays_in_its_request(lengths):
    clean = delta_batch(11, lengths, known=[True] * 3, **ONE)
    wanted = run(clean, plan=SINGLE)
    bad = dataclasses.replace(clean, beta=clean.beta.copy())
    bad.beta[clean.cu[1]] = np.nan
    o, pool = run(bad, plan=SINGLE)
    assert np.isnan(o[clean.cu[1] : clean.cu[2]].astype(np.float32)).any()
    others = np.r_[0 : clean.cu[1], clean.cu[2] : len(o)]
    keep = np.setdiff1d(np.arange(len(pool)), [clean.slots[1]])
    assert oracle.same_bits(o[others], wanted[0][others])
    assert oracle.same_bits(pool[keep], wanted[1][keep])


def test_batch_form_is_many_requests():
    rng = np.random.default_rng(12)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 20, 2, 64)), jnp.float32) / 8 for _ in range(3))
    decay = gla.TokenDecay(-jnp.asarray(rng.uniform(0, 2, (2, 20, 2)), jnp.float32))
    beta = jnp.asarray(rng.uniform(0, 1, (2, 20, 2)), jnp.float32)
    options = {"implementation": "reference"}
    o, final = gla.gla_batch(q, k, v, decay=decay, beta=beta, **options)
    last = gla.TokenDecay(decay.g[1:])
    one, state = gla.gla_batch(q[1:], k[1:], v[1:], decay=last, beta=beta[1:], **options)
    assert oracle.error(one[0], o[1]) < 1e-6 and oracle.error(state[0], final[1]) < 1e-6


def test_bad_strengths_are_named():
    batch = delta_batch(13, [3, 1])
    call = lambda beta, **options: gla.gla(  # noqa: E731
        *batch.args(), decay=batch.decay, beta=beta, **options
    )
    with pytest.raises(ArgumentError, match=r"beta has shape \(4, 3\); needs 2"):
        call(jnp.zeros((4, 3)))
    with pytest.raises(ArgumentError, match="beta has dtype bfloat16"):
        call(batch.strength.astype(jnp.bfloat16))
    with pytest.raises(ArgumentError, match=r"beta has nan at index \[2, 1\]; needs finite"):
        call(batch.strength.at[2, 1].set(jnp.nan), validate=True)
    wide = gla.Plan(heads=2, interleave=2, window=256)
    with pytest.raises(ArgumentError, match=r"plan.window is 256; needs one of \(32, 64, 128\)"):
        call(batch.strength, implementation="interpret", plan=wide)


# Seeded faults.

CALIBRATION = delta_batch(
    14, [1, 40, 5, 1], known=[True] * 4, slots=[3, 1, 2, 4], strongest=0.1, **ONE
)


def passes():
    """Whether the gates are green."""
    compiled.cache_clear()
    try:
        plan = dataclasses.replace(SINGLE, window=64)
        check_gates(CALIBRATION, *run(CALIBRATION, plan=plan), window=64)
    except (AssertionError, interpret.InterpretError):
        return False
    finally:
        compiled.cache_clear()
    return True


def test_the_kernel_passes():
    assert passes()


good_written, good_blocks = delta.written, delta.invert_blocks
good_token = delta.decode_token


def only_blocks(n, width, dtype):
    yield
    return [good_blocks(x) for x in n]


MUTANTS = {
    "beta dropped": ("written", lambda v, r, p, b: good_written(v, r, p, [1 + 0 * x for x in b])),
    "nothing recalled": ("written", lambda v, r, p, b: good_written(v, [0 * x for x in r], p, b)),
    "wrong triangle": ("written", lambda v, r, p, b: good_written(v, r, [x.T for x in p], b)),
    "wrong sign": ("written", lambda v, r, p, b: good_written(v, r, [-x for x in p], b)),
    "blocks not inverted": ("invert_blocks", lambda n: jnp.eye(n.shape[0])),
    "only blocks inverted": ("invert", only_blocks),
    "decode: beta dropped": ("decode_token", lambda *args: good_token(*args[:5], 1 + 0 * args[5])),
    "decode: plain": ("decode_token", lambda *args: good_token(*args[:5], 0 * args[5])),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_every_fault_is_caught(name, monkeypatch):
    attribute, fault = MUTANTS[name]
    assert hasattr(delta, attribute)
    monkeypatch.setattr(delta, attribute, fault)
    assert not passes()


def inverse_error():
    """Of the inverse for keys that are alike, in products of bf16 terms."""
    rng = np.random.default_rng(15)
    keys = rng.standard_normal(64) + rng.standard_normal((128, 64)) / 2
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    n = np.tril(keys @ keys.T, -1)
    stages = delta.invert([jnp.asarray(n, jnp.float32)], 128, jnp.dtype(jnp.bfloat16))
    while True:
        try:
            next(stages)
        except StopIteration as done:
            return oracle.error(done.value[0], np.linalg.inv(np.eye(128) + n))


def test_the_inverse_needs_both_terms_of_its_products(monkeypatch):
    assert inverse_error() < 1e-4
    one = lambda a, b, dtype: delta.matmul(a.astype(dtype), b.astype(dtype), delta.NN)  # noqa: E731
    monkeypatch.setattr(delta, "precise", one)
    assert inverse_error() > 1e-3
