"""The arithmetic of attention over one tile of keys, on values. Knows nothing of refs or DMAs.

Logarithms are to base 2 throughout: a softmax needs exp2 only, and exp is exp2 and a product.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from ragged_attention.layout import LANES

LOG2_E = 1.4426950408889634
SUBLANES = 8
UNSEEN = -1e30  # logit of a key that is not seen
NARROW = jnp.float8_e4m3fn
MOST = 8  # its numbers go beyond 2^8
PART = 16.0  # it has 4 bits: what it leaves of a number is less than a 16th
F32_BITS, BIAS = 23, 127  # where the exponent of f32 begins, and what stands for 0
FLOOR = -1e29  # what `top` starts from: so far above UNSEEN that such a key's weight is 0


class Softmax(NamedTuple):
    """What queries know so far, as rows or as columns.

    Attributes:
      top: [rows, 128], lanes equal, or [8, columns], sublanes equal: the largest logit.
      total: likewise, sum of the weights, relative to `top`.
      o: [rows, value width] or [value width, columns] sum of the weighted values, likewise.
    """

    top: jax.Array
    total: jax.Array
    o: jax.Array


def line(count: int, axis: int) -> tuple[int, int]:
    """The shape of `count` along an axis."""
    return (count, 1) if axis == 0 else (1, count)


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


def blank(sink: jax.Array | None, shape: tuple[int, ...], sums: tuple[int, ...]) -> Softmax:
    """What queries know that have seen nothing, or their sinks only; shapes of `top` and `o`."""
    if sink is None:
        top, total = jnp.full(shape, FLOOR, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        sink = jnp.broadcast_to(sink * LOG2_E, shape)
        top = jnp.maximum(sink, FLOOR)
        total = jnp.exp2(sink - top)
    return Softmax(top, total, jnp.zeros(sums, jnp.float32))


def logits(
    q: jax.Array, k: jax.Array, factor: jax.Array, soft_cap: float | None, columns: bool
) -> jax.Array:
    """[rows, keys], or [keys, columns], to base 2.

    q is [rows, key lanes] and `factor` is applied here; or q is `halves` of q times factor, which
    use the depth of the matrix unit that a narrow head leaves idle.
    """
    split = q.shape[1] == 2 * k.shape[1]
    k = jnp.concatenate([k, k], axis=1) if split else k
    if k.dtype == NARROW:
        q, unit = normal(q.astype(jnp.float32))
        s = narrow_dot(q, k, (1, 1), 2) * (unit * factor)
    else:
        s = dot(k, q, (1, 1)) if columns else dot(q, k, (1, 1))
        s = s if split else s * factor
    return s if soft_cap is None else (soft_cap * LOG2_E) * jnp.tanh(s)


# Products of float8, which take half the passes of bfloat16. The other operand is f32, and is taken
# apart into numbers of 4 bits; those are few rows more for a matrix unit that has to load the keys.


def normal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows x within 2^MOST, and the powers of two [rows, 1] that they have been divided by."""
    bits = lax.bitcast_convert_type(jnp.max(jnp.abs(x), axis=1, keepdims=True), jnp.int32)
    # The exponent of 1 is BIAS; the least of a normal number is 1.
    exponent = jnp.maximum((bits >> F32_BITS) + 1 - MOST, 1)
    unit, inverse = (
        lax.bitcast_convert_type(e << F32_BITS, jnp.float32)
        for e in (exponent, 2 * BIAS - exponent)
    )
    return x * inverse, unit


def narrow_dot(x: jax.Array, y: jax.Array, contract: tuple[int, int], parts: int) -> jax.Array:
    """[rows, ..] f32 from x [rows, n] f32 within 2^MOST, 4 bits in every part, and float8 y."""
    rows, rest, found = len(x), x, []
    for _ in range(parts):
        part = rest.astype(NARROW).astype(jnp.float32)
        rest = (rest - part) * PART
        found.append(part)
    products = dot(jnp.concatenate(found, axis=0).astype(NARROW), y, contract)
    each = (products[i * rows : (i + 1) * rows] * PART**-i for i in range(parts))
    return functools.reduce(jnp.add, each)


