"""Chunk form with a decay per key channel, on values. Knows nothing of memory.

Here the decay is inside the product: with sums b_i = g_first + ... + g_i per channel c,

    weights_ij = sum_c q_ic k_jc e^(b_ic - b_jc)        for j <= i

To take it as a matrix product, the way from j to i is broken where the two part: let 2 m rows be
the smallest aligned block that has both. Then j is in its first half and i in its second, and

    e^(b_i - b_j) = e^(decays of the second half up to i) e^(decays of the first half after j)

So there is one product per size m = 1, 2, 4, ... of halves. Both exponents are sums of log decays:
none is positive and nothing cancels, whatever the decays. Sums within 8 rows, the sublanes of a
register, are a product with a constant matrix; longer ones are additions of registers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gla.chunk import NN, NT, Scored, iota, matmul

TILE = 8  # rows of a vector register
LOG2_E = 1.4426950408889634


class Decays(NamedTuple):
    """Decay factors of one head over a window of W rows; rows outside the chunk have decays of 1.

    Attributes:
      levels: per size m of halves [W, key_dim]: in a second half e^(its decays up to the row), in a
        first half e^(its decays after the row).
      since: [W, key_dim] e^(b_i).
      until: [W, key_dim] e^(b_last - b_j).
      whole: [key_dim, 1] e^(b_last).
    """

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
    """[4 * size, size] of 0 and 1: what `decays_of` has to add up within TILE rows.

    For each row: the decays between it and the middle of its 4 rows, of its 8 rows, those of its 8
    rows up to it, and those after it.
    """
    i, j = iota((size, size), 0), iota((size, size), 1)

    def upto(m: int) -> jax.Array:
        return (j <= i) & ((i ^ j) < m)

    def after(m: int) -> jax.Array:
        return (j > i) & ((i ^ j) < m)

    def to_middle(m: int) -> jax.Array:
        return (((i & m) != 0) & upto(m)) | (((i & m) == 0) & after(m))

    parts = (to_middle(2), to_middle(4), upto(TILE), after(TILE))
    return jnp.concatenate([jnp.where(part, 1.0, 0.0) for part in parts])


def decays_of(g: jax.Array, sums: jax.Array) -> Decays:
    """Factors of decays.

    Args:
      g: [W, key_dim] log decays, 0 outside the chunk.
      sums: `short_sums(W)` in f32, or in bf16 and twice side by side: for two terms of g, whose
        error is 2^-17 of the exponent.
    """
    size, key_dim = g.shape
    g = g * LOG2_E
    terms = g
    if sums.dtype != g.dtype:
        high = g.astype(sums.dtype)
        terms = jnp.concatenate([high, (g - high.astype(g.dtype)).astype(sums.dtype)])
    added = matmul(sums, terms, NN).reshape(4, size, key_dim)
    odd = (iota(g.shape, 0) & 1) != 0
    levels = [jnp.where(odd, g, 0.0), added[0], added[1]]
    upto, after, m = added[2], added[3], TILE  # within the aligned m rows around each row
    while m < size:
        (upto_1, upto_2), (after_1, after_2) = split(upto, m), split(after, m)
        levels.append(unite(after_1, upto_2))
        upto = unite(upto_1, upto_2 + upto_1[:, -1:])
        after = unite(after_1 + upto_2[:, -1:], after_2)
        m *= 2
    whole = jnp.broadcast_to(jnp.exp2(upto[-1:]), (TILE, key_dim)).T[:, :1]
    return Decays(tuple(map(jnp.exp2, levels)), jnp.exp2(upto), jnp.exp2(after), whole)


def pairs(rows: list[jax.Array], k: jax.Array, decays: Decays) -> list[jax.Array]:
    """As `chunk.pairs`; rows of k outside the chunk are 0."""
    size, count = k.shape[0], len(rows)
    apart = iota((size, size), 0) ^ iota((size, size), 1)  # m <= apart < 2 m: parted by m rows
    found = jnp.split(matmul(jnp.concatenate(rows), k, NT), count)
    wide = [x.astype(jnp.float32) for x in rows]
    wide_k = k.astype(jnp.float32)
    for level, factor in enumerate(decays.levels):
        m = 1 << level
        if m < TILE:
            a = jnp.concatenate([(x * factor).astype(k.dtype) for x in wide])
            new = jnp.split(matmul(a, (wide_k * factor).astype(k.dtype), NT), count)
            found = [jnp.where(apart >= m, x, y) for x, y in zip(new, found, strict=True)]
        else:
            keys = split(wide_k * factor, m)[0]
            queries = [split(x * factor, m)[1].reshape(size // 2, -1) for x in wide]
            a = jnp.concatenate([x.astype(k.dtype) for x in queries])
            b = unite(keys, jnp.zeros_like(keys)).astype(k.dtype)
            parted = split(apart, m)[1] >= m
            new = jnp.split(matmul(a, b, NT), count)
            for i, (above, below) in enumerate(split(x, m) for x in found):
                found[i] = unite(above, jnp.where(parted, new[i].reshape(below.shape), below))
    lower = iota((size, size), 0) >= iota((size, size), 1)
    return [jnp.where(lower, x, 0.0) for x in found]


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
