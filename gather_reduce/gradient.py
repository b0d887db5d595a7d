"""The gradient: rows get what their tokens got, weighted; weights get products of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from reference.gather_reduce import PackedRows, counts, take

Run = Callable[..., jax.Array]
Rows = jax.Array | PackedRows


def differentiable(run: Run, x: Rows, indices: jax.Array, factors: jax.Array | None) -> jax.Array:
    """`run(x, indices, factors)` with a gradient.

    d_x adds up factors[t, k] * d_out[t] over all (t, k) that chose the row; d_factors[t, k] is the
    product of row and d_out[t]. Of terms that do not count, both are 0.
    """
    return _call(run, x, indices, factors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call(run: Run, x: Rows, indices: jax.Array, factors: jax.Array | None) -> jax.Array:
    return run(x, indices, factors)


def _forward(
    run: Run, x: Rows, indices: jax.Array, factors: jax.Array | None
) -> tuple[jax.Array, Any]:
    return run(x, indices, factors), (x, indices, factors)


def _backward(run: Run, saved: Any, d_out: jax.Array) -> tuple[Any, Any, Any]:
    del run
    x, indices, factors = saved
    num_rows = (x.words if isinstance(x, PackedRows) else x).shape[0]
    counted = counts(indices, factors, num_rows)
    d_out = d_out.astype(jnp.float32)
    nothing = np.zeros(indices.shape, jax.dtypes.float0)
    d_factors = None if factors is None else jnp.zeros_like(factors)
    if factors is not None and num_rows:
        d_factors = row_products(x, indices, counted, d_out)
    if isinstance(x, PackedRows):
        none = np.zeros(x.words.shape, jax.dtypes.float0)
        return PackedRows(none, x.hidden_size, x.dtype), nothing, d_factors  # type: ignore[arg-type]
    return scatter_add(x, indices, counted, factors, d_out), nothing, d_factors


def scatter_add(
    x: jax.Array,
    indices: jax.Array,
    counted: jax.Array,
    factors: jax.Array | None,
    d_out: jax.Array,
) -> jax.Array:
    """d_x, added up in float32."""
    d_x = jnp.zeros(x.shape, jnp.float32)
    for k in range(indices.shape[1]):
        target = jnp.where(counted[:, k], indices[:, k], x.shape[0])
        share = d_out if factors is None else d_out * factors[:, k, None]
        d_x = d_x.at[target].add(share, mode="drop")
    return d_x.astype(x.dtype)


def row_products(x: Rows, indices: jax.Array, counted: jax.Array, d_out: jax.Array) -> jax.Array:
    """d_factors, float32."""

    def products(k: int) -> jax.Array:
        row = take(x, jnp.where(counted[:, k], indices[:, k], 0))
        return jnp.where(counted[:, k], jnp.sum(row * d_out, axis=-1), 0.0)

    return jnp.stack([products(k) for k in range(indices.shape[1])], axis=1)


_call.defvjp(_forward, _backward)
