"""What a block meets of a tile: keys, values, and which query sees which key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ragged_attention import flash
from ragged_attention.blocks import Blocks
from ragged_attention.flash import UNSEEN, iota
from ragged_attention.layout import LANES
from ragged_attention.plan import Style, heads_at_once
from ragged_attention.schedule import Noted
from tpukit.buffers import repeat


class Chunk(NamedTuple):
    """Keys of a record's tile that are computed together.

    Attributes:
      slot: the tile's buffer.
      begin: the first of them in the tile.
      size: keys that are computed.
      full: at least so many of them are the tile's.
      doubtful: from this one on queries may not see them.
    """

    slot: jax.Array
    begin: Any
    size: int
    full: int
    doubtful: int


class Strip(NamedTuple):
    """Rows of a head, or columns, that are computed together: `count`, from `begin` on."""

    head: Any
    begin: Any
    count: int

    @property
    def rows(self) -> pl.Slice:
        """Where they are."""
        return pl.ds(self.begin, self.count)


@dataclasses.dataclass(frozen=True)
class Chunks(Blocks):
    """What is computed with, for rows and for columns alike."""

    def some_heads(
        self, style: Style, action: Callable[[list[Any]], None], *, whole: bool = False
    ) -> None:
        """action(heads) for all of them, as many together as are unrolled."""
        heads = self.layout.kv_heads
        step = heads_at_once(style, self.layout, self.plan, whole=whole)
        if step == heads:
            action(list(range(heads)))
        else:
            repeat(heads // step, lambda i: action([i * step + h for h in range(step)]))

    def words(self, window: Any, head: Any, chunk: Chunk) -> jax.Array:
        """Words of a head's keys or values, in the order of `CacheLayout.place`."""
        groups = pl.ds(self.whole_group(chunk.begin), self.whole_group(chunk.size))

        def lanes(first: Any, count: int) -> jax.Array:
            words = self.vmem.tiles[chunk.slot, groups, :, pl.ds(first, count)]
            return words.reshape(-1, count)

        if self.layout.words_per_row == 1:
            lane = window.lane(head)
            lane = lane if isinstance(lane, int) else pl.multiple_of(lane, LANES)
            return lanes(lane, window.width)
        rank, block = self.layout.value_dim, LANES // self.layout.pack
        halves = [lanes(0, rank), lanes(rank, rank)]
        if window.width > rank:
            rotated = lanes(2 * rank, LANES)
            halves = [
                jnp.concatenate([half, self.own_rotated(rotated, i)], axis=1)
                for i, half in enumerate(halves)
            ]
        count = len(halves[0])
        parts = [x[first : first + block] for first in range(0, count, block) for x in halves]
        return jnp.concatenate(parts, axis=0)

    def own_rotated(self, words: jax.Array, half: int) -> jax.Array:
        """A token's rotated part without that of its row's other token, which may be NaN."""
        moved = pltpu.roll(words, LANES // 2, 1) if half else words
        return jnp.where(iota(words.shape, 1) < LANES // 2, moved, 0)

    def operand(self, style: Style) -> Any:
        """Type of keys and values as they are multiplied."""
        return jnp.dtype(self.layout.dtype) if style.narrow else self.problem.compute_dtype

    def keys_of(self, head: Any, chunk: Chunk, style: Style) -> jax.Array:
        """[size, key lanes]."""
        words = self.words(self.layout.keys, head, chunk)
        return flash.unpacked(words, self.layout.dtype, self.operand(style))

    def values_of(self, record: Noted, head: Any, chunk: Chunk, style: Style) -> jax.Array:
        """[size, value lanes]; zeros behind the tile's last key, where anything may lie."""
        pack = self.layout.pack
        words = self.words(self.layout.vals, head, chunk)
        if chunk.full < chunk.size:
            sure = chunk.full // pack
            rows = (record.span - chunk.begin + pack - 1) >> (pack.bit_length() - 1)
            last = words[sure:]
            place = self.layout.place(sure + iota((len(last), 1), 0), pack)
            last = jnp.where(place < rows, last, 0)
            words = jnp.concatenate([words[:sure], last], axis=0) if sure else last
        return flash.unpacked(words, self.layout.dtype, self.operand(style))

    def key_factor(self, head: Any, chunk: Chunk) -> jax.Array:
        """What q . k is multiplied by; [1, size] where rows have scales.

        NaN where that of the value is not finite, for the reason that `layout.contained` has.
        """
        factor = self.factor(head)
        if self.problem.k_scales:
            factor *= self.scales_of(self.vmem.k_scales, head, *chunk[:3])
        if self.problem.v_scales:
            v = self.scales_of(self.vmem.v_scales, head, *chunk[:3])
            factor = jnp.where(jnp.isfinite(v), factor, jnp.nan)
        return factor

    def value_scales(self, head: Any, chunk: Chunk) -> jax.Array | None:
        """[1, size] scales of a head's values, if rows have some; 0 where they are not finite."""
        if not self.problem.v_scales:
            return None
        v = self.scales_of(self.vmem.v_scales, head, *chunk[:3])
        return jnp.where(jnp.isfinite(v), v, 0.0)

    def logits(
        self, record: Noted, chunk: Chunk, style: Style, strip: Strip, k: jax.Array, masks: dict
    ) -> jax.Array:
        """[rows, keys], or [keys, columns]; `masks` keeps those of strips of other heads."""
        q = self.vmem.scaled[strip.head, strip.rows, : k.shape[1] * (1 + style.split)]
        factor = self.key_factor(strip.head, chunk)
        s = flash.logits(q, k, factor, self.problem.soft_cap, style.columns)
        if chunk.doubtful == chunk.size:
            return s
        axis, count = style.keys_axis, strip.count
        distinct = min(count, max(style.tokens, LANES)) if style.columns else count
        begin = 0 if style.columns else strip.begin % style.tokens  # whole blocks are columns
        if (begin, distinct) not in masks:
            masks[begin, distinct] = self.seen(record, chunk, style, begin, distinct)

        def masked(x: jax.Array, first: int) -> jax.Array:
            part = lax.slice_in_dim(x, first, first + distinct, axis=1 - axis)
            return jnp.where(masks[begin, distinct], part, UNSEEN)

        doubtful = lax.slice_in_dim(s, chunk.doubtful, chunk.size, axis=axis)
        parts = [masked(doubtful, first) for first in range(0, count, distinct)]
        doubtful = jnp.concatenate(parts, axis=1 - axis)
        if chunk.doubtful == 0:
            return doubtful
        return jnp.concatenate([lax.slice_in_dim(s, 0, chunk.doubtful, axis=axis), doubtful], axis)

    def seen(self, record: Noted, chunk: Chunk, style: Style, begin: int, count: int) -> jax.Array:
        """Whether `count` queries, from token `begin` on, see the doubtful keys; as `logits`."""
        keys, axis = chunk.size - chunk.doubtful, style.keys_axis
        shape = (keys, count) if style.columns else (count, keys)
        place = self.layout.place(chunk.doubtful + iota(flash.line(keys, axis), axis))
        key = record.key + chunk.begin + place
        token = (begin + iota(flash.line(count, 1 - axis), 1 - axis)) & (style.tokens - 1)
        query = record.position + token
        seen = jnp.broadcast_to(key < record.key + record.span, shape)
        if self.problem.causal:
            before = key <= query
            if self.problem.tree:
                drafts = record.is_tree == 1
                ancestor = self.ancestor(record, style, begin, count, key)
                before = (before & ~drafts) | (ancestor & drafts)
            seen &= before
        if self.problem.windowed:
            seen &= (key > query - record.window) | (record.window == 0)
        return seen

    def ancestor(
        self, record: Noted, style: Style, begin: int, count: int, key: jax.Array
    ) -> jax.Array:
        """Whether a key is a token's ancestor, or before the request's queries."""
        distinct = min(count, style.tokens)
        place = (record.row & 7) + begin
        words = self.vmem.tree[self.block_slot(record), pl.ds(place, distinct)]
        if count > distinct:
            words = jnp.concatenate([words] * (count // distinct), axis=0)
        words = words.T if style.columns else words
        low, high = (lax.slice_in_dim(words, i, i + 1, axis=style.keys_axis) for i in (0, 1))
        draft = key - record.first
        draft = jnp.broadcast_to(draft, jnp.broadcast_shapes(draft.shape, low.shape))
        word = jnp.where(draft < 32, low, high)
        bit = lax.shift_right_logical(word, draft & 31) & 1
        return (draft < 0) | (bit == 1)