def weighted(weights: jax.Array, scale: jax.Array | None, v: jax.Array) -> jax.Array:
    """[rows, value width] sum of weights [rows, keys] times values [keys, value width].

    With scales of the values, [1, keys] f32, weights times scales are multiplied as `halves`, one
    above the other, so that they are not rounded once more.
    """
    if scale is None:
        return dot(weights, v, (1, 0))
    scaled = weights.astype(jnp.float32) * scale
    if v.dtype == jnp.float32:
        return dot(scaled, v, (1, 0))
    both = jnp.concatenate([half.astype(jnp.float32) for half in halves(scaled)], axis=0)
    o = dot(both.astype(v.dtype), v, (1, 0))
    return o[: len(scaled)] + o[len(scaled) :]


def fold(state: Softmax, s: jax.Array, v: jax.Array, scale: jax.Array | None = None) -> Softmax:
    """Takes keys into account: logits s [rows, keys], values v [keys, value width] and scales."""
    top = jnp.maximum(state.top, jnp.max(s, axis=1, keepdims=True))
    fade = jnp.exp2(state.top - top)
    if v.dtype == NARROW:
        weights = jnp.exp2(s - wide(top - MOST, s.shape[1]))
        o = narrow_dot(weights, v, (1, 0), 3) * 2.0**-MOST
        total = jnp.sum(weights, axis=1, keepdims=True) * 2.0**-MOST
    else:
        weights = jnp.exp2(s - wide(top, s.shape[1])).astype(v.dtype)
        o = weighted(weights, scale, v)
        total = jnp.sum(weights.astype(jnp.float32), axis=1, keepdims=True)
    return Softmax(top, state.total * fade + total, state.o * wide(fade, o.shape[1]) + o)


def finish(state: Softmax) -> tuple[jax.Array, jax.Array]:
    """Output rows, 0 where nothing was seen, and the natural logarithm of the softmax's sum."""
    inverse, lse = inverse_and_lse(state)
    return state.o * wide(inverse, state.o.shape[1]), lse


def inverse_and_lse(state: Softmax) -> tuple[jax.Array, jax.Array]:
    """1 / total, 0 where nothing was seen, and the natural logarithm of the softmax's sum."""
    inverse = jnp.where(state.total == 0, 0.0, 1 / state.total)
    lse = jnp.where(state.total == 0, -jnp.inf, (state.top + jnp.log2(state.total)) / LOG2_E)
    return inverse, lse


# Columns.


def turned(v: jax.Array) -> jax.Array:
    """[value width + 16, keys] bf16 from values [keys, value width]; the last rows are ones."""
    return jnp.concatenate([v.T, jnp.ones((2 * SUBLANES, v.shape[0]), v.dtype)], axis=0)


def look(state: Softmax, s: jax.Array) -> Softmax:
    """The same relative to the largest of logits s [keys, columns], if that is larger."""
    top = jnp.maximum(state.top, jnp.max(s, axis=0, keepdims=True))
    fade = jnp.exp2(state.top - top)
    return Softmax(top, state.total * fade, state.o * fade[:1])


def add(state: Softmax, s: jax.Array, v: jax.Array) -> tuple[Softmax, jax.Array]:
    """Takes keys into account, with weights relative to what was the largest logit before them.

    Args:
      state: what columns know.
      s: [keys, columns] logits.
      v: [value width + 16, keys] values, `turned`.

    Returns:
      What they know then, and how far above the largest logit was: [8, columns].
    """
    width = v.shape[0] - 2 * SUBLANES
    weights = jnp.exp2(s - state.top[:1]).astype(v.dtype)
    sums = dot(v, weights, (1, 0))
    far = jnp.max(s, axis=0, keepdims=True) - state.top
    rise = jnp.maximum(far, 0.0)
    fade = jnp.exp2(-rise)
    total = (state.total + sums[width : width + SUBLANES]) * fade
    o = (state.o + sums[:width]) * fade[:1]
    return Softmax(state.top + rise, total, o), far


def select(chosen: jax.Array, a: Softmax, b: Softmax) -> Softmax:
    """State `a` of the chosen columns [8, columns], `b` of others."""

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        some = chosen if x.shape == chosen.shape else jnp.broadcast_to(chosen[:1], x.shape)
        return jnp.where(some, x, y)

    return Softmax(*(one(x, y) for x, y in zip(a, b, strict=True)))


def finish_columns(state: Softmax, scale: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """As `finish`: rows, of a type, and times a scale."""
    inverse, lse = inverse_and_lse(state)
    o = (state.o * (inverse * scale)[:1]).astype(dtype)
    return o.T, jnp.concatenate([lse] * (LANES // SUBLANES), axis=0).T
