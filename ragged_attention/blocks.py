"""A block of queries opens and closes: between layouts by token and by head.

Queries and outputs lie by token, [tokens, q_heads, dim]. A key/value head's rows, or columns, are
its query heads one after another, each with all tokens of the block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ragged_attention import flash
from ragged_attention.flash import LOG2_E, SUBLANES, Softmax, iota
from ragged_attention.layout import LANES
from ragged_attention.plan import MANY, Problem, Style
from ragged_attention.schedule import FIRST, Noted
from ragged_attention.tiles import Tiles
from tpukit.buffers import repeat
from tpukit.chips import Chip

OPENED = 32  # tokens of a block of many that are laid out together when it opens
HIGH = -(2**16)  # the upper half of a word


@dataclasses.dataclass(frozen=True)
class Blocks(Tiles):
    """What happens to a block before its first tile and after its last."""

    chip: Chip

    def open(self, record: Noted, style: Style) -> None:
        """Waits for the block's queries, lays them out by head and scales them."""
        self.await_block(record)
        window, dim, group = self.layout.keys, self.layout.key_dim, self.problem.group

        def section(first: Any, count: int) -> None:
            queries = self.queries_of(record, style.tokens)
            q = self.by_head(queries[pl.ds(first, count)], style)
            for h in range(self.layout.kv_heads):
                x = q[h * group : (h + 1) * group].reshape(-1, dim)
                halves = flash.halves(x * self.factor(h)) if style.split else (x,)
                for i, half in enumerate(halves):
                    begin = i * window.width + window.offset(h)
                    half = half.astype(self.problem.compute_dtype)
                    for at, rows in self.pieces(style, first, count):
                        self.vmem.scaled[h, rows, begin : begin + dim] = half[at]

        self.sections(style, OPENED, section)

    def by_head(self, q: jax.Array, style: Style) -> jax.Array:
        """[q_heads, tokens, dim] f32 from queries [tokens, q_heads, dim]; of a token no axis."""
        if not in_words(self.problem, style):
            q = q.astype(jnp.float32)
            return q[0] if style.tokens == 1 else jnp.swapaxes(q, 0, 1)
        words = jnp.swapaxes(pltpu.bitcast(q, jnp.int32), 0, 1)  # of two heads
        halves = [pltpu.bitcast(x, jnp.float32) for x in (words << 16, words & HIGH)]
        return jnp.stack(halves, axis=1).reshape(-1, *words.shape[1:])

    def sections(self, style: Style, size: int, action: Callable[[Any, int], None]) -> None:
        """action(first token, tokens) for sections of a block, which are laid out one by one."""
        if style.columns and style.tokens > max(size, MANY):
            count = style.tokens // size
            repeat(count, lambda i: action(pl.multiple_of(i * size, size), size))
        else:
            action(0, style.tokens)

    def pieces(self, style: Style, first: Any, count: int) -> list[tuple[slice, Any]]:
        """A section's rows of a head, one query head after another, and where they are of all."""
        if count == style.tokens:
            return [(slice(0, style.rows), pl.ds(0, style.rows))]
        return [
            (slice(g * count, (g + 1) * count), pl.ds(g * style.tokens + first, count))
            for g in range(self.problem.group)
        ]

    def factor(self, head: Any) -> jax.Array:
        """What q . k is multiplied by: to base 2, or for the tanh of a soft cap."""
        cap = self.problem.soft_cap
        return self.hbm.scales[0, head] * (LOG2_E if cap is None else 1 / cap)

    def blank(self, head: Any, rows: pl.Slice, style: Style) -> Softmax:
        """What rows know that have seen nothing, or their sinks only."""
        shape, sink = (int(rows.size), LANES), None
        if self.hbm.sinks is not None and style.tokens == 1:
            first = head * self.problem.group + rows.start
            sink = self.hbm.sinks[first : first + rows.size]
        elif self.hbm.sinks is not None:
            each = (min(shape[0], style.tokens), LANES)
            sinks = [jnp.broadcast_to(x, each) for x in self.sinks_of(head, rows, style)]
            sink = jnp.concatenate(sinks, axis=0)
        return flash.blank(sink, shape, (shape[0], self.layout.vals.width))

    def sinks_of(self, head: Any, rows: pl.Slice, style: Style) -> list[jax.Array]:
        """[1, 128] of each query head of some rows, or columns."""
        first = head * self.problem.group
        heads = range(rows.start // style.tokens, -(-(rows.start + rows.size) // style.tokens))
        return [self.hbm.sinks[pl.ds(first + g, 1)] for g in heads]

    def known(self, head: Any, rows: pl.Slice, style: Style, opens: jax.Array) -> Softmax:
        """What rows know: nothing yet in the first tile, whatever the buffers hold."""
        blank = self.blank(head, rows, style)
        held = (ref[head, rows] for ref in self.vmem.rows)
        return Softmax(*(jnp.where(opens, new, old) for new, old in zip(blank, held, strict=True)))

    def blank_columns(self, head: Any, columns: pl.Slice, style: Style) -> Softmax:
        """What columns know that have seen nothing, or their sinks only."""
        count, sink = int(columns.size), None
        if self.hbm.sinks is not None:
            each = min(count, style.tokens)
            sinks = [flash.wide(x, each) for x in self.sinks_of(head, columns, style)]
            sink = jnp.concatenate(sinks, axis=1)
        return flash.blank(sink, (flash.SUBLANES, count), (self.layout.vals.width, count))

    def columns_of(self, head: Any, columns: pl.Slice) -> Softmax:
        """What columns know."""
        return Softmax(*(ref[head, :, columns] for ref in self.vmem.columns))

    def keep_columns(self, head: Any, columns: pl.Slice, state: Softmax) -> None:
        """Keeps what columns know."""
        for ref, new in zip(self.vmem.columns, state, strict=True):
            ref[head, :, columns] = new

    def found(self, head: int, rows: Any, style: Style, unseen: Any) -> tuple[jax.Array, jax.Array]:
        """Output rows of a head, and the logarithms of their sums, [rows, 128] of equal lanes."""
        scale = self.hbm.scales[1, head]
        if not style.columns:
            o, lse = flash.finish(self.known(head, rows, style, unseen))
            return o * scale, lse
        dtype = jnp.bfloat16 if in_words(self.problem, style) else jnp.float32
        return flash.finish_columns(self.columns_of(head, rows), scale, dtype)

    def close(self, record: Noted, style: Style) -> None:
        """Divides by the sums, lays out by token and starts to write the outputs."""
        slot, heads = self.out_slot(record), range(self.layout.kv_heads)
        self.await_out(slot)
        window, dim, unseen = self.layout.vals, self.layout.value_dim, record.has(FIRST)
        unseen &= record.span == 0

        words = in_words(self.problem, style)
        by_token = from_words if words else lambda o: jnp.swapaxes(o, 0, 1)

        def section(first: Any, count: int) -> None:
            outputs, sums = [], []
            for h in heads:
                for _, rows in self.pieces(style, first, count):
                    o, lse = self.found(h, rows, style, unseen)
                    o = pltpu.bitcast(o, jnp.int32) if words else o
                    if offset := window.offset(h):
                        o = pltpu.roll(o, window.width - offset, 1)
                    o, each = o[:, :dim], count // 2 if words else count
                    outputs.append(o if style.tokens == 1 else o.reshape(-1, each, dim))
                    sums.append(lse)
            o = jnp.concatenate(outputs, axis=0)
            o = o[None] if style.tokens == 1 else by_token(o)
            self.out_of(record, style.tokens)[pl.ds(first, count)] = o.astype(self.problem.dtype)
            if self.vmem.lse is not None:
                lse = jnp.concatenate(sums, axis=0).reshape(-1, count, LANES)
                self.vmem.lse[slot, pl.ds(first, count)] = self.by_token(lse)

        self.sections(style, LANES, section)
        self.start_out(record)

    def by_token(self, lse: jax.Array) -> jax.Array:
        """[tokens, lanes] from [q_heads, tokens, 128] of equal lanes."""
        shape = (lse.shape[1], self.problem.lse_lanes)
        lane = iota(shape, 1)
        out = jnp.zeros(shape, jnp.float32)
        for head in range(self.problem.q_heads):
            out = jnp.where(lane == head, flash.wide(lse[head], shape[1]), out)
        return out


def in_words(problem: Problem, style: Style) -> bool:
    """Whether a block's queries and outputs are laid out as words of two values: half as many."""
    whole = problem.q_heads % (2 * SUBLANES) == 0
    return style.columns and problem.dtype == jnp.bfloat16 and whole


def from_words(words: jax.Array) -> jax.Array:
    """[tokens, heads, dim] bf16 from words of two tokens each, [heads, tokens / 2, dim] int32."""
    heads = words.reshape(-1, 2, *words.shape[1:])
    one, other = heads[:, 0], heads[:, 1]
    even = (one & ~HIGH) | (other << 16)
    odd = lax.shift_right_logical(one, 16) | (other & HIGH)
    tokens = jnp.stack([jnp.swapaxes(x, 0, 1) for x in (even, odd)], axis=1)
    return pltpu.bitcast(tokens.reshape(-1, *tokens.shape[2:]), jnp.bfloat16)
