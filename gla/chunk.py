"""Chunk form on values: many tokens of one request at once. Knows nothing of memory.

For row i of a chunk with state S before it, log decays g and b_i = g_first + ... + g_i:

    o_i  = scale * ( sum_{j <= i} e^(b_i - b_j) (q_i . k_j) v_j  +  e^(b_i) q_i S )
    S'   = e^(b_last) S + sum_j e^(b_last - b_j) k_j v_j

Only differences of b with a sum of decays on the way from j to i occur, so no exponent is positive.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# A computation that yields where what follows waits for what went before; it returns its result.
type Stages[T] = Generator[None, None, T]
NN = ((1,), (0,))
NT = ((1,), (1,))


class Decays(NamedTuple):
    """Decay factors of one head over a window of W rows; zero or irrelevant outside the chunk.

    Attributes:
      within: [W, W] scale * e^(b_i - b_j) for j <= i, else 0.
      since: [W, 1 or value_dim] scale * e^(b_i).
      until: [W, 1 or key_dim] e^(b_last - b_j).
      whole: [1, 1 or value_dim] e^(b_last).
    """

    within: jax.Array
    since: jax.Array
    until: jax.Array
    whole: jax.Array


class Scored(NamedTuple):
    """One head half way: what is left is `weights @ v + carried`."""

    weights: jax.Array  # [W, W]
    carried: jax.Array  # [W, value_dim] f32


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """int32 index along `axis`."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def matmul(
    a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]
) -> jax.Array:
    """f32 product; f32 operands keep f32 precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def pairs(rows: list[jax.Array], k: jax.Array, decays: Decays) -> list[jax.Array]:
    """Of each of `rows` [W, key_dim] the products with decayed keys up to their own, [W, W] f32."""
    found = jnp.split(matmul(jnp.concatenate(rows), k, NT), len(rows))
    return [x * decays.within for x in found]


def read(rows: list[jax.Array], state: jax.Array, decays: Decays) -> list[jax.Array]:
    """Of each of `rows` the products with the decayed state, [W, value_dim] f32."""
    found = matmul(jnp.concatenate(rows), state.astype(rows[0].dtype), NN)
    return [x * decays.since for x in jnp.split(found, len(rows))]


def score(q: jax.Array, k: jax.Array, state: jax.Array, decays: Decays) -> Scored:
    """Weights of the chunk's own tokens and the contribution of the state before it.

    Args:
      q, k: [W, key_dim]; rows of k outside the chunk are 0.
      state: [key_dim, value_dim] f32.
      decays: of this head.
    """
    (weights,), (carried,) = pairs([q], k, decays), read([q], state, decays)
    return Scored(weights.astype(q.dtype), carried)


def finish(
    k: jax.Array,
    v: jax.Array,
    state: jax.Array,
    decays: Decays,
    scored: Scored | None,
    keeps: bool = True,
) -> tuple[jax.Array | None, jax.Array | None]:
    """What is left of a chunk: its output and the state after it.

    Both are products with v, which is loaded into the matrix unit once.

    Args:
      k: [W, key_dim].
      v: [W, value_dim].
      state: [key_dim, value_dim] f32 before the chunk.
      decays: of this head.
      scored: what `score` found; None where there is no output.
      keeps: whether the state advances.

    Returns:
      The output [W, value_dim] f32 or None, the state [key_dim, value_dim] f32 or None.
    """
    left = [] if scored is None else [scored.weights]
    if keeps:
        left.append((k.astype(jnp.float32) * decays.until).astype(k.dtype).T)
    both = matmul(jnp.concatenate(left, axis=0), v, NN)
    o = None if scored is None else both[: k.shape[0]] + scored.carried
    return o, state * decays.whole + both[-k.shape[1] :] if keeps else None
