"""The gradient, against what JAX derives from the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gather_reduce
from reference import gather_reduce as reference
from tests.gather_reduce import oracle
from tests.gather_reduce.oracle import Shape, draw


def gradients(function, x, weights, factor):
    """Of a sum of squares, so that the incoming gradient is not constant."""

    def loss(x, weights):
        return jnp.sum(function(x, weights).astype(jnp.float32) ** 2 * factor)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, weights)


SIMULATED = pytest.param("interpret", marks=pytest.mark.needs("SparseCore simulator"))


@pytest.mark.parametrize("implementation", ["reference", SIMULATED])
@pytest.mark.parametrize("rows", ["float32", "bfloat16"])
def test_rows_and_weights(rows, implementation):
    shape = Shape(tokens=12, top_k=5, rows=20, format=rows, out="float32")
    data = draw(shape, holes=0.1, invalid=0.2)
    data.weights[3] = 0
    factor = np.random.default_rng(1).standard_normal(256).astype(np.float32)

    def ours(x, weights):
        return gather_reduce.ragged_gather_reduce(
            x,
            data.indices,
            weights,
            data.valid,
            out_dtype=jnp.float32,
            implementation=implementation,
        )

    def spec(x, weights):
        return reference.gather_reduce(x, data.indices, weights, data.valid, out_dtype=jnp.float32)

    x, weights = jnp.asarray(data.x), jnp.asarray(data.weights)
    found, right = (gradients(f, x, weights, factor) for f in (ours, spec))
    assert found[0].dtype == x.dtype and found[1].dtype == weights.dtype
    precision = 2.0**-6 if rows == "bfloat16" else 1e-5
    size = np.abs(np.asarray(right[0], np.float32)).max()
    np.testing.assert_allclose(
        np.asarray(found[0], np.float32), np.asarray(right[0], np.float32), atol=precision * size
    )
    np.testing.assert_allclose(found[1], right[1], rtol=1e-4, atol=1e-4)
    assert not found[1][3].any()


def test_row_scales_and_packed_rows():
    shape = Shape(tokens=6, top_k=3, rows=20)
    data = draw(shape, holes=0.2)
    x = oracle.operand(shape, data.x)
    scales = jnp.linspace(0.5, 2, 20)

    def loss(function, weights, scales):
        out = function(x, data.indices, weights, row_scales=scales, out_dtype=jnp.float32)
        return jnp.sum(out**2)

    for argument in (1, 2):
        found, right = (
            jax.grad(loss, argnums=argument)(f, jnp.asarray(data.weights), scales)
            for f in (gather_reduce.dense_gather_reduce, reference.gather_reduce)
        )
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("implementation", ["reference", SIMULATED])
def test_nothing_leaks_from_what_does_not_count(implementation):
    """Rows and scales that no term counts are NaN; gradients are those without them."""
    shape = Shape(tokens=6, top_k=3, rows=20, format="float32", out="float32")
    data = draw(shape, holes=0.1, invalid=0.3)
    data.weights[2] = 0
    data.indices[data.indices == 0] = 1
    used = np.isin(np.arange(20), data.indices[oracle.terms(data)[1]])
    assert not used[0] and used.sum() < 19

    def loss(function, x, weights, scales):
        out = function(x, data.indices, weights, data.valid, row_scales=scales)
        return jnp.sum(out**2)

    def gradients(function, fill):
        x = jnp.asarray(np.where(used[:, None], data.x, fill).astype(np.float32))
        scales = jnp.asarray(np.where(used, 1.5, fill).astype(np.float32))
        weights = jnp.asarray(data.weights)
        return jax.grad(functools.partial(loss, function), argnums=(0, 1, 2))(x, weights, scales)

    run = functools.partial(gather_reduce.ragged_gather_reduce, implementation=implementation)
    right = gradients(reference.gather_reduce, 0.0)
    for function in (run, reference.gather_reduce):
        for a, b in zip(gradients(function, np.nan), right, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
            assert np.asarray(b).any()


def test_rows_that_several_tokens_chose_get_the_sum():
    x = jnp.ones((2, 128))
    indices = jnp.array([[0, 0], [0, -1], [5, 1]], jnp.int32)
    d_x = jax.grad(lambda x: gather_reduce.dense_gather_reduce(x, indices).sum())(x)
    np.testing.assert_array_equal(d_x[:, 0], [3, 1])


def test_under_jit_without_rows():
    x, indices = jnp.zeros((0, 128)), jnp.zeros((3, 2), jnp.int32)
    weights = jnp.ones((3, 2))
    call = gather_reduce.dense_gather_reduce
    d_w = jax.jit(jax.grad(lambda w: call(x, indices, w).sum()))(weights)
    assert not d_w.any()
