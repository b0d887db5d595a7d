"""A block of queries opens and closes: between layouts by token and by head.

Queries and outputs lie by token, [tokens, q_heads, dim]. A key/value head's rows are its query
heads one after another, each with all tokens of the block. Rows of 128 lanes in f32 stand between
the two: they are read and written with a stride.
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
from ragged_attention.plumbing import Plumbing
from ragged_attention.schedule import FIRST, Noted


@dataclasses.dataclass(frozen=True)
class Blocks(Plumbing):
    """What happens to a block before its first tile and after its last; `side` as in `Style`."""

    side: int

    def head_rows(self, style: Style, head: int) -> list[tuple[slice, Any]]:
        """Where rows of a head are: among its own, and in `staged` (by token, then query head)."""
        group, tokens, heads = self.problem.group, style.tokens, self.problem.q_heads
        if tokens == 1:
            return [(slice(0, group), slice(head * group, (head + 1) * group))]
        return [
            (slice(g * tokens, (g + 1) * tokens), pl.ds(head * group + g, tokens, stride=heads))
            for g in range(group)
        ]

    def open(self, record: Noted, style: Style) -> None:
        """Waits for the block's queries and prepares them; nothing has been seen."""
        for copy in self.block_copies(record):
            copy.wait()
        window, dim, tokens = self.layout.keys, self.layout.key_dim, style.tokens
        q = self.vmem.queries[self.block_slot(record), :tokens].astype(jnp.float32)
        for c, begin in enumerate(range(0, dim, LANES)):
            lanes = min(LANES, dim - begin)
            part = q[:, :, begin : begin + lanes].reshape(-1, lanes)
            self.vmem.staged[c, : len(part), :lanes] = part
        chunks = -(-dim // LANES)
        for h in range(self.layout.kv_heads):
            for own, staged in self.head_rows(style, h):
                parts = [self.vmem.staged[c, staged] for c in range(chunks)]
                x = self.widen(parts, dim, window.width, window.offset(h))
                if style.split:
                    x = flash.halves(x * self.factor(h))
                self.vmem.scaled[h, own, : x.shape[1]] = x.astype(self.problem.compute_dtype)

    def widen(self, parts: list[jax.Array], dim: int, width: int, offset: int) -> jax.Array:
        """Lanes of a head, at their place in its window, zeros beside them."""
        rows = len(parts[0])
        padding = [jnp.zeros((rows, LANES), jnp.float32)] * (width // LANES - len(parts))
        x = jnp.concatenate([*parts, *padding], axis=1)
        if dim % LANES:
            x = jnp.where(iota(x.shape, 1) < dim, x, 0.0)
        return pltpu.roll(x, offset, 1) if offset else x

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
        """Divides by the sums and starts to write the outputs."""
        slot, tokens = record.block & 1, style.tokens
        self.await_out(slot)
        window, dim = self.layout.vals, self.layout.value_dim
        chunks = [slice(begin, min(begin + LANES, dim)) for begin in range(0, dim, LANES)]
        found, unseen = [], record.has(FIRST) & (record.span == 0)
        for h in range(self.layout.kv_heads):
            o, lse = flash.finish(self.known(h, slice(0, style.rows), style, unseen))
            found.append(lse)
            o *= self.hbm.scales[1, h]
            if offset := window.offset(h):
                o = pltpu.roll(o, window.width - offset, 1)
            for own, staged in self.head_rows(style, h):
                for c, lanes in enumerate(chunks):
                    part = o[own, lanes.start : lanes.start + LANES]
                    self.vmem.staged[c, staged] = part
        rows = tokens * self.problem.q_heads
        shape = (tokens, self.problem.q_heads, -1)
        for c, lanes in enumerate(chunks):
            part = self.vmem.staged[c, :rows, : lanes.stop - lanes.start].reshape(shape)
            self.vmem.out[slot, :tokens, :, lanes] = part.astype(self.problem.dtype)
        if self.vmem.lse is not None:
            self.vmem.lse[slot, :tokens] = self.by_token(found, style)
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
