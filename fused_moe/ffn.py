"""What an expert computes, on values; knows nothing of where they come from."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

F32 = jnp.float32


def product(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    factor: jax.Array,
) -> jax.Array:
    """Factor * (x @ weight) + bias in float32, each block of inputs with its scale.

    Args:
      x: [R, K].
      weight: [K, N]; taken in the type of x where that is wider.
      scale: [B, N] of B equal blocks of K, or None.
      bias: [1, N] or None.
      factor: [R, 1].
    """
    if x.dtype.itemsize > weight.dtype.itemsize:
        weight = weight.astype(x.dtype)
    blocks = 1 if scale is None else scale.shape[0]
    size = x.shape[1] // blocks
    parts = []
    for b in range(blocks):
        inputs = slice(b * size, (b + 1) * size)
        part = jnp.dot(x[:, inputs], weight[inputs], preferred_element_type=F32)
        if scale is not None:
            part *= scale[b : b + 1]
        parts.append(part)
    y = functools.reduce(jnp.add, parts) * factor
    return y if bias is None else y + bias
