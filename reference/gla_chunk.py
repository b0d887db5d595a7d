"""What the chunked form of `reference.gla` computes for all chunks at once.

Arrays are [c, h, i, ...]: chunk, head, token of the chunk. Log decays g are [c, h, i, 1] or, per
key channel, [c, h, i, key_dim].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

Product = Callable[[str, jax.Array, jax.Array], jax.Array]


def until_last(g: jax.Array) -> jax.Array:
    """e^(g_{j+1} + ... + g_last) for each token j."""
    rest = jnp.pad(g[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
    return jnp.exp(lax.cumsum(rest, axis=2, reverse=True))


def read(rows: jax.Array, b: jax.Array, state: jax.Array, product: Product) -> jax.Array:
    """[..., i, value_dim] rows_i e^(b_i) S."""
    if b.shape[-1] == 1:
        return jnp.exp(b) * product("...ik,...kv->...iv", rows, state)
    return product("...ik,...kv->...iv", jnp.exp(b) * rows, state)


def pairs(rows: jax.Array, k: jax.Array, g: jax.Array, product: Product) -> jax.Array:
    """[c, h, i, j] sum over channels of rows_i k_j e^(g_{j+1} + ... + g_i) for j <= i, else 0."""
    if g.shape[-1] > 1:
        return channel_pairs(rows, k, g, product)
    ones = jnp.ones((k.shape[2],) * 2, bool)
    # no differences of long sums: where decays are strong, those have no digits left for a gradient
    sums = jnp.cumsum(jnp.where(jnp.tril(ones, -1), g, 0.0), axis=2)
    within = jnp.exp(jnp.where(jnp.tril(ones), sums, -jnp.inf))
    return product("chid,chjd->chij", rows, k) * within


def delta_inverse(k: jax.Array, g: jax.Array, beta: jax.Array, product: Product) -> jax.Array:
    """[c, h, i, j] inverse of I + beta_i k_i k_j e^(g_{j+1} + ... + g_i) for j < i.

    Args:
      k, g, product: as in `pairs`.
      beta: [c, h, i, 1].
    """
    lower = jnp.tril(beta * pairs(k, k, g, product), -1)
    unit = jnp.broadcast_to(jnp.eye(k.shape[2]), lower.shape)
    return solve_triangular(unit + lower, unit, lower=True, unit_diagonal=True)


def channel_pairs(rows: jax.Array, k: jax.Array, g: jax.Array, product: Product) -> jax.Array:
    """As `pairs`, for decays per key channel.

    The decay is inside the product. To take it as a matrix product, the way from j to i is broken
    where the two part: in the middle of the smallest aligned block that has both. What lies before
    goes to the key, what lies behind to the row; no exponent is positive, and nothing cancels.

    Args:
      rows, k: [c, h, i, key_dim]; i a power of two.
      g: [c, h, i, key_dim] log decays.
      product: an einsum of two operands.
    """
    size = k.shape[2]
    found = jnp.sum(rows * k, axis=-1)[..., None, None]  # [c, h, blocks, m, m]
    upto, after = g, jnp.zeros_like(g)  # sums within the block, up to a row and after it
    m = 1
    while m < size:

        def halves(x: jax.Array, m: int = m) -> tuple[jax.Array, jax.Array]:
            pairs = x.reshape(*x.shape[:2], size // (2 * m), 2, m, x.shape[-1])
            return pairs[:, :, :, 0], pairs[:, :, :, 1]

        def unite(first: jax.Array, second: jax.Array) -> jax.Array:
            return jnp.stack([first, second], axis=3).reshape(k.shape)

        (upto_1, upto_2), (after_1, after_2) = halves(upto), halves(after)
        queries, keys = halves(rows)[1] * jnp.exp(upto_2), halves(k)[0] * jnp.exp(after_1)
        below = product("chbik,chbjk->chbij", queries, keys)
        above = jnp.concatenate([found[:, :, 0::2], jnp.zeros_like(below)], axis=-1)
        below = jnp.concatenate([below, found[:, :, 1::2]], axis=-1)
        found = jnp.concatenate([above, below], axis=-2)
        first = upto_1[..., -1:, :]
        second = upto_2[..., -1:, :]
        upto, after = unite(upto_1, upto_2 + first), unite(after_1 + second, after_2)
        m *= 2
    return found[:, :, 0]
