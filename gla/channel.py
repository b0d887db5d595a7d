"""Chunk form with a decay per key channel, on values. Knows nothing of memory.

Here the decay is inside the product: with sums b_i = g_first + ... + g_i per channel c,

    weights_ij = sum_c q_ic k_jc e^(b_ic - b_jc)        for j <= i

To take it as a matrix product, the way from j to i is broken where the two part: let 2 m rows be
the smallest aligned block that has both. Then j is in its first half and i in its second, and

    e^(b_i - b_j) = e^(decays of the second half up to i) e^(decays of the first half after j)

So there is one product per size m = NEAR, 2 NEAR, ... of halves. Both exponents are sums of log
decays: none is positive and nothing cancels, whatever the decays. Rows of the same NEAR share one
product: there the way is broken at the second row r, into e^(b_i - b_r) e^(b_r - b_j), whose
exponents are those of two tokens at the most, 60 either way. Sums within 8 rows, the sublanes of a
register, are a product with a constant matrix; what is longer, a product of factors.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gla.chunk import NN, NT, Scored, iota, matmul

TILE = 8  # rows of a vector register
NEAR = 4  # rows of a block whose weights are one product
LOG2_E = 1.4426950408889634


class Decays(NamedTuple):
    """Decay factors of one head over a window of W rows; rows outside the chunk have decays of 1.

    Attributes:
      near: [W, key_dim] e^(b_i - b_r) and e^(b_r - b_j), r being the second of the NEAR rows.
      levels: per size m of halves [W, key_dim]: in a second half e^(its decays up to the row), in a
        first half e^(its decays after the row).
      since: [W, key_dim] e^(b_i).
      until: [W, key_dim] e^(b_last - b_j).
      whole: [key_dim, 1] e^(b_last).
    """

    near: tuple[jax.Array, jax.Array]
    levels: tuple[jax.Array, ...]
    since: jax.Array
    until: jax.Array
    whole: jax.Array


def split(x: jax.Array, m: int) -> tuple[jax.Array, jax.Array]:
    """First and second halves of m >= TILE rows: twice [pairs, m, n] of [rows, n]."""
    pairs = x.reshape(-1, 2, m, x.shape[1])
    return pairs[:, 0], pairs[:, 1]


def unite(first: jax.Array, second: jax.Array) -> jax.Array:
    """Reverses `split`."""
    return jnp.stack([first, second], axis=1).reshape(-1, first.shape[2])


def short_sums(size: int) -> jax.Array:
    """[4 * size, size] of what `decays_of` has to add up within TILE rows, exact in bf16.

    For each row: the decays between it and the second of its NEAR rows, negative before that; those
    between it and the middle of its 8 rows; those of its 8 rows up to it, and those after it.
    """
    i, j = iota((size, size), 0), iota((size, size), 1)

    def upto(m: int) -> jax.Array:
        return jnp.where((j <= i) & ((i ^ j) < m), 1.0, 0.0)

    def after(m: int) -> jax.Array:
        return jnp.where((j > i) & ((i ^ j) < m), 1.0, 0.0)

    near = upto(NEAR) - jnp.where(((i ^ j) < NEAR) & ((j & (NEAR - 1)) <= 1), 1.0, 0.0)
    half = jnp.where((i & NEAR) != 0, upto(NEAR), after(NEAR))
    return jnp.concatenate([near, half, upto(TILE), after(TILE)])


def decays_of(g: jax.Array, sums: jax.Array, heads: int) -> list[Decays]:
    """Factors of the decays of several heads, side by side to fill the matrix unit.

    Args:
      g: [W, heads * key_dim] log decays, 0 outside the chunk.
      sums: `short_sums(W)` in f32, or in bf16 and twice side by side: for two terms of g, whose
        error is 2^-17 of the exponent.
      heads: how many.
    """
    size, width = g.shape
    g = g * LOG2_E
    terms = g
    if sums.dtype != g.dtype:
        high = g.astype(sums.dtype)
        terms = jnp.concatenate([high, (g - high.astype(g.dtype)).astype(sums.dtype)])
    near, *added = matmul(sums, terms, NN).reshape(4, size, width)
    half, upto, after = map(jnp.exp2, added)
    levels, m = [half], TILE
    while m < size:  # upto, after: within the aligned m rows around each row
        (upto_1, upto_2), (after_1, after_2) = split(upto, m), split(after, m)
        levels.append(unite(after_1, upto_2))
        upto = unite(upto_1, upto_2 * upto_1[:, -1:])
        after = unite(after_1 * upto_2[:, -1:], after_2)
        m *= 2

    def of_head(*factors: jax.Array) -> Decays:
        up, down, since, until, *levels = factors
        whole = jnp.broadcast_to(since[-1:], (TILE, since.shape[1])).T[:, :1]
        return Decays((up, down), tuple(levels), since, until, whole)

    factors = (jnp.exp2(near), jnp.exp2(-near), upto, after, *levels)
    return list(map(of_head, *(jnp.split(x, heads, axis=1) for x in factors)))


def pairs(rows: list[jax.Array], k: jax.Array, decays: Decays) -> list[jax.Array]:
    """As `chunk.pairs`; rows of k outside the chunk are 0."""
    size, count = k.shape[0], len(rows)
    apart = iota((size, size), 0) ^ iota((size, size), 1)  # m <= apart < 2 m: parted by m rows
    wide = [x.astype(jnp.float32) for x in rows]
    wide_k = k.astype(jnp.float32)
    up, down = decays.near
    a = jnp.concatenate([(x * up).astype(k.dtype) for x in wide])
    found = jnp.split(matmul(a, (wide_k * down).astype(k.dtype), NT), count)
    first, *longer = decays.levels
    a = jnp.concatenate([(x * first).astype(k.dtype) for x in wide])
    new = jnp.split(matmul(a, (wide_k * first).astype(k.dtype), NT), count)
    found = [jnp.where(apart >= NEAR, x, y) for x, y in zip(new, found, strict=True)]
    for level, factor in enumerate(longer):
        m = TILE << level
        keys = split(wide_k * factor, m)[0]
        queries = [split(x * factor, m)[1].reshape(size // 2, -1) for x in wide]
        a = jnp.concatenate([x.astype(k.dtype) for x in queries])
        b = unite(keys, jnp.zeros_like(keys)).astype(k.dtype)
        parted = split(apart, m)[1] >= m
        new = jnp.split(matmul(a, b, NT), count)
        for i, (above, below) in enumerate(split(x, m) for x in found):
            found[i] = unite(above, jnp.where(parted, new[i].reshape(below.shape), below))
    below = iota((size, size), 0) - iota((size, size), 1)
    own = [jnp.sum(x * wide_k, axis=1, keepdims=True) for x in wide]  # the largest: not rounded
    own = [jnp.where(below == 0, x, 0.0) for x in own]
    return [jnp.where(below > 0, x, y) for x, y in zip(found, own, strict=True)]


def read(rows: list[jax.Array], state: jax.Array, decays: Decays) -> list[jax.Array]:
    """As `chunk.read`."""
    dtype = rows[0].dtype
    decayed = [(x.astype(jnp.float32) * decays.since).astype(dtype) for x in rows]
    found = matmul(jnp.concatenate(decayed), state.astype(dtype), NN)
    return jnp.split(found, len(rows))


def score(q: jax.Array, k: jax.Array, state: jax.Array, decays: Decays) -> Scored:
    """As `chunk.score`, without the scale."""
    (weights,), (carried,) = pairs([q], k, decays), read([q], state, decays)
    return Scored(weights.astype(q.dtype), carried)
