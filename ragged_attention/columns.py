"""Blocks of many queries: a query is a column, and no logit is kept.

A weight is taken relative to the largest logit that its query knew before the chunk, so that it is
made as its logit leaves the matrix unit; any common factor of weights and their sum cancels. Before
its first chunk a query looks at a few keys. A query whose chunk has a logit far above, whose weight
might overflow, leaves the chunk out and takes it afterwards, looking first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ragged_attention import flash
from ragged_attention.chunks import Chunk, Strip
from ragged_attention.flash import UNSEEN
from ragged_attention.plan import Style
from ragged_attention.rows import Rows
from ragged_attention.schedule import Noted
from tpukit.buffers import repeat

FAR = 32.0  # to base 2: weights stay below 2^32, and a value may be as large as 2^90


@dataclasses.dataclass(frozen=True)
class Columns(Rows):
    """How columns meet keys."""

    def columns(self, record: Noted, chunk: Chunk, style: Style) -> None:
        """All heads' columns meet a chunk."""
        index = self.chunk_index(chunk)

        # A strip's logits are made before the strip before is done if matrix units can hold both.
        ahead = 0 if chunk.size == self.plan.chunk else 1

        def add(strip: Strip, s: jax.Array, v: jax.Array) -> None:
            old = self.columns_of(strip.head, strip.rows)
            new, far = flash.add(old, s, v)
            self.vmem.far[index, strip.head, :, strip.rows] = far
            near = far <= FAR  # not so where it is NaN
            self.keep_columns(strip.head, strip.rows, flash.select(near, new, old))

        def some(heads: list[Any]) -> None:
            masks: dict[Any, jax.Array] = {}
            made: list[tuple[Strip, jax.Array, jax.Array]] = []
            for head in heads:
                k = self.keys_of(head, chunk, style)
                v = flash.turned(self.values_of(record, head, chunk, style))
                for columns in style.strips:
                    strip = Strip(head, *columns)
                    made.append((strip, self.logits(record, chunk, style, strip, k, masks), v))
                    if len(made) > ahead:
                        add(*made.pop(0))
            for one in made:
                add(*one)

        self.some_heads(style, some, whole=chunk.doubtful == chunk.size)

    def look(self, record: Noted, slot: jax.Array, style: Style) -> None:
        """Before the first tile: columns know the largest logit of some keys that they see."""
        size = self.plan.chunk if self.problem.windowed else self.layout.group
        chunk = Chunk(slot, 0, size, 0, 0)

        def some(heads: list[Any]) -> None:
            masks: dict[Any, jax.Array] = {}
            for head in heads:
                k = self.keys_of(head, chunk, style)
                for columns in style.strips:
                    strip = Strip(head, *columns)
                    s = self.logits(record, chunk, style, strip, k, masks)
                    blank = self.blank_columns(head, strip.rows, style)
                    self.keep_columns(head, strip.rows, flash.look(blank, s))

        self.some_heads(style, some)

    def catch_up(self, record: Noted, slot: jax.Array, style: Style, chunks: jax.Array) -> None:
        """Columns that left out one of the tile's first `chunks` chunks take it."""
        count = next(iter(style.strips))[1]
        strips = style.rows // count

        def check(i: jax.Array) -> None:
            far = self.vmem.far[i, :, :, : style.rows]
            some = jnp.max(jnp.where(far <= FAR, 0, 1)) > 0
            chunk = Chunk(slot, i * self.plan.chunk, self.plan.chunk, 0, 0)
            heads = self.layout.kv_heads
            pl.when(some)(lambda: repeat(heads * strips, lambda n: take(n, chunk)))

        def take(n: jax.Array, chunk: Chunk) -> None:
            head, begin = n // strips, pl.multiple_of(n % strips * count, count)
            strip = Strip(head, begin, count)
            s = self.logits(record, chunk, style, strip, self.keys_of(head, chunk, style), {})
            near = self.vmem.far[self.chunk_index(chunk), head, :, strip.rows] <= FAR
            s = jnp.where(jnp.broadcast_to(near[:1], s.shape), UNSEEN, s)
            v = flash.turned(self.values_of(record, head, chunk, style))
            new, _ = flash.add(flash.look(self.columns_of(head, strip.rows), s), s, v)
            self.keep_columns(head, strip.rows, new)

        repeat(chunks, check)

    def chunk_index(self, chunk: Chunk) -> Any:
        """Number of a chunk in its tile."""
        return chunk.begin >> (self.plan.chunk.bit_length() - 1)
