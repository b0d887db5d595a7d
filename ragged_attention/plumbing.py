"""Where the kernel's data lies and how it gets there. Knows nothing of what is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ragged_attention.flash import Softmax
from ragged_attention.layout import LANES, CacheLayout
from ragged_attention.plan import Plan, Problem, buffers
from ragged_attention.schedule import (
    END,
    FIRST,
    GROUP_ROWS,
    Batch,
    Noted,
    Record,
    Walk,
    store_record,
)
from tpukit.buffers import repeat
from tpukit.chips import Chip

Ref = Any
LANE_BITS, GROUP_BITS = LANES.bit_length() - 1, GROUP_ROWS.bit_length() - 1
RUN = 32  # adjacent pages that move together
JOINED = 64  # tokens of a page up to which that is worth looking for
MISSING = 1  # bit 0 of a page's entry; then whether a RUN begins there, and the page's first unit
RUN_BIT, UNITS_BIT = 1, 2


class Operands(NamedTuple):
    """Arrays in HBM, but for scales and a short list of pages (SMEM) and sinks (VMEM); T tokens."""

    scales: Ref  # [2, kv_heads] f32, of logits and of values
    indices: Ref  # [..] i32 the list of pages, as `entries`; if it is long, [.., 128]
    sinks: Ref  # None, or [q_heads, 128] f32, lanes equal
    q: Ref  # [T, q_heads, key_dim]
    fresh: Ref  # None, or [T, token width] new rows in the type of the cache
    tree: Ref  # None, or [T, 128] i32, words of ancestors in lanes 0 and 1
    k_scales: Ref  # None, or [blocks, kv_heads, 128] f32 of listed rows, see `row_scales.py`
    v_scales: Ref  # likewise
    o: Ref  # [T, q_heads, value_dim]
    lse: Ref  # None, or [T, lanes] f32
    cache: Ref  # [groups, 8, width] i32, or [rows, width] of small pages; written in place


class Sems(NamedTuple):
    """DMA semaphores."""

    indices: Ref  # [records]
    tiles: Ref  # [tiles]
    row_scales: Ref  # None, or [tiles]
    stores: Ref  # [tiles]
    blocks: Ref  # [blocks] queries and their tree
    fresh: Ref  # [blocks]
    out: Ref  # [2]


class Scratch(NamedTuple):
    """On-chip memory; K = plan.keys / layout.group, Q = plan.queries, R = Q * a group of heads."""

    tiles: Ref  # [tiles, K, 8, width] i32
    queries: Ref  # [blocks, Q, q_heads, key_dim], or [1, T + Q, ..] if the batch is resident
    scaled: Ref  # [kv_heads, R, lanes] queries as they are multiplied
    top: Ref  # None, or [kv_heads, R, 128] f32
    total: Ref  # likewise
    sum: Ref  # None, or [kv_heads, R, value lanes] f32
    column_top: Ref  # None, or [kv_heads, 8, R] f32
    column_total: Ref  # likewise
    column_sum: Ref  # None, or [kv_heads, value lanes, R] f32
    far: Ref  # None, or [chunks of a tile, kv_heads, 8, R] f32, see `columns.py`
    out: Ref  # [2, Q, q_heads, value_dim], or [1, T + Q, ..]
    fresh: Ref  # None, or [blocks or 1, tokens, token width] in the type of the cache
    tree: Ref  # None, or [blocks, Q + 8, 128] i32
    lse: Ref  # None, or [2, Q, lanes] f32
    k_scales: Ref  # None, or [tiles, plan.keys / 128 + 1, kv_heads, 128] f32
    v_scales: Ref  # likewise
    books: Record  # each field None, or [records]
    pages: Ref  # None, or [records, rows, 128] part of a long list of pages, for a record
    fetched: Ref  # [tiles] units on their way into a tile
    missing: Ref  # [tiles] entries that have MISSING if one of the tile's pages has it
    stored: Ref  # [tiles] units on their way out of it
    leaving: Ref  # [2] tokens whose outputs are on their way
    sems: Sems

    @property
    def rows(self) -> Softmax:
        """What rows know."""
        return Softmax(self.top, self.total, self.sum)

    @property
    def columns(self) -> Softmax:
        """What columns know."""
        return Softmax(self.column_top, self.column_total, self.column_sum)

    @staticmethod
    def shapes(problem: Problem, plan: Plan, chip: Chip) -> Scratch:
        """Shapes of the fields; records have no more than the problem needs."""
        unused = {"window"} if not problem.windowed else set()
        unused |= {"first", "is_tree"} if not problem.tree else set()
        unused |= {"block"} if problem.resident else set()
        unused |= {"fences"} if not plan.limits(problem).may_write_ahead else set()
        book = pltpu.SMEM((plan.records,), jnp.int32)
        found = {n: pltpu.VMEM(*buffer) for n, buffer in buffers(problem, plan, chip).items()}
        first = Scratch._fields.index("books")
        return Scratch(
            **(dict.fromkeys(Scratch._fields[:first]) | found),
            books=Record(*(None if name in unused else book for name in Record._fields)),
            pages=pltpu.SMEM((plan.records, index_rows(problem, plan), LANES), jnp.int32)
            if problem.streams_pages
            else None,
            fetched=pltpu.SMEM((plan.tiles,), jnp.int32),
            missing=pltpu.SMEM((plan.tiles,), jnp.int32),
            stored=pltpu.SMEM((plan.tiles,), jnp.int32),
            leaving=pltpu.SMEM((2,), jnp.int32),
            sems=Sems(
                indices=pltpu.SemaphoreType.DMA((plan.records,)),
                tiles=pltpu.SemaphoreType.DMA((plan.tiles,)),
                row_scales=pltpu.SemaphoreType.DMA((plan.tiles,)) if problem.row_scales else None,
                stores=pltpu.SemaphoreType.DMA((plan.tiles,)),
                blocks=pltpu.SemaphoreType.DMA((plan.blocks,)),
                fresh=pltpu.SemaphoreType.DMA((plan.blocks,)),
                out=pltpu.SemaphoreType.DMA((2,)),
            ),
        )


def entries(pages: jax.Array, problem: Problem) -> jax.Array:
    """What the kernel is told of each page in the list: MISSING, or where it is in the pool.

    Where a RUN begins, the next pages of the list, RUN in all, lie behind each other in the pool.
    """
    step = problem.page_units << UNITS_BIT
    found = jnp.where((pages >= 0) & (pages < problem.num_pages), step * pages, MISSING)
    if problem.layout.page_size > JOINED:
        return found
    steps = jnp.pad(found[1:] - found[:-1] == step, (0, 1))
    for places in (1, 2, 4, 8, RUN // 2 - 1):  # of 2, 4, 8, 16 steps, and of RUN - 1
        steps &= jnp.pad(steps[places:], (0, places))
    return jnp.where(steps, found | 1 << RUN_BIT, found)


def index_rows(problem: Problem, plan: Plan) -> int:
    """Rows of 128 pages that hold those of any tile."""
    return (plan.keys // problem.layout.page_size + LANES - 2) // LANES + 1


@dataclasses.dataclass(frozen=True)
class Plumbing:
    """What each transfer moves, and when it may."""

    problem: Problem
    plan: Plan
    batch: Batch
    hbm: Operands
    vmem: Scratch

    @property
    def layout(self) -> CacheLayout:
        """Of the cache."""
        return self.problem.layout

    @property
    def walk(self) -> Walk:
        """Makes the records."""
        return Walk(self.batch, self.plan.limits(self.problem))

    def record(self, index: Any) -> Noted:
        """Record number `index`, if it is among those known."""
        return Noted(self.vmem.books, jnp.int32(index) & (self.plan.records - 1))

    def tile(self, index: Any) -> jax.Array:
        """The buffer of a record's tile."""
        return jnp.int32(index) & (self.plan.tiles - 1)

    def make(self, index: Any, cursor: Any) -> Any:
        """Makes record `index` and starts to fetch its part of a long list of pages."""
        record, cursor = self.walk.record(cursor)
        slot = jnp.int32(index) & (self.plan.records - 1)
        store_record(self.vmem.books, slot, record)
        self.indices(slot, record.page, lambda copy: copy.start())
        return cursor

    def indices(self, slot: jax.Array, page: jax.Array, act: Callable[[Any], None]) -> None:
        """The transfers of a record's part of a long list of pages."""
        if self.vmem.pages is None:
            return
        for row in range(self.vmem.pages.shape[1]):
            source = self.hbm.indices.at[pl.ds((page >> LANE_BITS) + row, 1)]
            target = self.vmem.pages.at[slot, pl.ds(row, 1)]
            act(pltpu.make_async_copy(source, target, self.vmem.sems.indices.at[slot]))

    def entries_of(self, record: Noted) -> Callable[..., jax.Array]:
        """The entries of a record's pages in the list: entry(place in the tile, how far behind)."""
        first, pages, slot = record.page, self.vmem.pages, record.slot
        if pages is None:
            return lambda place, behind=0: self.hbm.indices[(first + place) + behind]
        first &= LANES - 1

        def entry(place: Any, behind: int = 0) -> jax.Array:
            index = (first + place) + behind
            return pages[slot, index >> LANE_BITS, index & (LANES - 1)]

        return entry

    def pages(self, keys: jax.Array) -> jax.Array:
        """How many pages the first keys of a tile have; all are in the list."""
        size = self.layout.page_size
        return (keys + size - 1) >> (size.bit_length() - 1)

    def groups(self, keys: jax.Array) -> jax.Array:
        """Groups of rows of words that hold so many keys."""
        group = self.layout.group
        return (keys + group - 1) >> (group.bit_length() - 1)

    def move(self, source: Any, target: Any, count: Any, sem: Ref) -> None:
        """Starts to move `count` units; source and target are (ref, first unit)."""
        if self.problem.unit == GROUP_ROWS:
            here, there = (ref.at[pl.ds(first, count)] for ref, first in (source, target))
            pltpu.make_async_copy(here, there, sem).start()
            return

        def row(i: Any) -> None:
            here, there = (self.unit_of(ref, first + i) for ref, first in (source, target))
            pltpu.make_async_copy(here, there, sem).start()

        repeat(count, row)

    def unit_of(self, ref: Ref, i: Any) -> Ref:
        """A unit of a tile or of the cache, as rows."""
        if self.problem.unit == GROUP_ROWS:
            return ref.at[i]
        if ref is self.hbm.cache:
            return ref.at[pl.ds(i, 1)]
        return ref.at[i >> GROUP_BITS, pl.ds(i & (GROUP_ROWS - 1), 1)]

    def await_units(self, tile: Ref, count: jax.Array, sem: Ref) -> None:
        """Waits until `count` units have been moved."""

        @pl.when(count > 0)
        def _() -> None:
            if self.problem.unit == GROUP_ROWS:
                units = tile.at[pl.ds(0, count)]
                pltpu.make_async_copy(units, units, sem).wait()
            else:
                row = self.unit_of(tile, 0)
                repeat(count, lambda _: pltpu.make_async_copy(row, row, sem).wait())

    # Blocks: queries come in, outputs go out; those of a resident batch all at once.

    def batch_copies(self) -> list[Any]:
        """The transfers of a resident batch's queries and new rows."""
        queries = self.vmem.queries.at[0, pl.ds(0, self.problem.num_tokens)]
        copies = [pltpu.make_async_copy(self.hbm.q, queries, self.vmem.sems.blocks.at[0])]
        return copies + ([self.fresh_copy(None, 0)] if self.problem.update else [])

    def block_slot(self, record: Noted) -> jax.Array:
        """The buffer of a block's queries."""
        return record.block & (self.plan.blocks - 1)

    def out_slot(self, record: Noted) -> Any:
        """The buffer of a block's outputs."""
        return 0 if self.problem.resident else record.block & 1

    def queries_of(self, record: Noted, tokens: int) -> Ref:
        """[tokens, q_heads, key_dim] of a block."""
        if self.problem.resident:
            return self.vmem.queries.at[0, pl.ds(record.row, tokens)]
        return self.vmem.queries.at[self.block_slot(record), pl.ds(0, tokens)]

    def out_of(self, record: Noted, tokens: int) -> Ref:
        """[tokens, q_heads, value_dim] of a block; what is not its own is overwritten later."""
        first = record.row if self.problem.resident else 0
        return self.vmem.out.at[self.out_slot(record), pl.ds(first, tokens)]

    def shift(self, record: Noted) -> jax.Array:
        """Token row of a position, less the position."""
        return record.row - record.position

    @property
    def fresh_above(self) -> int:
        """Runs of tokens that a buffer of fresh rows has above what is fetched.

        The first group with a new row begins so far before it at most, and as far behind the last
        one ends what is read.
        """
        return 1 + self.layout.words_per_row

    def fresh_rows(self, record: Noted) -> tuple[jax.Array, jax.Array]:
        """Rows of words [begin, begin + count) with the record's new tokens."""
        pack, shift = self.layout.pack, self.shift(record)
        bits = pack.bit_length() - 1
        begin = ((record.key + record.cached + shift) >> bits) & -GROUP_ROWS
        last = (record.key + record.span - 1 + shift) >> bits
        return begin, ((last + GROUP_ROWS) & -GROUP_ROWS) - begin

    def fresh_copy(self, record: Noted | None, slot: Any) -> Any:
        """The transfer of a record's new rows; of all, if there is no record."""
        run = self.layout.run
        if record is None:
            begin, count = 0, self.hbm.fresh.shape[0]
        else:
            rows = self.fresh_rows(record)
            begin, count = (pl.multiple_of(x * self.layout.pack, run) for x in rows)
        source = self.hbm.fresh.at[pl.ds(begin, count)]
        target = self.vmem.fresh.at[slot, pl.ds(self.fresh_above * run, count)]
        return pltpu.make_async_copy(source, target, self.vmem.sems.fresh.at[slot])

    def fresh_slot(self, index: Any) -> Any:
        """The buffer of a record's new rows."""
        return 0 if self.problem.resident else jnp.int32(index) & (self.plan.blocks - 1)

    def start_block(self, index: Any) -> None:
        """Starts to fetch what a record needs besides keys: queries, their tree, new rows."""
        if self.problem.resident:
            return
        record = self.record(index)

        @pl.when(record.has(FIRST) & ~record.has(END))
        def _() -> None:
            for copy in self.block_copies(record):
                copy.start()

        if self.problem.update:

            @pl.when((record.cached < record.span) & ~record.has(END))
            def _() -> None:
                self.fresh_copy(record, self.fresh_slot(index)).start()

    def block_copies(self, record: Noted) -> list[Any]:
        """The transfers of a block's queries."""
        slot = self.block_slot(record)
        sem = self.vmem.sems.blocks.at[slot]
        source = self.hbm.q.at[pl.ds(record.row, record.count)]
        target = self.vmem.queries.at[slot, pl.ds(0, record.count)]
        copies = [pltpu.make_async_copy(source, target, sem)]
        if self.problem.tree:
            begin = pl.multiple_of(record.row & -GROUP_ROWS, GROUP_ROWS)
            source = self.hbm.tree.at[pl.ds(begin, self.vmem.tree.shape[1])]
            copies.append(pltpu.make_async_copy(source, self.vmem.tree.at[slot], sem))
        return copies

    def await_block(self, record: Noted) -> None:
        """Waits for a block's queries."""
        for copy in [] if self.problem.resident else self.block_copies(record):
            copy.wait()

    def await_fresh(self, record: Noted, slot: Any) -> None:
        """Waits for a record's new rows."""
        if not self.problem.resident:
            self.fresh_copy(record, slot).wait()

    def start_out(self, record: Noted) -> None:
        """Starts to write a block's outputs."""
        if self.problem.resident:
            return
        slot = self.out_slot(record)
        self.vmem.leaving[slot] = record.count
        for copy in self.out_copies(slot, record.row, record.count):
            copy.start()
        if self.problem.lse:
            self.each_lse(slot, record.row, lambda copy: copy.start())

    def out_copies(self, slot: jax.Array, row: Any, count: jax.Array) -> list[Any]:
        """The transfer of a block's outputs."""
        source = self.vmem.out.at[slot, pl.ds(0, count)]
        target = self.hbm.o.at[pl.ds(row, count)]
        return [pltpu.make_async_copy(source, target, self.vmem.sems.out.at[slot])]

    def each_lse(self, slot: jax.Array, row: Any, act: Callable[[Any], None]) -> None:
        """The transfers of a block's logarithms, token by token."""
        lse, target = self.vmem.lse, self.hbm.lse

        def token(i: jax.Array, _: None) -> None:
            source = lse.at[slot, pl.ds(i, 1)]
            act(
                pltpu.make_async_copy(
                    source, target.at[pl.ds(row + i, 1)], self.vmem.sems.out.at[slot]
                )
            )

        lax.fori_loop(0, self.vmem.leaving[slot], token, None)

    def batch_out(self) -> Any:
        """The transfer of a resident batch's outputs."""
        out = self.vmem.out.at[0, pl.ds(0, self.problem.num_tokens)]
        return pltpu.make_async_copy(out, self.hbm.o, self.vmem.sems.out.at[0])

    def await_out(self, slot: Any) -> None:
        """Waits until a block's outputs have been written."""
        if self.problem.resident:
            return
        count = self.vmem.leaving[slot]

        @pl.when(count > 0)
        def _() -> None:
            for copy in self.out_copies(slot, 0, count):
                copy.wait()
            if self.problem.lse:
                self.each_lse(slot, 0, lambda copy: copy.wait())
            self.vmem.leaving[slot] = 0
