"""A block of queries opens and closes: between layouts by token and by head.

Queries and outputs lie by token, [tokens, q_heads, dim]. A key/value head's rows are its query
heads one after another, each with all tokens of the block.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ragged_attention import flash
from ragged_attention.flash import FLOOR, LOG2_E, Softmax, iota
from ragged_attention.layout import LANES
from ragged_attention.plan import Style
from ragged_attention.schedule import FIRST, Noted
from ragged_attention.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Blocks(Tiles):
    """What happens to a block before its first tile and after its last; `side` as in `Style`."""

    side: int

    def open(self, record: Noted, style: Style) -> None:
        """Waits for the block's queries, lays them out by head and scales them."""
        self.await_block(record)
        window, dim, group = self.layout.keys, self.layout.key_dim, self.problem.group
        rows = slice(0, style.rows)
        q = self.queries_of(record, style.tokens)[...].astype(jnp.float32)
        q = q[0] if style.tokens == 1 else jnp.swapaxes(q, 0, 1)
        for h in range(self.layout.kv_heads):
            x = q[h * group : (h + 1) * group].reshape(style.rows, dim)
            parts = flash.halves(x * self.factor(h)) if style.split else (x,)
            for i, part in enumerate(parts):
                begin = i * window.width + window.offset(h)
                part = part.astype(self.problem.compute_dtype)
                self.vmem.scaled[h, rows, begin : begin + dim] = part

    def factor(self, head: Any) -> jax.Array:
        """What q . k is multiplied by: to base 2, or for the tanh of a soft cap."""
        cap = self.problem.soft_cap
        return self.hbm.scales[0, head] * (LOG2_E if cap is None else 1 / cap)

    def blank(self, head: Any, rows: slice, style: Style) -> Softmax:
        """What rows know that have seen nothing, or their sinks only."""
        shape = (rows.stop - rows.start, LANES)
        nothing = jnp.zeros((shape[0], self.layout.vals.width), jnp.float32)
        if self.hbm.sinks is None:
            floor = jnp.full(shape, FLOOR, jnp.float32)
            return Softmax(floor, jnp.zeros(shape, jnp.float32), nothing)
        first = head * self.problem.group
        if style.tokens == 1:
            sink = self.hbm.sinks[first + rows.start : first + rows.stop]
        else:
            heads = range(rows.start // style.tokens, -(-rows.stop // style.tokens))
            each = min(shape[0], style.tokens)
            sink = jnp.concatenate(
                [
                    jnp.broadcast_to(self.hbm.sinks[pl.ds(first + g, 1)], (each, LANES))
                    for g in heads
                ],
                axis=0,
            )
        sink = sink * LOG2_E
        top = jnp.maximum(sink, FLOOR)
        return Softmax(top, jnp.exp2(sink - top), nothing)

    def known(self, head: Any, rows: slice, style: Style, opens: jax.Array) -> Softmax:
        """What rows know: nothing yet in the first tile, whatever the buffers hold."""
        blank = self.blank(head, rows, style)
        held = (ref[head, rows] for ref in (self.vmem.top, self.vmem.total, self.vmem.sum))
        return Softmax(*(jnp.where(opens, new, old) for new, old in zip(blank, held, strict=True)))

    def close(self, record: Noted, style: Style) -> None:
        """Divides by the sums, lays out by token and starts to write the outputs."""
        slot, tokens, group = self.out_slot(record), style.tokens, self.problem.group
        self.await_out(slot)
        window, dim = self.layout.vals, self.layout.value_dim
        outputs, sums, unseen = [], [], record.has(FIRST) & (record.span == 0)
        for h in range(self.layout.kv_heads):
            o, lse = flash.finish(self.known(h, slice(0, style.rows), style, unseen))
            o *= self.hbm.scales[1, h]
            if offset := window.offset(h):
                o = pltpu.roll(o, window.width - offset, 1)
            o = o[:, :dim]
            outputs.append(o if tokens == 1 else o.reshape(group, tokens, dim))
            sums.append(lse)
        o = jnp.concatenate(outputs, axis=0)
        o = o[None] if tokens == 1 else jnp.swapaxes(o, 0, 1)
        self.out_of(record, tokens)[...] = o.astype(self.problem.dtype)
        if self.vmem.lse is not None:
            self.vmem.lse[slot, :tokens] = self.by_token(sums, style)
        self.start_out(record)

    def by_token(self, found: list[jax.Array], style: Style) -> jax.Array:
        """[tokens, lanes] from each head's [rows, 128] of equal lanes."""
        shape = (style.tokens, self.problem.lse_lanes)
        lane = iota(shape, 1)
        out = jnp.zeros(shape, jnp.float32)
        for h, lse in enumerate(found):
            for g in range(self.problem.group):
                rows = lse[g * style.tokens : (g + 1) * style.tokens]
                head = h * self.problem.group + g
                out = jnp.where(lane == head, flash.wide(rows, shape[1]), out)
        return out
