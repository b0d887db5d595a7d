"""Decays per key channel: the reference and the kernel, interpreted, down to -30 per token."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import gla
from gla import channel, kernel
from reference import gla as reference
from reference import gla_chunk
from tests.gla import oracle
from tests.gla.test_gla import LATE, check_gates, compiled, embed, ordered_sums, run
from tpukit import interpret

__all__ = ["ordered_sums"]
RAGGED = [1, 1, 40, 0, 1, 127, 17, 150]
SMALL = gla.Plan(heads=2, interleave=2, window=32, inputs=2, states=2, lookahead=1)
MEDIUM = dataclasses.replace(SMALL, window=64)


def extremes(batch, seed=0):
    """The batch with decays of 0, -1e-5, -0.93, -30 and less, drawn for tokens and channels."""
    values = np.asarray([0, -1e-5, -0.93, -30, -1e30], np.float32)
    g = np.random.default_rng(seed).choice(values, batch.g.shape)
    if g.ndim == 3:
        g[: len(g) // 3, :, ::2] = -30  # channels that always forget next to others
    return dataclasses.replace(batch, g=g)


def channel_batch(seed, lengths, **options):
    return oracle.random_batch(seed, lengths, per_channel=True, **options)


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("chunk", [16, 64])
def test_the_reference_is_the_definition(chunk, strong):
    batch = channel_batch(1, RAGGED, dtype=np.float32, qk_heads=1, dims=(64, 128), tokens=350)
    batch = extremes(batch) if strong else batch
    wanted, states = oracle.exact(batch)
    for function, options in ((reference.recurrent, {}), (reference.chunked, {"chunk": chunk})):
        o, pool = function(*batch.args(), decay=batch.decay, **options)
        assert oracle.error(o, wanted) < 2e-6 and oracle.error(pool, states) < 2e-6


def test_gradients_of_the_reference():
    batch = extremes(channel_batch(2, [70], dtype=np.float32, known=[True], dims=(64, 64)))
    inside = np.clip(batch.g, -29, -1e-4)

    def gradients(function):
        def loss(q, k, v, pool, g):
            decay = gla.ChannelDecay(g)
            o, new = function(q, k, v, pool, *batch.args()[4:], decay=decay)
            return jnp.sum(o * jnp.cos(o)) + jnp.sum(new**2)

        return jax.jit(jax.grad(loss, argnums=range(5)))(*batch.args()[:4], jnp.asarray(inside))

    pairs = zip(gradients(reference.chunked), gradients(reference.recurrent), strict=True)
    assert all(np.isfinite(a).all() and oracle.error(a, b) < 2e-5 for a, b in pairs)


@pytest.mark.parametrize("strong", [False, True])
def test_bf16(strong):
    batch = channel_batch(3, RAGGED, gap=5)
    batch = extremes(batch) if strong else batch
    check_gates(batch, *run(batch))


@pytest.mark.parametrize("strong", [False, True])
def test_f32(strong):
    batch = channel_batch(4, [1, 70, 1, 33], dtype=np.float32)
    batch = extremes(batch) if strong else batch
    o, pool = run(batch, plan=MEDIUM)
    wanted, states = oracle.exact(batch)
    assert oracle.error(o, wanted) < 1e-6 and oracle.error(pool, states) < 1e-6
    assert oracle.error(o, wanted, axis=(1, 2)) < 1e-5


@pytest.mark.parametrize("dims", [(64, 64), (256, 128)], ids=str)
def test_dims_and_state_types(dims):
    batch = channel_batch(5, [1, 40, 1], dims=dims, state=ml_dtypes.bfloat16)
    o, pool = run(batch, plan=SMALL)
    assert pool.dtype == ml_dtypes.bfloat16
    check_gates(batch, o, pool, window=32)


def test_grouped_heads_over_grid_steps():
    batch = channel_batch(6, [1, 50, 20, 1], qk_heads=2, heads=8)
    plan = dataclasses.replace(SMALL, heads=4)
    check_gates(batch, *run(batch, plan=plan), window=32)


def test_races_and_both_dma_modes():
    batch = channel_batch(7, [1, 1, 20, 1, 37, 0, 1, 1])
    late, eager = run(batch, LATE, SMALL), run(batch, interpret.MODES[1], SMALL)
    check_gates(batch, *late, window=32)
    for a, b in zip(late, eager, strict=True):
        assert oracle.same_bits(a, b)


@pytest.mark.usefixtures("ordered_sums")
def test_batch_invariance():
    alone = channel_batch(8, [40], known=[True])
    wanted = run(alone, plan=SMALL, batch_invariant=True)
    batch, part, n = embed(alone, [3, 1, 9], [2], 9, 0)
    o, pool = run(batch, plan=SMALL, batch_invariant=True)
    assert oracle.error(o[part], wanted[0]) == 0
    assert oracle.error(pool[batch.slots[n]], wanted[1][alone.slots[0]]) == 0


@pytest.mark.parametrize("lengths", [[5, 20, 40], [1, 1, 1]], ids=["chunks", "decode"])
def test_nan_stays_in_its_request(lengths):
    clean = channel_batch(10, lengths, known=[True] * 3)
    wanted = run(clean, plan=SMALL)
    bad = dataclasses.replace(clean, g=clean.g.copy())
    bad.g[clean.cu[1]] = np.nan
    o, pool = run(bad, plan=SMALL)
    assert np.isnan(o[clean.cu[1] : clean.cu[2]].astype(np.float32)).any()
    others = np.r_[0 : clean.cu[1], clean.cu[2] : len(o)]
    keep = np.setdiff1d(np.arange(len(pool)), [clean.slots[1]])
    assert oracle.same_bits(o[others], wanted[0][others])
    assert oracle.same_bits(pool[keep], wanted[1][keep])


def test_batch_form():
    rng = np.random.default_rng(11)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 40, 2, 128)), jnp.float32) for _ in range(3))
    decay = gla.ChannelDecay(-jnp.asarray(rng.uniform(0, 2, (2, 40, 2, 128)), jnp.float32))
    with interpret.strict():
        o, final = gla.gla_batch(q, k, v, decay=decay, implementation="interpret", plan=SMALL)
    wanted, states = gla.gla_batch(q, k, v, decay=decay, implementation="reference")
    assert oracle.error(o, wanted) < 3e-6 and oracle.error(final, states) < 3e-6
    one, state = gla.gla_batch(
        q[1:], k[1:], v[1:], decay=gla.ChannelDecay(decay.g[1:]), implementation="reference"
    )
    assert oracle.error(one[0], wanted[1]) < 1e-6 and oracle.error(state[0], states[1]) < 1e-6


# Seeded faults.

CALIBRATION = channel_batch(
    12, [1, 40, 5, 1], qk_heads=1, heads=1, known=[True] * 4, slots=[3, 1, 2, 4], strongest=0.5
)


def passes():
    """Whether the gates are green."""
    compiled.cache_clear()
    try:
        plan = dataclasses.replace(SMALL, heads=1, interleave=1)
        check_gates(CALIBRATION, *run(CALIBRATION, plan=plan), window=32)
    except (AssertionError, interpret.InterpretError):
        return False
    finally:
        compiled.cache_clear()
    return True


def test_the_kernel_passes():
    assert passes()


good_decays, good_pairs = channel.decays_of, channel.pairs


def other_levels(change):
    return lambda rows, k, d: good_pairs(rows, k, d._replace(levels=change(d.levels)))


def other_near(change):
    return lambda rows, k, d: good_pairs(rows, k, d._replace(near=change(d.near)))


MUTANTS = {
    "a size of halves missing": other_levels(lambda x: (*x[:2], jnp.ones_like(x[2]), *x[3:])),
    "last size missing": other_levels(lambda x: x[:-1]),
    "first size missing": other_levels(lambda x: (0 * x[0], *x[1:])),
    "a size taken for another": other_levels(lambda x: (x[0], x[2], *x[2:])),
    "inverse decay": other_levels(lambda x: tuple(1 / y for y in x)),
    "near rows undecayed": other_near(lambda x: tuple(map(jnp.ones_like, x))),
    "near rows the wrong way": other_near(lambda x: x[::-1]),
    "not causal": lambda *args: [0.1 + x for x in good_pairs(*args)],
    "no diagonal": lambda *args: [jnp.tril(x, -1) for x in good_pairs(*args)],
}  # fmt: skip
FACTORS = {
    "state read undecayed": lambda d: d._replace(since=jnp.ones_like(d.since)),
    "state not decayed": lambda d: d._replace(whole=jnp.ones_like(d.whole)),
    "keys not decayed": lambda d: d._replace(until=jnp.ones_like(d.until)),
    "channels in the wrong order": lambda d: d._replace(whole=jnp.flip(d.whole, 0)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_faulty_weights_are_caught(name, monkeypatch):
    monkeypatch.setattr(channel, "pairs", MUTANTS[name])
    assert not passes()


@pytest.mark.parametrize("name", FACTORS)
def test_faulty_factors_are_caught(name, monkeypatch):
    monkeypatch.setattr(
        channel, "decays_of", lambda *args: list(map(FACTORS[name], good_decays(*args)))
    )
    assert not passes()


def test_decode_without_its_decay_is_caught(monkeypatch):
    monkeypatch.setattr(kernel, "clip_log_decay", jnp.zeros_like)
    assert not passes()


def test_the_oracle_is_not_the_references_twin():
    """The reference's halving against plain differences in float64."""
    rng = np.random.default_rng(13)
    q, k = rng.standard_normal((2, 1, 1, 32, 8))
    g = -rng.uniform(0, 1, (1, 1, 32, 8))
    b = np.cumsum(g, axis=2)
    difference = b[:, :, :, None] - b[:, :, None]
    wanted = np.tril(np.einsum("chid,chjd,chijd->chij", q, k, np.exp(np.minimum(difference, 0))))
    args = (jnp.asarray(x, jnp.float32) for x in (q, k, g))
    assert oracle.error(gla_chunk.channel_pairs(*args, jnp.einsum), wanted) < 1e-6
