"""The arithmetic of attention over one tile of keys, on values. Knows nothing of refs or DMAs.

Logarithms are to base 2 throughout: a softmax needs exp2 only, and exp is exp2 and a product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from ragged_attention.layout import LANES

LOG2_E = 1.4426950408889634
UNSEEN = -1e30  # logit of a key that is not seen
FLOOR = -1e29  # what `top` starts from: so far above UNSEEN that such a key's weight is 0


class Softmax(NamedTuple):
    """What a row knows so far; [rows, 128] lanes are equal but in o.

    Attributes:
      top: the largest logit.
      total: sum of the weights, relative to `top`.
      o: [rows, value width] sum of the weighted values, likewise.
    """

    top: jax.Array
    total: jax.Array
    o: jax.Array


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """int32 places along an axis."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A matrix product with f32 sums; products of f32 are exact to f32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def unpacked(words: jax.Array, dtype: Any, compute: Any) -> jax.Array:
    """Rows of keys or values from words [rows, lanes] int32, as they are multiplied."""
    return pltpu.bitcast(words, dtype).astype(compute)


def wide(column: jax.Array, width: int) -> jax.Array:
    """[rows, 128] of equal lanes as [rows, width]."""
    if width <= LANES:
        return column[:, :width]
    return jnp.concatenate([column] * (width // LANES), axis=1)


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bf16 arrays that sum to x, f32, to 16 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def logits(q: jax.Array, k: jax.Array, factor: jax.Array, soft_cap: float | None) -> jax.Array:
    """[rows, keys] to base 2.

    q is [rows, key lanes] and `factor` is applied here; or q is `halves` of q times factor, which
    use the depth of the matrix unit that a narrow head leaves idle.
    """
    if q.shape[1] == 2 * k.shape[1]:
        s = dot(q, jnp.concatenate([k, k], axis=1), (1, 1))
    else:
        s = dot(q, k, (1, 1)) * factor
    return s if soft_cap is None else (soft_cap * LOG2_E) * jnp.tanh(s)


def fold(state: Softmax, s: jax.Array, v: jax.Array, compute: Any, sum_by_matmul: bool) -> Softmax:
    """Takes a tile into account: logits s [rows, keys], values v [keys, value width]."""
    top = jnp.maximum(state.top, jnp.max(s, axis=1, keepdims=True))
    weights = jnp.exp2(s - wide(top, s.shape[1])).astype(compute)
    fade = jnp.exp2(state.top - top)
    if sum_by_matmul:  # a column of ones in lanes that the matrix unit has to spare
        width = v.shape[1]
        o = dot(weights, jnp.concatenate([v, jnp.ones_like(v[:, :LANES])], axis=1), (1, 0))
        o, total = o[:, :width], o[:, width:]
    else:
        o = dot(weights, v, (1, 0))
        total = jnp.sum(weights.astype(jnp.float32), axis=1, keepdims=True)
    return Softmax(top, state.total * fade + total, state.o * wide(fade, o.shape[1]) + o)


def finish(state: Softmax) -> tuple[jax.Array, jax.Array]:
    """Output rows, 0 where nothing was seen, and the natural logarithm of the softmax's sum."""
    inverse = jnp.where(state.total == 0, 0.0, 1 / state.total)
    lse = jnp.where(state.total == 0, -jnp.inf, (state.top + jnp.log2(state.total)) / LOG2_E)
    return state.o * wide(inverse, state.o.shape[1]), lse
