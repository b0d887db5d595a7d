"""Blocks of few queries, and of float32: a query is a row, and its logits are a row of keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from ragged_attention import flash
from ragged_attention.chunks import Chunk, Chunks, Strip
from ragged_attention.plan import Style
from ragged_attention.schedule import FIRST, Noted


@dataclasses.dataclass(frozen=True)
class Rows(Chunks):
    """How rows meet keys."""

    def rows(self, record: Noted, chunk: Chunk, style: Style) -> None:
        """All heads' rows meet a chunk."""

        def some(heads: list[Any]) -> None:
            strips = [Strip(h, *rows) for h in heads for rows in style.strips]
            self.row_strips(record, chunk, style, strips)

        self.some_heads(style, some)

    def row_strips(self, record: Noted, chunk: Chunk, style: Style, strips: list[Strip]) -> None:
        """Strips; the logits of one are made while the strip before is folded in."""
        masks: dict[Any, jax.Array] = {}
        keys: dict[int, jax.Array] = {}
        values: dict[int, jax.Array] = {}
        scales: dict[int, Any] = {}

        def once(cache: dict[int, Any], key: Any, make: Any) -> Any:
            if id(key) not in cache:
                cache[id(key)] = make(key)
            return cache[id(key)]

        def fold(strip: Strip, s: jax.Array) -> None:
            head, rows = strip.head, strip.rows
            state = self.known(head, rows, style, opens)
            v = once(values, head, lambda h: self.values_of(record, h, chunk, style))
            scale = once(scales, head, lambda h: self.value_scales(h, chunk))
            state = flash.fold(state, s, v, scale)
            for ref, new in zip(self.vmem.rows, state, strict=True):
                ref[head, rows] = new

        opens = record.has(FIRST) & (chunk.begin == 0)
        before = None
        for strip in strips:
            k = once(keys, strip.head, lambda h: self.keys_of(h, chunk, style))
            s = self.logits(record, chunk, style, strip, k, masks)
            if before is not None:
                fold(*before)
            before = strip, s
        if before is not None:
            fold(*before)
