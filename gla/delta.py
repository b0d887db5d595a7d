"""The delta rule, on values: a token writes what its key does not recall yet. Knows no memory.

    S' = a S + k^T u        u = beta (v - k (a S))        o = scale * q S'

So it is gated linear attention whose values are u instead of v. In a chunk, u_i depends on the u_j
before it: with the products A_ij = k_i e^(b_i - b_j) k_j of the chunk form,

    (I + N) u = beta (v - e^(b) k S)        N_ij = beta_i A_ij for j < i, else 0

The two halves of I + N are inverted without iterations: blocks of BLOCK rows by substitution; then
two blocks become one, [[X, 0], [-Y L X, Y]] being the inverse of [[A, 0], [L, B]] where X, Y are
those of A, B. What the first half wrote is then taken from what the second one misses.

Sources: DeltaNet by chunks (arXiv 2406.06484), Gated DeltaNet (2412.06464), Kimi Linear
(2510.26692).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gla.channel import split, unite
from gla.chunk import NN, Scored, Stages, iota, matmul
from gla.tables import LANES, spread

BLOCK = 16


def precise(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """f32 product of f32 matrices, each as two terms of `dtype` if that is narrower."""
    if dtype == jnp.float32:
        return matmul(a, b, NN)
    (a_high, a_low), (b_high, b_low) = (terms(x, dtype) for x in (a, b))
    both = matmul(jnp.concatenate([a_high, a_low]), b_high, NN)
    return both[: len(a)] + both[len(a) :] + matmul(a_high, b_low, NN)


def terms(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """X as a sum, up to 2^-17 of it."""
    high = x.astype(dtype)
    return high, (x - high.astype(jnp.float32)).astype(dtype)


def invert_blocks(n: jax.Array) -> jax.Array:
    """(I + D)^-1 for the blocks D of BLOCK rows on the diagonal of n [W, W], 0 above it."""
    size = n.shape[0]
    lane = iota((BLOCK, size), 1)
    packed = n[:BLOCK]  # lanes of a block hold its rows
    for row in range(BLOCK, size, BLOCK):
        packed = jnp.where(lane >= row, n[row : row + BLOCK], packed)
    width = max(size, LANES)
    if size < width:
        packed = jnp.concatenate([packed, jnp.zeros((BLOCK, width - size), n.dtype)], axis=1)
    lane = iota(packed.shape, 1)
    first = lane & -BLOCK
    inverse = jnp.where(iota(packed.shape, 0) == lane - first, 1.0, 0.0)
    for j in range(BLOCK - 1):
        column = jnp.take_along_axis(packed, first + j, axis=1, mode="promise_in_bounds")
        inverse -= column * inverse[j : j + 1]
    inverse, first = inverse[:, :size], first[:, :size]
    blocks = [jnp.where(first == row, inverse, 0.0) for row in range(0, size, BLOCK)]
    return jnp.concatenate(blocks, axis=0)


def invert(matrices: list[jax.Array], width: int, dtype: jnp.dtype) -> Stages[list[jax.Array]]:
    """(I + D)^-1 for the blocks D of `width` rows on the diagonal of each matrix, 0 elsewhere.

    Args:
      matrices: [W, W] f32, 0 on and above the diagonal.
      width: BLOCK times a power of two.
      dtype: of the operands.
    """
    size = matrices[0].shape[0]
    inverses, m = [invert_blocks(n) for n in matrices], BLOCK
    yield
    apart = iota((size, size), 0) ^ iota((size, size), 1)
    while m < width:

        def below(x: jax.Array, m: int = m) -> jax.Array:
            return split(x, m)[1].reshape(size // 2, -1)

        between = below((apart >= m) & (apart < 2 * m))
        lower = [jnp.where(between, below(n), 0.0) for n in matrices]
        products = [precise(x, y, dtype) for x, y in zip(lower, inverses, strict=True)]
        yield
        products = [x.reshape(-1, m, size) for x in products]
        products = [unite(jnp.zeros_like(x), x) for x in products]
        changes = [precise(below(x), y, dtype) for x, y in zip(inverses, products, strict=True)]
        for i, change in enumerate(changes):
            first, second = split(inverses[i], m)
            inverses[i] = unite(first, second - change.reshape(first.shape))
        yield
        m *= 2
    return inverses


def written(
    v: list[jax.Array], recalled: list[jax.Array], products: list[jax.Array], beta: list[jax.Array]
) -> Stages[list[jax.Array]]:
    """What a chunk's tokens write, per head u [W, value_dim] in the type of v.

    Args:
      v: [W, value_dim]; rows outside the chunk are 0.
      recalled: [W, value_dim] f32 e^(b) k S.
      products: [W, W] f32 A_ij for j <= i.
      beta: [W, 1], 0 outside the chunk.
    """
    shape, dtype = products[0].shape, v[0].dtype
    below = iota(shape, 0) > iota(shape, 1)
    lower = [jnp.where(below, a * b, 0.0) for a, b in zip(products, beta, strict=True)]
    missing = [(x.astype(jnp.float32) - y) * b for x, y, b in zip(v, recalled, beta, strict=True)]
    yield
    half = shape[0] // 2
    inverses = yield from invert(lower, half, dtype)
    inverses = [x.astype(dtype) for x in inverses]
    first = [
        matmul(x[:half], y.astype(dtype), NN).astype(dtype)
        for x, y in zip(inverses, missing, strict=True)
    ]
    yield
    known = [
        matmul(x[half:].astype(dtype), jnp.concatenate([u, jnp.zeros_like(u)]), NN)
        for x, u in zip(lower, first, strict=True)
    ]
    yield
    rest = [(x[half:] - y).astype(dtype) for x, y in zip(missing, known, strict=True)]
    second = [
        matmul(x[half:], jnp.concatenate([jnp.zeros_like(y), y]), NN).astype(dtype)
        for x, y in zip(inverses, rest, strict=True)
    ]
    return [jnp.concatenate(both) for both in zip(first, second, strict=True)]


def decode_token(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: jax.Array,
    decay: jax.Array,
    beta: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As `recurrent.decode_token`; beta: [1, 1]."""
    q, k = (spread(x, v.shape[1]) for x in (q, k))
    state = decay * state
    state += k * (beta * (v - jnp.sum(k * state, axis=0, keepdims=True)))
    return jnp.sum(q * state, axis=0, keepdims=True), state


def score(
    fields: list[tuple[jax.Array, jax.Array, jax.Array, Any]],
    v: list[jax.Array],
    beta: list[jax.Array],
    form: Any,
) -> Stages[tuple[list[Scored], list[jax.Array]]]:
    """Per head what `chunk.score` gives, without the scale, and what its tokens write.

    Args:
      fields: per head q, k, the state before and its decays, as of `chunk.score`.
      v, beta: see `written`.
      form: `gla.chunk` or `gla.channel`, whose decays they are.
    """
    products = [form.pairs([q, k], k, decays) for q, k, _, decays in fields]
    read = [form.read([q, k], state, decays) for q, k, state, decays in fields]
    scored = [
        Scored(weights.astype(v[0].dtype), carried)
        for (weights, _), (carried, _) in zip(products, read, strict=True)
    ]
    recalled = [of_keys for _, of_keys in read]
    u = yield from written(v, recalled, [of_keys for _, of_keys in products], beta)
    return scored, u
