"""Weighted sums of rows that indices choose, specified.

    out[t] = sum_k weights[t, k] * x[indices[t, k]]

A term counts if its index is a row of x, its weight (times the scale of the row, where rows have
scales) is not 0 and, where `valid` is given, it is valid. Terms that do not count are 0 whatever x
holds there: NaN and infinities do not leak, not even into gradients, and a token without any term
is exactly 0. Everything is float32 inside. The order of the sum is that of `tree_sum`: neighbours
are added in pairs, then the sums of neighbours, an odd one out waits.

Source: the unpermute-and-combine step of mixture-of-experts layers, as in MegaBlocks (arXiv
2211.15841) and DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

LANES = 128
WORD = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of a narrow float type in 32-bit words, as `pack_columns` makes them.

    The columns are cut into as many equal parts as a word has elements, after zeros up to a
    multiple of 128 words; word c holds column c of each part, the first part lowest. Half as many
    bytes are gathered as from bfloat16 rows in HBM, two of which share a word.

    Attributes:
      words: [rows, words] int32.
      hidden_size: columns.
      dtype: name of the float type, "bfloat16" or "float8_e4m3fn".
    """

    words: jax.Array
    hidden_size: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def parts(self) -> int:
        """Elements in a word."""
        return WORD // jnp.dtype(self.dtype).itemsize


def pack_columns(x: jax.Array) -> PackedRows:
    """Rows x [rows, hidden_size] of bfloat16 or float8_e4m3fn as words; see `PackedRows`.

    One pass over x. A producer that computes each of the `column_parts` by itself, up to
    `pack_parts`, has the words without another one.
    """
    return pack_parts(column_parts(x, x.dtype), x.shape[1])


def column_parts(x: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
    """The parts of x [rows, hidden_size], in any type, that share the words of rows of `dtype`."""
    parts = WORD // jnp.dtype(dtype).itemsize
    words = -(-x.shape[1] // (parts * LANES)) * LANES
    if parts * words != x.shape[1]:
        x = jnp.pad(x, ((0, 0), (0, parts * words - x.shape[1])))
    return [x[:, n * words : (n + 1) * words] for n in range(parts)]


def pack_parts(parts: Sequence[jax.Array], hidden_size: int) -> PackedRows:
    """Rows of `hidden_size` columns from their `column_parts` [rows, words] in a narrow type."""
    kind = jnp.dtype(parts[0].dtype)
    bits = [lax.bitcast_convert_type(part, f"uint{8 * kind.itemsize}") for part in parts]
    shifted = [b.astype(jnp.uint32) << (n * 8 * kind.itemsize) for n, b in enumerate(bits)]
    words = functools.reduce(jnp.bitwise_or, shifted)
    return PackedRows(lax.bitcast_convert_type(words, jnp.int32), hidden_size, kind.name)


def unpack_columns(packed: PackedRows) -> jax.Array:
    """The rows [rows, hidden_size] that were packed."""
    kind = jnp.dtype(packed.dtype)
    words = lax.bitcast_convert_type(packed.words, jnp.uint32)
    shifted = [words >> (n * 8 * kind.itemsize) for n in range(packed.parts)]
    bits = [s.astype(f"uint{8 * kind.itemsize}") for s in shifted]
    rows = jnp.concatenate([lax.bitcast_convert_type(b, kind) for b in bits], axis=1)
    return rows[:, : packed.hidden_size]


def take(x: jax.Array | PackedRows, indices: jax.Array) -> jax.Array:
    """Some rows of x, float32."""
    if not isinstance(x, PackedRows):
        return x[indices].astype(jnp.float32)
    return unpack_columns(dataclasses.replace(x, words=x.words[indices])).astype(jnp.float32)


def tree_sum(terms: Sequence[jax.Array]) -> jax.Array:
    """The sum, neighbours first: ((0 + 1) + (2 + 3)) + 4 of five terms."""
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[0::2], terms[1::2], strict=False)]
        terms = [*pairs, *terms[len(pairs) * 2 :]]
    return terms[0]


def counts(indices: jax.Array, weights: jax.Array | None, num_rows: int) -> jax.Array:
    """[tokens, top_k] which terms count; indices of terms that are not valid are -1."""
    found = (indices >= 0) & (indices < num_rows)
    return found if weights is None else found & (weights != 0)


def factors_of(
    indices: jax.Array, weights: jax.Array | None, row_scales: jax.Array | None
) -> jax.Array | None:
    """[tokens, top_k] float32 that rows are multiplied by, or None for 1.

    Scales of rows that are not chosen are selected away as the rows are: they may be anything.
    """
    factors = None if weights is None else weights.astype(jnp.float32)
    if row_scales is None or not row_scales.shape[0]:
        return factors
    counted = counts(indices, weights, row_scales.shape[0])
    scales = jnp.where(counted, row_scales[jnp.where(counted, indices, 0)], 0.0)
    return scales if factors is None else factors * scales


def gather_reduce(
    x: jax.Array | PackedRows,
    indices: jax.Array,
    weights: jax.Array | None = None,
    valid: jax.Array | None = None,
    *,
    row_scales: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """The sums [tokens, hidden_size]; see the top of this file.

    Args:
      x: [rows, hidden_size] float32 or bfloat16, or `PackedRows`.
      indices: [tokens, top_k] int32.
      weights: [tokens, top_k] float, or None for 1.
      valid: [tokens, top_k] bool, or None.
      row_scales: [rows] float32 that rows are multiplied by, or None. A scale and a weight are
        multiplied with each other first.
      out_dtype: that of x by default, bfloat16 for packed rows.
    """
    packed = isinstance(x, PackedRows)
    rows, hidden_size = (x.words.shape[0], x.hidden_size) if packed else x.shape
    kind = jnp.dtype(out_dtype or (jnp.bfloat16 if packed else x.dtype))
    tokens, top_k = indices.shape
    if not tokens or not rows or not top_k:
        return jnp.zeros((tokens, hidden_size), kind)
    if valid is not None:
        indices = jnp.where(valid, indices, -1)
    factors = factors_of(indices, weights, row_scales)
    counted = counts(indices, factors, rows)

    def term(k: int) -> jax.Array:
        """Selected before it is multiplied, so that gradients are clean as well."""
        counts_here = counted[:, k, None]
        row = take(x, jnp.where(counted[:, k], indices[:, k], 0))
        row = jnp.where(counts_here, row, 0.0)
        return row if factors is None else row * jnp.where(counts_here, factors[:, k, None], 0.0)

    return tree_sum([term(k) for k in range(top_k)]).astype(kind)
