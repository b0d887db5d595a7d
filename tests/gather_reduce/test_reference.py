"""The specification, against float64 and against sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference import gather_reduce as reference
from tests.gather_reduce import oracle
from tests.gather_reduce.oracle import FORMATS, Shape, draw


@pytest.mark.parametrize("rows", FORMATS)
@pytest.mark.parametrize("top_k", [1, 5, 8])
def test_bit_for_bit_in_the_documented_order(rows, top_k):
    shape = Shape(tokens=9, top_k=top_k, hidden_size=300, format=rows)
    data = draw(shape, holes=0.2, invalid=0.2)
    x = oracle.operand(shape, data.x)
    for out in ("float32", "bfloat16"):
        args = (x, data.indices, data.weights, data.valid)
        found = reference.gather_reduce(*args, out_dtype=jnp.dtype(out))
        np.testing.assert_array_equal(np.asarray(found), oracle.exact(data, out))


def test_against_float64_under_jit():
    shape = Shape(tokens=9, top_k=7, format="float32", out="float32")
    data = draw(shape, holes=0.2)
    found = jax.jit(reference.gather_reduce)(data.x, data.indices, data.weights)
    right, size = oracle.float64(data)
    assert (np.abs(found - right) <= 6 * 2.0**-24 * size).all()


def test_the_order_of_the_sum():
    a, b, c, d, e = (jnp.float32(v) for v in (1e8, 1.0, -1e8, 3.0, 0.25))
    assert reference.tree_sum([a, b, c, d, e]) == ((a + b) + (c + d)) + e
    assert reference.tree_sum([a, b, c, d, e]) != a + (b + (c + (d + e)))
    assert reference.tree_sum([e]) == e


def test_nothing_leaks_from_rows_that_do_not_count():
    shape = Shape(tokens=5, top_k=3, format="float32", out="float32")
    data = draw(shape, holes=0.3, invalid=0.3)
    data.weights[0, 0] = 0
    chosen = data.indices[oracle.terms(data)[1]]
    data.x[~np.isin(np.arange(shape.rows), chosen)] = np.nan
    found = reference.gather_reduce(data.x, data.indices, data.weights, data.valid)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("hidden_size", [1, 256, 300, 1024])
def test_packing_is_undone(dtype, hidden_size):
    x = jax.random.normal(jax.random.key(0), (5, hidden_size)).astype(dtype)
    packed = reference.pack_columns(x)
    assert packed.words.shape[1] % 128 == 0
    np.testing.assert_array_equal(np.asarray(reference.unpack_columns(packed)), np.asarray(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_a_producer_packs_part_by_part(dtype):
    y = jax.random.normal(jax.random.key(0), (5, 300))
    parts = [part.astype(dtype) for part in reference.column_parts(y, dtype)]
    packed, right = reference.pack_parts(parts, 300), reference.pack_columns(y.astype(dtype))
    assert (packed.hidden_size, packed.dtype) == (right.hidden_size, right.dtype)
    np.testing.assert_array_equal(packed.words, right.words)


def test_the_layout_of_words():
    """Word c of bfloat16 rows: column c below, column c + half above."""
    x = np.arange(2 * 512).reshape(2, 512).astype(jnp.bfloat16)
    words = np.asarray(reference.pack_columns(jnp.asarray(x)).words)
    low = (words & 0xFFFF).astype(np.uint16).view(jnp.bfloat16)
    high = (words.view(np.uint32) >> 16).astype(np.uint16).view(jnp.bfloat16)
    np.testing.assert_array_equal(low, x[:, :256])
    np.testing.assert_array_equal(high, x[:, 256:])


def test_nothing_to_do():
    nothing = jnp.zeros((0, 128)), jnp.zeros((3, 2), jnp.int32)
    assert not reference.gather_reduce(*nothing).any()
    assert reference.gather_reduce(jnp.ones((4, 8)), jnp.zeros((0, 2), jnp.int32)).shape == (0, 8)
