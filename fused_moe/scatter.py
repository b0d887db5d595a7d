"""The way out: lists to all devices, own tokens packed once, one row to each device that needs it.

Rows leave in the order in which the devices will use them: those that their first experts need go
first, to all devices, then those of the second experts, and so on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fused_moe.dispatch import Layout
from fused_moe.plumbing import (
    IO_DEPTH,
    Plumbing,
    Ref,
    divide,
    each,
    row,
    rows,
    start,
    total,
    wait,
    wait_rows,
)
from fused_moe.spec import ROWS
from tpukit.buffers import Index, Stream, repeat


@dataclasses.dataclass(frozen=True)
class Scatter(Plumbing):
    """Steps of the way out, in the order in which they are taken."""

    def pack_tokens(self) -> None:
        """Packs the own tokens into their place among the received ones."""
        blocks = self.problem.num_tokens // ROWS
        loads, stores = self.token_blocks(blocks)
        repeat(IO_DEPTH - 1, loads.start)

        def step(block: jax.Array) -> None:
            loads.start(block + IO_DEPTH - 1)
            loads.wait(block)
            stores.wait(block - IO_DEPTH)
            slot = loads.slot(block)
            tokens = self.vmem.io.at[slot]
            self.problem.rows_out.store(
                lambda part: tokens[:, part].astype(jnp.float32),
                self.packed(slot),
                self.vmem.tails[slot],
            )
            stores.start(block)

        repeat(blocks, step)
        repeat(IO_DEPTH, lambda i: stores.wait(blocks - IO_DEPTH + i))

    def packed(self, slot: jax.Array) -> Ref:
        """Where a block of tokens is packed, in the buffers of tiles."""
        return rows(self.vmem.words.at[slot & 1], (slot >> 1) * ROWS, ROWS)

    def token_blocks(self, blocks: int) -> tuple[Stream, Stream]:
        """Blocks of tokens and tails coming in, and of packed rows going out."""
        sems, first = self.vmem.sems, self.me * self.problem.num_tokens

        def loads(block: Index, slot: jax.Array) -> list[Any]:
            pairs = [(self.hbm.tokens, self.vmem.io), (self.hbm.tails, self.vmem.tails)]
            return [
                pltpu.make_async_copy(
                    rows(source, block * ROWS, ROWS), target.at[slot], sems.load.at[slot]
                )
                for source, target in pairs
            ]

        def stores(block: Index, slot: jax.Array) -> list[Any]:
            place = rows(self.hbm.received, first + block * ROWS, ROWS)
            return [pltpu.make_async_copy(self.packed(slot), place, sems.store.at[slot])]

        def exists(block: Index) -> jax.Array:
            return (jnp.int32(block) >= 0) & (block < blocks)

        return Stream(loads, IO_DEPTH, exists), Stream(stores, IO_DEPTH, exists)

    def send_lists(self) -> None:
        """Sends each device the head for it, and the rows that hold its entries."""
        layout, own = self.problem.layout, self.vmem.books.own
        local, sent, heads, entries = (self.vmem.sems.lists.at[i] for i in range(4))

        def part(array: Ref, first: jax.Array, count: int) -> Ref:
            return array.at[pl.ds(first * count, count)]

        def send(i: jax.Array) -> None:
            device = self.other(i)
            head = part(self.hbm.own_heads, device, layout.head_rows)
            self.send(head, part(self.hbm.heads, self.me, layout.head_rows), sent, heads, device)
            begin, end = self.span(own[Layout.SEGMENTS + device], own[Layout.SEGMENTS + device + 1])

            def send_row(r: jax.Array, _: None) -> None:
                there = row(self.hbm.entries, self.me * layout.entry_rows + r)
                self.send(row(self.hbm.own_entries, r), there, sent, entries, device)

            lax.fori_loop(begin, end, send_row, None)

        start(
            part(self.hbm.own_heads, self.me, layout.head_rows),
            part(self.hbm.heads, self.me, layout.head_rows),
            local,
        )
        start(self.hbm.own_entries, part(self.hbm.entries, self.me, layout.entry_rows), local)
        if self.problem.num_devices > 1:
            repeat(self.problem.num_devices - 1, send)
        wait(part(self.hbm.heads, self.me, layout.head_rows), local)
        wait(self.hbm.own_entries, local)

    def send_tokens(self) -> None:
        """Sends every own token once to each other device that has experts of it."""
        own, layout = self.vmem.books.own, self.problem.layout
        first = self.me * self.problem.num_tokens

        def send(i: jax.Array) -> None:
            expert, way = divide(own[layout.send_keys + i], self.problem.num_devices)
            packed = row(self.hbm.received, first + own[layout.send_tokens + i])
            arrived = self.vmem.sems.arrived.at[expert]
            self.send(packed, packed, self.vmem.sems.sent.at[0], arrived, self.other(way))

        each(jnp.int32(0), own[Layout.SENDS], send)

    def receive_lists(self) -> None:
        """Waits for what the other devices have sent."""
        layout, books = self.problem.layout, self.vmem.books
        local, sent, heads, entries = (self.vmem.sems.lists.at[i] for i in range(4))
        others = self.problem.num_devices - 1
        wait_rows(self.hbm.heads, heads, jnp.int32(others * layout.head_rows))
        start(self.hbm.heads, books.heads, local)
        wait(self.hbm.heads, local)

        def arriving(i: jax.Array) -> jax.Array:
            device = self.other(i)
            first, end = self.head(device, 0), self.head(device, 2 * layout.experts)
            begin, end = self.span(first, end)
            return end - begin

        def leaving(i: jax.Array) -> jax.Array:
            place = Layout.SEGMENTS + self.other(i)
            begin, end = self.span(books.own[place], books.own[place + 1])
            return end - begin + layout.head_rows

        wait_rows(self.hbm.entries, entries, total(others, arriving))
        wait_rows(self.hbm.entries, sent, total(others, leaving))

    def finish(self) -> None:
        """Waits until the own tokens have left."""
        sends = self.vmem.books.own[Layout.SENDS]
        wait_rows(self.hbm.received, self.vmem.sems.sent.at[0], sends)
