"""The way out: tables to all devices, own tokens packed once, one row to each device that needs it.

Rows leave in the order in which the devices will use them: those that their first experts need go
first, to all devices, then those of the second experts, and so on.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fused_moe.dispatch import Table
from fused_moe.plan import ROWS
from fused_moe.plumbing import (
    IO_DEPTH,
    Plumbing,
    Ref,
    divide,
    each,
    repeat,
    row,
    rows,
    start,
    wait,
    wait_rows,
)
from tpukit.buffers import Index, Stream


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

        def loads(block: Index, slot: jax.Array) -> list[pltpu.AsyncCopyDescriptor]:
            pairs = [(self.hbm.tokens, self.vmem.io), (self.hbm.tails, self.vmem.tails)]
            return [
                pltpu.make_async_copy(
                    rows(source, block * ROWS, ROWS), target.at[slot], sems.load.at[slot]
                )
                for source, target in pairs
            ]

        def stores(block: Index, slot: jax.Array) -> list[pltpu.AsyncCopyDescriptor]:
            place = rows(self.hbm.received, first + block * ROWS, ROWS)
            return [pltpu.make_async_copy(self.packed(slot), place, sems.store.at[slot])]

        def exists(block: Index) -> jax.Array:
            return (block >= 0) & (block < blocks)

        return Stream(loads, IO_DEPTH, exists), Stream(stores, IO_DEPTH, exists)

    def send_tables(self) -> None:
        """Sends the own table to all other devices."""
        width = self.problem.table.width
        mine = self.hbm.tables.at[pl.ds(pl.multiple_of(self.me * width, width), width)]
        local, sent, received = (self.vmem.sems.table.at[i] for i in range(3))
        start(self.hbm.table.at[pl.ds(0, width)], mine, local)
        wait(mine, local)
        others = self.problem.num_devices - 1
        repeat(others, lambda i: self.send(mine, mine, sent, received, self.other(i)))

    def send_tokens(self) -> None:
        """Sends every own token once to each other device that has experts of it."""
        mine, table = self.vmem.books.mine, self.problem.table
        first = self.me * self.problem.num_tokens

        def send(i: jax.Array) -> None:
            expert, way = divide(mine[table.send_keys + i], self.problem.num_devices)
            packed = row(self.hbm.received, first + mine[table.send_tokens + i])
            arrived = self.vmem.sems.arrived.at[expert]
            self.send(packed, packed, self.vmem.sems.sent.at[0], arrived, self.other(way))

        each(jnp.int32(0), mine[Table.SENDS], send)

    def receive_tables(self) -> None:
        """Waits for the tables of all devices."""
        tables = self.vmem.sems.table
        for done in (tables.at[1], tables.at[2]):
            repeat(
                self.problem.num_devices - 1,
                lambda _, done=done: wait(
                    self.hbm.table.at[pl.ds(0, self.problem.table.width)], done
                ),
            )
        start(self.hbm.tables, self.vmem.books.tables, tables.at[0])
        wait(self.hbm.tables, tables.at[0])

    def finish(self) -> None:
        """Waits until the own tokens have left."""
        sends = self.vmem.books.mine[Table.SENDS]
        wait_rows(self.hbm.received, self.vmem.sems.sent.at[0], sends)
