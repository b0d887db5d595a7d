"""Rows that can travel one by one: values of a token packed into 32-bit words, and back.

A DMA moves single rows of 32-bit words, but not of narrower types, whose rows share words. So the
4 (or 2) values that share a word come from one row: word w of lane block b holds lane w of the
blocks 4b to 4b + 3 (2b and 2b + 1). A tail of 128 words carries what belongs to the row, such as
the scale of quantised values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from fused_moe.dispatch import LANES, SCALE
from reference.fused_moe import quantise

Ref = Any


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """Rows of `width` values.

    Attributes:
      width: values of a row, a multiple of 512.
      dtype: of the values, bfloat16 or float8_e4m3fn.
      tailed: whether a tail is behind the values.
    """

    width: int
    dtype: Any
    tailed: bool

    @property
    def per_word(self) -> int:
        """Values in a word."""
        return 4 // jnp.dtype(self.dtype).itemsize

    @property
    def words(self) -> int:
        """Words of values."""
        return self.width // self.per_word

    @property
    def row_words(self) -> int:
        """Words in all."""
        return self.words + LANES * self.tailed

    @property
    def scaled(self) -> bool:
        """Whether a row has a scale."""
        return self.per_word == 4

    def blocks(self) -> Iterator[tuple[slice, list[slice]]]:
        """Every block of 128 words, and the blocks of values that are in it."""
        for start in range(0, self.words, LANES):
            first = start * self.per_word
            parts = [
                slice(first + i * LANES, first + (i + 1) * LANES) for i in range(self.per_word)
            ]
            yield slice(start, start + LANES), parts

    def pack(self, values: list[jax.Array]) -> jax.Array:
        """Blocks of float32 values [R, 128], already scaled, as a block of words."""
        words = jnp.zeros(values[0].shape, jnp.uint32)
        for i, x in enumerate(values):
            if self.scaled:
                codes = pltpu.bitcast(x.astype(self.dtype), jnp.int8).astype(jnp.int32)
                bits = lax.bitcast_convert_type(codes, jnp.uint32) & jnp.uint32(0xFF)
            else:
                rounded = x.astype(self.dtype).astype(jnp.float32)
                bits = lax.bitcast_convert_type(rounded, jnp.uint32) >> jnp.uint32(16)
            words |= bits << jnp.uint32(i * 32 // self.per_word)
        return words

    def unpack(self, words: jax.Array) -> list[jax.Array]:
        """A block of words [R, 128] as blocks of values of the format's type."""
        if self.scaled:
            bits = [words >> jnp.uint32(8 * i) for i in range(4)]
            return [pltpu.bitcast(x.astype(jnp.int8), self.dtype) for x in bits]
        low, high = words << jnp.uint32(16), words & jnp.uint32(0xFFFF0000)
        return [lax.bitcast_convert_type(x, jnp.float32).astype(self.dtype) for x in (low, high)]

    def store(self, read: Callable[[slice], jax.Array], target: Ref, tail: jax.Array) -> None:
        """Packs rows, quantised if the format is.

        Args:
          read: gives a block of 128 values of the rows, float32.
          target: [R, row_words] words.
          tail: [R, 128] int32; the scale is put into it.
        """
        scale = inverse = None
        if self.scaled:
            parts = [jnp.abs(read(part)) for _, parts in self.blocks() for part in parts]
            scale = row_scale(jnp.max(largest(parts), axis=1, keepdims=True), self.dtype)
            inverse = 1 / scale
        for place, parts in self.blocks():
            values = [read(part) for part in parts]
            if inverse is not None:
                values = [narrow(x * inverse, self.dtype) for x in values]
            target[:, place] = self.pack(values)
        if self.tailed:
            if scale is not None:
                bits = lax.bitcast_convert_type(scale, jnp.int32)
                tail = jnp.where(lanes(tail.shape) == SCALE, bits, tail)
            target[:, self.words :] = lax.bitcast_convert_type(tail, jnp.uint32)

    def packed(self, x: jax.Array, tails: jax.Array) -> jax.Array:
        """`store` in plain JAX: rows x [R, width] and their tails [R, 128] int32 as words."""
        kind = jnp.uint8 if self.scaled else jnp.uint16
        if self.scaled:
            x, scale = quantise(x, self.dtype)
            bits = lax.bitcast_convert_type(scale, jnp.int32)
            tails = jnp.where(lanes(tails.shape) == SCALE, bits, tails)
        codes = lax.bitcast_convert_type(x.astype(self.dtype), kind).astype(jnp.uint32)
        found = []
        for _, parts in self.blocks():
            words = jnp.zeros((x.shape[0], LANES), jnp.uint32)
            for i, part in enumerate(parts):
                words |= codes[:, part] << jnp.uint32(i * 32 // self.per_word)
            found.append(words)
        if self.tailed:
            found.append(lax.bitcast_convert_type(tails, jnp.uint32))
        return jnp.concatenate(found, axis=1)

    def load(
        self, source: Ref, wanted: jax.Array | None = None
    ) -> Iterator[tuple[slice, jax.Array]]:
        """The blocks of values of packed rows, in the format's type and without their scale.

        Args:
          source: [R, row_words] words.
          wanted: [R, 1]; rows that are not are 0.
        """
        for place, parts in self.blocks():
            words = source[:, place]
            if wanted is not None:
                words = jnp.where(wanted, words, jnp.uint32(0))
            yield from zip(parts, self.unpack(words), strict=True)

    def tail(self, source: Ref) -> jax.Array:
        """The tails [R, 128] int32 of packed rows."""
        return lax.bitcast_convert_type(source[:, self.words :], jnp.int32)


def lanes(shape: tuple[int, ...]) -> jax.Array:
    """The number of each lane."""
    return lax.broadcasted_iota(jnp.int32, shape, 1)


def largest(parts: list[jax.Array]) -> jax.Array:
    """The largest element of several arrays, element by element; NaN if one of them is."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        odd = parts[-1:] if len(parts) % 2 else []
        parts = [jnp.maximum(a, b) for a, b in pairs] + odd
    return parts[0]


def row_scale(amax: jax.Array, dtype: Any) -> jax.Array:
    """The scale of rows with this largest element, as `reference.fused_moe.quantise` has it."""
    return jnp.where(amax == 0, 1.0, amax * (1 / float(jnp.finfo(dtype).max)))


def narrow(x: jax.Array, dtype: Any) -> jax.Array:
    """Scaled values within the range of a narrow type, still float32."""
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -most, most)


def scale_of(tail: jax.Array) -> jax.Array:
    """The scale [R, 1] in a tail."""
    return pick(tail, SCALE)


def pick(tail: jax.Array, lane: Any) -> jax.Array:
    """One lane of a tail as float32 [R, 1]."""
    values = lax.bitcast_convert_type(tail, jnp.float32)
    return jnp.sum(jnp.where(lanes(tail.shape) == lane, values, 0.0), axis=1, keepdims=True)
