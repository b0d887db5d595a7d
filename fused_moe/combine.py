"""The way home: what came back for each token is added up, in the order of slots, in float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from fused_moe.dispatch import Layout
from fused_moe.plumbing import IO_DEPTH, Plumbing, Ref, divide, rows, wait_rows
from fused_moe.rows import lanes, scale_of
from fused_moe.spec import ROWS
from tpukit.buffers import Index, Stream, repeat


@dataclasses.dataclass(frozen=True)
class Combine(Plumbing):
    """Blocks of ROWS tokens; a block takes one slot of its tokens after another."""

    @property
    def blocks(self) -> int:
        """How many."""
        return self.problem.num_tokens // ROWS

    @property
    def brought(self) -> Stream:
        """Slot by slot, what a block's tokens got back, through the buffers of results."""
        pieces = self.blocks * self.problem.slots

        def copies(index: Index, slot: jax.Array) -> list[Any]:
            block, j = divide(index, self.problem.slots)
            source = rows(self.hbm.returned, j * self.problem.num_tokens + block * ROWS, ROWS)
            done = self.vmem.sems.brought.at[slot]
            return [pltpu.make_async_copy(source, self.piece(slot), done)]

        return Stream(copies, self.plan.pieces, lambda index: jnp.int32(index) < pieces)

    def piece(self, slot: jax.Array) -> Ref:
        """Where rows of one slot of a block arrive."""
        return rows(self.vmem.out.at[slot & 1], (slot >> 1) * ROWS, ROWS)

    @property
    def tails(self) -> Stream:
        """The tails of a block's tokens."""

        def copies(block: Index, slot: jax.Array) -> list[Any]:
            source, done = rows(self.hbm.tails, block * ROWS, ROWS), self.vmem.sems.load.at[slot]
            return [pltpu.make_async_copy(source, self.vmem.tails.at[slot], done)]

        return Stream(copies, IO_DEPTH, lambda block: jnp.int32(block) < self.blocks)

    @property
    def outputs(self) -> Stream:
        """Blocks of the output."""

        def copies(block: Index, slot: jax.Array) -> list[Any]:
            target, done = rows(self.hbm.output, block * ROWS, ROWS), self.vmem.sems.store.at[slot]
            return [pltpu.make_async_copy(self.vmem.io.at[slot], target, done)]

        return Stream(copies, IO_DEPTH, lambda block: jnp.int32(block) >= 0)

    def run(self) -> None:
        """Waits for the results of other devices and adds up all blocks."""
        brought, tails, outputs = self.brought, self.tails, self.outputs
        repeat(IO_DEPTH - 1, tails.start)
        returns = self.vmem.books.own[Layout.RETURNS]
        wait_rows(self.hbm.returned, self.vmem.sems.home.at[0], returns)
        repeat(self.plan.pieces, brought.start)

        def block(b: jax.Array) -> None:
            tails.start(b + IO_DEPTH - 1)
            tails.wait(b)
            tail = self.vmem.tails[tails.slot(b)]

            def take(j: Index, first: bool) -> None:
                index = b * self.problem.slots + j
                brought.wait(index)
                self.add(j, self.piece(brought.slot(index)), tail, first=first)
                brought.start(index + self.plan.pieces)

            take(0, first=True)
            repeat(self.problem.slots - 1, lambda j: take(j + 1, first=False))
            outputs.wait(b - IO_DEPTH)
            self.vmem.io[outputs.slot(b)] = self.vmem.y[:ROWS].astype(self.problem.dtype)
            outputs.start(b)

        repeat(self.blocks, block)
        repeat(IO_DEPTH, lambda i: outputs.wait(self.blocks - IO_DEPTH + i))

    def add(self, j: Index, words: Ref, tail: jax.Array, *, first: bool) -> None:
        """Adds slot j of a block's tokens, where it brought anything."""
        fmt, y = self.problem.rows_back, rows(self.vmem.y, 0, ROWS)
        there = self.brought_by(tail, j) | (j == self.problem.top_k)
        scale = jnp.where(there, scale_of(fmt.tail(words)), 0.0) if fmt.scaled else None
        for part, values in fmt.load(words, there):
            values = values.astype(jnp.float32)
            values = values if scale is None else values * scale
            y[:, part] = values if first else y[:, part] + values

    def brought_by(self, tail: jax.Array, j: Index) -> jax.Array:
        """[R, 1] whether slot j holds the last of a token's experts on its device."""
        layout, lane = self.problem.layout, lanes(tail.shape)
        in_slots = lane < self.problem.top_k
        mine = jnp.max(jnp.where(lane == j, tail, -(2**31)), axis=1, keepdims=True)
        known = (mine >= 0) & (mine < layout.num_experts)
        # floats divide exactly enough: ids are below 2**20, and half an id is added
        device = jnp.floor((mine.astype(jnp.float32) + 0.5) * (1 / layout.experts))
        first = device.astype(jnp.int32) * layout.experts
        later = in_slots & (tail > mine) & (tail < first + layout.experts)
        twin = in_slots & (tail == mine) & (lane < j)
        others = jnp.max((later | twin).astype(jnp.float32), axis=1, keepdims=True)
        return known & (others == 0)
