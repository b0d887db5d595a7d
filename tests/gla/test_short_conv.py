"""The short convolution: its definition in float64, states over steps, unusual values."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gla
from tests.gla import oracle
from tpukit import aot
from tpukit.errors import ArgumentError

call = jax.jit(gla.short_conv, static_argnames="activation")


def exact(x, weight, pool, slots, cu, known, activation="silu"):
    """Token by token, float64."""
    x, weight, before = oracle.wide(x), oracle.wide(weight), len(weight) - 1
    y, after = np.zeros_like(x), oracle.wide(pool)
    bounds = np.maximum.accumulate(np.clip(cu, 0, len(x)))
    for n, slot in enumerate(slots):
        if bounds[n] == bounds[n + 1] or not 0 <= slot < len(pool):
            continue
        inputs = list(oracle.wide(pool[slot]) if known[n] else np.zeros((before, x.shape[1])))
        for t in range(bounds[n], bounds[n + 1]):
            inputs.append(x[t])
            total = sum(w * z for w, z in zip(weight, inputs[-before - 1 :], strict=True))
            y[t] = total / (1 + np.exp(-total)) if activation == "silu" else total
        after[slot] = np.stack(inputs[-before:])
    return y, after


def batch(seed, lengths, *, slots=None, known=None, tokens=24, size=4, dtype=np.float32):
    rng = np.random.default_rng(seed)
    count = len(lengths)
    x = rng.standard_normal((tokens, 8)).astype(dtype)
    weight = rng.standard_normal((size, 8)).astype(np.float32)
    pool = rng.standard_normal((count + 2, size - 1, 8)).astype(dtype)
    slots = np.arange(count)[::-1] if slots is None else slots
    known = rng.random(count) < 0.6 if known is None else known
    cu = np.cumsum([1, *lengths])
    return x, weight, pool, np.asarray(slots, np.int32), cu.astype(np.int32), np.asarray(known)


def check(args, activation="silu", limit=1e-6):
    y, pool = call(*map(jnp.asarray, args), activation=activation)
    wanted, after = exact(*args, activation)
    assert oracle.error(y, wanted) <= limit
    assert oracle.same_bits(pool, after.astype(args[2].dtype))


@settings(max_examples=30)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 5, 9]), min_size=5, max_size=5),
    slots=st.permutations([-1, 0, 3, 6, 99]),
    known=st.lists(st.booleans(), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_drawn_batches(lengths, slots, known, seed):
    check(batch(seed, lengths, slots=slots, known=known))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_kernel_sizes_and_activations(size, activation):
    check(batch(1, [1, 2, 7], size=size), activation)


def test_bf16_rounds_once():
    args = batch(2, [1, 2, 7, 3], dtype=ml_dtypes.bfloat16)
    wanted, _ = exact(*args)
    check(args, limit=1.01 * oracle.error(oracle.bf16(wanted), wanted))


def test_in_pieces_is_at_once():
    x, weight, pool, *_ = map(jnp.asarray, batch(3, [20]))
    slots, known = jnp.array([1], jnp.int32), jnp.array([True])
    whole, final = call(x, weight, pool, slots, jnp.array([0, 24], jnp.int32), known)
    parts = []
    for cut in (x[:2], x[2:3], x[3:24]):
        bounds = jnp.array([0, len(cut)], jnp.int32)
        y, pool = call(cut, weight, pool, slots, bounds, known)
        parts.append(y)
    assert oracle.error(jnp.concatenate(parts), whole) < 1e-6 and oracle.same_bits(pool, final)


def test_nan_stays_in_its_request_and_bounds_may_be_hostile():
    args = list(batch(4, [3, 5, 2], known=[True] * 3))
    clean = call(*map(jnp.asarray, args))
    args[0] = args[0].copy()
    args[0][[0, 5]] = np.nan  # a row of nobody, and one of the second request
    args[2] = args[2].copy()
    args[2][args[3][1]] = np.nan
    y, _ = call(*map(jnp.asarray, args))
    others = np.r_[0:4, 9:24]
    assert oracle.same_bits(y[others], clean[0][others]) and np.isnan(y[4:9]).any()
    args = list(batch(5, [3, 5, 2]))
    args[4] = np.array([7, -3, 2**31 - 1, 4], np.int32)
    check(args)


def test_gradients_are_those_of_the_definition():
    x, weight, pool, *rest = map(jnp.asarray, batch(6, [3, 1, 8], known=[True, False, True]))

    def total(x, weight, pool):
        y, after = gla.short_conv(x, weight, pool, *rest)
        return jnp.sum(y**2) + jnp.sum(after * 0.5)

    found = jax.grad(total, (0, 1, 2))(x, weight, pool)
    args = [oracle.wide(a) for a in (x, weight, pool)]
    for n, index in ((0, (4, 2)), (0, (6, 1)), (1, (1, 3)), (2, (0, 2, 5))):
        moved = []
        for step in (1e-5, -1e-5):
            other = [a.copy() for a in args]
            other[n][index] += step
            y, after = exact(*other, *map(np.asarray, rest))
            moved.append(np.sum(y**2) + 0.5 * np.sum(after))
        assert float(found[n][index]) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-3)


BAD = {
    "channels": (dict(weight=jnp.ones((4, 9))), "weight has shape"),
    "inputs of the pool": (dict(conv_pool=jnp.ones((3, 2, 8))), "weight has shape"),
    "one tap": (dict(weight=jnp.ones((1, 8)), conv_pool=jnp.ones((3, 0, 8))), "kernel_size is 1"),
    "type of the pool": (dict(conv_pool=jnp.ones((3, 3, 8), jnp.bfloat16)), "conv_pool has dtype"),
    "activation": (dict(activation="gelu"), "activation is 'gelu'; needs 'silu' or 'none'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, message = BAD[name]
    names = ("x", "weight", "conv_pool", "slot_ids", "cu_seqlens", "has_state")
    args = dict(zip(names, map(jnp.asarray, batch(7, [3])), strict=True))
    with pytest.raises(ArgumentError, match=message):
        gla.short_conv(**{**args, **changes})


def test_nothing_to_do():
    x, weight, pool, slots, cu, known = map(jnp.asarray, batch(8, [3]))
    assert gla.short_conv(x[:0], weight, pool, slots, cu, known)[0].shape == (0, 8)
    y, after = gla.short_conv(x, weight, pool[:0], slots, cu, known)
    assert not np.asarray(y).any() and after.shape == (0, 3, 8)


def test_compiles_for_a_tpu():
    shape = jax.ShapeDtypeStruct
    rows, pool = shape((2048, 6144), jnp.bfloat16), shape((34, 3, 6144), jnp.bfloat16)
    steer = shape((32,), jnp.int32), shape((33,), jnp.int32), shape((32,), jnp.bool_)
    args = rows, shape((4, 6144), jnp.float32), pool, *steer
    assert aot.compile_for(jax.jit(gla.short_conv), *args, chip="tpu7x").code_bytes
