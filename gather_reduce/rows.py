"""Pure compute: rows as they lie in memory, to float32 and back. Knows nothing of transfers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu_sc as plsc

from reference.gather_reduce import tree_sum
from tpukit.compat import bitcast_lanes

HIGH = np.int32(-(1 << 16))
SIGN = np.int32(-(1 << 31))
E4M3_BITS = np.int32(0x7F << 20)  # exponent and mantissa where float32 has its lowest ones
E4M3_BIAS = np.float32(2.0**120)  # that makes up for the exponent's offset; exact


@dataclasses.dataclass(frozen=True)
class Format:
    """How rows lie in 32-bit words.

    Attributes:
      name: of it.
      parts: columns in a word, one of each part of the row.
      together: parts that are decoded together; of more, the values do not fit the registers.
      rows_per_word: 2 where neighbouring rows share a word, which is how XLA keeps bfloat16.
    """

    name: str
    parts: int = 1
    together: int = 1
    rows_per_word: int = 1


FLOAT32 = Format("float32")
BFLOAT16 = Format("bfloat16", rows_per_word=2)
PACKED_BFLOAT16 = Format("packed bfloat16", parts=2, together=2)
PACKED_FLOAT8 = Format("packed float8_e4m3fn", parts=4)
FORMATS = {f.name: f for f in (FLOAT32, BFLOAT16, PACKED_BFLOAT16, PACKED_FLOAT8)}


def as_float(word: jax.Array) -> jax.Array:
    """The bits of an int32 vector as float32."""
    return bitcast_lanes(word, jnp.float32)


def decode(kind: Format, word: jax.Array, shift: Any) -> list[jax.Array]:
    """The float32 values of a vector of words, for each part that is decoded together.

    Args:
      kind: the format.
      word: float32 for float32 rows, else int32.
      shift: what brings the value to the top: of a row that shares its words, of a part; else None.
    """
    if kind == FLOAT32:
        return [word]
    if kind == PACKED_BFLOAT16:
        return [as_float(word << 16), as_float(word & HIGH)]
    top = lax.shift_left(word, jnp.broadcast_to(shift, word.shape))
    return [as_float(top & HIGH)] if kind == BFLOAT16 else [e4m3(top)]


def e4m3(word: jax.Array) -> jax.Array:
    """The value of the float8_e4m3fn in the upper byte; its NaN, which has no encoding, is 480."""
    bits = (word & SIGN) | (lax.shift_right_logical(word, 4) & E4M3_BITS)
    return as_float(bits) * E4M3_BIAS


def weighted_sum(
    terms: Sequence[Sequence[jax.Array]], factors: Sequence[jax.Array] | None
) -> list[jax.Array]:
    """The sum over rows of each part, as `reference.gather_reduce.tree_sum` orders it.

    Args:
      terms: for each row its parts.
      factors: for each row its factor, or None.
    """
    if factors is not None:
        terms = [[x * f for x in parts] for parts, f in zip(terms, factors, strict=True)]
    return [tree_sum(part) for part in zip(*terms, strict=True)]


def as_pair(first: jax.Array, second: jax.Array) -> jax.Array:
    """Two float32 vectors, rounded to bfloat16, in the halves of words, the first lower."""
    both = plsc.pack(first, second, format=plsc.PackFormat.INTERLEAVED)
    return bitcast_lanes(both, jnp.int32)
