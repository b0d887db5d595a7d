"""The way home: what came back for each token is added up, in the order of slots, in float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fused_moe.dispatch import Layout
from fused_moe.plan import ROWS
from fused_moe.plumbing import IO_DEPTH, Plumbing, divide, repeat, rows, start, wait_rows
from fused_moe.rows import lanes, scale_of
from tpukit.buffers import Index, Stream


@dataclasses.dataclass(frozen=True)
class Combine(Plumbing):
    """Blocks of up to plan.tile tokens; a block takes one slot of its tokens after another."""

    @property
    def blocks(self) -> int:
        """How many."""
        return -(-self.problem.num_tokens // self.plan.tile)

    def count(self, block: Index) -> jax.Array:
        """Tokens of a block."""
        left = self.problem.num_tokens - block * self.plan.tile
        return pl.multiple_of(jnp.minimum(left, self.plan.tile), ROWS)

    @property
    def brought(self) -> Stream:
        """Slot by slot, what a block's tokens got back."""

        def copies(index: Index, slot: jax.Array) -> list[Any]:
            block, j = divide(index, self.problem.slots)
            count = self.count(block)
            first = j * self.problem.num_tokens + block * self.plan.tile
            target = rows(self.vmem.out.at[slot], 0, count)
            source = rows(self.hbm.returned, first, count)
            return [pltpu.make_async_copy(source, target, self.vmem.sems.load.at[slot])]

        return Stream(copies, 2, lambda index: jnp.int32(index) < self.blocks * self.problem.slots)

    def run(self) -> None:
        """Waits for the results of other devices and adds up all blocks."""
        returns = self.vmem.books.own[Layout.RETURNS]
        wait_rows(self.hbm.returned, self.vmem.sems.home.at[0], returns)
        brought = self.brought
        repeat(2, brought.start)

        def block(b: jax.Array) -> None:
            count = self.count(b)
            marks = rows(self.vmem.marks, 0, count)
            tails = rows(self.hbm.tails, b * self.plan.tile, count)
            start(tails, marks, self.vmem.sems.load.at[2])
            wait_rows(self.hbm.tails, self.vmem.sems.load.at[2], count)

            def take(j: Index, first: bool) -> None:
                index = b * self.problem.slots + j
                brought.wait(index)
                self.add(j, brought.slot(index), count, first=first)
                brought.start(index + 2)

            take(0, first=True)
            repeat(self.problem.slots - 1, lambda j: take(j + 1, first=False))
            self.store(b, count)

        repeat(self.blocks, block)

    def add(self, j: Index, slot: jax.Array, count: jax.Array, *, first: bool) -> None:
        """Adds slot j of a block's tokens, where it brought anything."""
        fmt, top_k = self.problem.rows_back, self.problem.top_k

        def group(i: jax.Array) -> None:
            words = rows(self.vmem.out.at[slot], i * ROWS, ROWS)
            tail = rows(self.vmem.marks, i * ROWS, ROWS)[...]
            y = rows(self.vmem.y, i * ROWS, ROWS)
            there = self.brought_by(tail, j) | (j == top_k)
            scale = jnp.where(there, scale_of(fmt.tail(words)), 0.0) if fmt.scaled else None
            for part, values in fmt.load(words, there):
                values = values.astype(jnp.float32)
                values = values if scale is None else values * scale
                y[:, part] = values if first else y[:, part] + values

        repeat(count // ROWS, group)

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

    def store(self, block: jax.Array, count: jax.Array) -> None:
        """Writes a block of the output."""
        groups = count // ROWS

        def copies(group: Index, slot: jax.Array) -> list[Any]:
            first = block * self.plan.tile + group * ROWS
            target = rows(self.hbm.output, first, ROWS)
            return [
                pltpu.make_async_copy(self.vmem.io.at[slot], target, self.vmem.sems.store.at[slot])
            ]

        out = Stream(copies, IO_DEPTH, lambda group: (group >= 0) & (group < groups))

        def step(group: jax.Array) -> None:
            out.wait(group - IO_DEPTH)
            y = rows(self.vmem.y, group * ROWS, ROWS)
            self.vmem.io[out.slot(group)] = y[...].astype(self.problem.dtype)
            out.start(group)

        repeat(groups, step)
        repeat(IO_DEPTH, lambda i: out.wait(groups - IO_DEPTH + i))
