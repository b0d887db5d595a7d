"""Where the kernel's data lies and how it gets there. Knows nothing of what is computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ragged_attention.flash import iota
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

Ref = Any
LANE_BITS = LANES.bit_length() - 1
UNROLL = 4  # pages whose transfers are started together: scalar code has long latencies
JOINED = 64  # tokens of a page up to which adjacent pages are worth looking for
FRESH_ABOVE = 2  # groups of a buffer of fresh rows above the first that is fetched


class Operands(NamedTuple):
    """Arrays; T tokens. In HBM, but for scales (SMEM) and sinks (VMEM)."""

    scales: Ref  # [2, kv_heads] f32, of logits and of values
    sinks: Ref  # None, or [q_heads, 128] f32, lanes equal
    indices: Ref  # the list of pages, -1 for any that is not in the pool: [..] i32 in SMEM if it is
    #               short, else [.., 128]
    q: Ref  # [T, q_heads, key_dim]
    fresh: Ref  # None, or [T, width] new rows in the type of the cache
    tree: Ref  # None, or [T, 128] i32, words of ancestors in lanes 0 and 1
    o: Ref  # [T, q_heads, value_dim]
    lse: Ref  # None, or [T, lanes] f32
    cache: Ref  # [pages * page_rows, width] i32, written in place


class Sems(NamedTuple):
    """DMA semaphores."""

    indices: Ref  # [records]
    tiles: Ref  # [tiles]
    stores: Ref  # [tiles]
    blocks: Ref  # [blocks] queries and their tree
    fresh: Ref  # [blocks]
    out: Ref  # [2]


class Scratch(NamedTuple):
    """On-chip memory; K = plan.keys / pack, Q = plan.queries, R = Q * query heads of a kv head."""

    tiles: Ref  # [tiles, K, width] i32
    queries: Ref  # [blocks, Q, q_heads, key_dim]
    scaled: Ref  # [kv_heads, R, lanes] queries as they are multiplied
    top: Ref  # [kv_heads, R, 128] f32
    total: Ref  # [kv_heads, R, 128] f32
    sum: Ref  # [kv_heads, R, value lanes] f32
    out: Ref  # [2, Q, q_heads, value_dim]
    fresh: Ref  # None, or [blocks, tokens, width] in the type of the cache
    tree: Ref  # None, or [blocks, Q + 8, 128] i32
    lse: Ref  # None, or [2, Q, lanes] f32
    books: Ref  # [records, fields] the records
    pages: Ref  # None, or [records, rows, 128] part of a long list of pages, for a record
    fetched: Ref  # [tiles] rows of words on their way into a tile
    erased: Ref  # [tiles] -1 if pages of the tile are not in the pool
    stored: Ref  # [tiles] rows of words on their way out of it
    leaving: Ref  # [2] tokens whose outputs are on their way
    sems: Sems

    @staticmethod
    def shapes(problem: Problem, plan: Plan, side: int) -> Scratch:
        """Shapes of the fields."""
        found = {n: pltpu.VMEM(*buffer) for n, buffer in buffers(problem, plan, side).items()}
        optional = dict.fromkeys(("fresh", "tree", "lse"))
        return Scratch(
            **(optional | found),
            books=pltpu.SMEM((plan.records, len(Record._fields)), jnp.int32),
            pages=pltpu.SMEM((plan.records, index_rows(problem, plan), LANES), jnp.int32)
            if problem.streams_pages
            else None,
            fetched=pltpu.SMEM((plan.tiles,), jnp.int32),
            erased=pltpu.SMEM((plan.tiles,), jnp.int32),
            stored=pltpu.SMEM((plan.tiles,), jnp.int32),
            leaving=pltpu.SMEM((2,), jnp.int32),
            sems=Sems(
                indices=pltpu.SemaphoreType.DMA((plan.records,)),
                tiles=pltpu.SemaphoreType.DMA((plan.tiles,)),
                stores=pltpu.SemaphoreType.DMA((plan.tiles,)),
                blocks=pltpu.SemaphoreType.DMA((plan.blocks,)),
                fresh=pltpu.SemaphoreType.DMA((plan.blocks,)),
                out=pltpu.SemaphoreType.DMA((2,)),
            ),
        )


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

    @property
    def whole_groups(self) -> bool:
        """Whether pages are groups of GROUP_ROWS rows; the rows of smaller ones move one by one."""
        return self.layout.page_rows % GROUP_ROWS == 0

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

    def pages_of(self, record: Noted) -> Callable[[Any], jax.Array]:
        """The pages of a record's tile by their place; negative if not in the pool."""
        first, pages, slot = record.page, self.vmem.pages, record.slot
        if pages is None:
            return lambda place: self.hbm.indices[first + place]
        first &= LANES - 1

        def page(place: Any) -> jax.Array:
            index = first + place
            return pages[slot, index >> LANE_BITS, index & (LANES - 1)]

        return page

    def pages(self, record: Noted) -> jax.Array:
        """How many pages the tile has; all are in the list."""
        size = self.layout.page_size
        return (record.span + size - 1) >> (size.bit_length() - 1)

    def groups(self, keys: jax.Array) -> jax.Array:
        """Groups of rows of words that hold so many keys."""
        group = GROUP_ROWS * self.layout.pack
        return (keys + group - 1) >> (group.bit_length() - 1)

    def move(self, source: Any, target: Any, count: Any, sem: Ref) -> None:
        """Starts to move `count` rows of words; source and target are (ref, first row)."""
        if self.whole_groups:
            here, there = (rows_of(ref, first, count) for ref, first in (source, target))
            pltpu.make_async_copy(here, there, sem).start()
            return

        def row(i: Any) -> None:
            here, there = (ref.at[pl.ds(first + i, 1)] for ref, first in (source, target))
            pltpu.make_async_copy(here, there, sem).start()

        repeat(count, row)

    def await_rows(self, ref: Ref, count: jax.Array, sem: Ref) -> None:
        """Waits until `count` rows of words have been moved."""

        @pl.when(count > 0)
        def _() -> None:
            if self.whole_groups:
                rows = rows_of(ref, 0, count)
                pltpu.make_async_copy(rows, rows, sem).wait()
            else:
                row = ref.at[pl.ds(0, 1)]
                repeat(count, lambda _: pltpu.make_async_copy(row, row, sem).wait())

    # Tiles: pages come in, and the groups with new rows go out.

    def start_tile(self, index: Any, now: Any) -> None:
        """Starts to fetch the tile of a record, unless a fence is between it and record `now`."""
        record = self.record(index)
        free = (record.kind & END) == 0
        if self.walk.limits.may_write_ahead:
            free &= record.fences == self.record(now).fences

        @pl.when(free)
        def _() -> None:
            self.fetch_tile(record, self.tile(index))

    def fetch_tile(self, record: Noted, slot: jax.Array) -> None:
        """Starts to fetch a tile; small pages that are adjacent move together."""
        if self.problem.update:
            self.await_store(slot)
        self.indices(record.slot, record.page, lambda copy: copy.wait())
        tile, sem = self.vmem.tiles.at[slot], self.vmem.sems.tiles.at[slot]
        size = self.layout.page_rows
        rows = jnp.minimum(self.groups(record.span) * GROUP_ROWS, self.pages(record) * size)
        page_at = self.pages_of(record)

        def fetch(place: Any, page: jax.Array, count: Any) -> None:
            """Starts to fetch rows from a page on."""
            source = (self.hbm.cache, jnp.maximum(page, 0) * size)
            self.move(source, (tile, place * size), count, sem)

        def separately(i: jax.Array, pages: list[jax.Array]) -> None:
            for j, page in enumerate(pages):
                fetch(i * UNROLL + j, page, size)

        def whole(i: jax.Array, signs: jax.Array) -> jax.Array:
            pages = [page_at(i * UNROLL + j) for j in range(UNROLL)]
            if self.layout.page_size > JOINED:
                separately(i, pages)
                return functools.reduce(jnp.bitwise_or, pages, signs)
            apart = [page ^ (pages[0] + j) for j, page in enumerate(pages)]
            adjacent = (functools.reduce(jnp.bitwise_or, apart) == 0) & (pages[0] >= 0)

            # Loops of no or one pass: conditions this small become predicates, which save nothing.
            repeat(adjacent.astype(jnp.int32), lambda _: fetch(i * UNROLL, pages[0], UNROLL * size))
            repeat((~adjacent).astype(jnp.int32), lambda _: separately(i, pages))
            return functools.reduce(jnp.bitwise_or, pages, signs)

        def last(i: jax.Array, signs: jax.Array) -> jax.Array:
            for j in range(UNROLL):
                place = i * UNROLL + j
                page, count = page_at(place), jnp.clip(rows - place * size, 0, size)
                fetch(place, page, count)
                signs |= jnp.where(count > 0, page, 0)
            return signs

        step = (UNROLL * size).bit_length() - 1
        full, some = rows >> step, (rows + UNROLL * size - 1) >> step
        signs = lax.fori_loop(0, full, whole, jnp.int32(0))
        signs = lax.fori_loop(full, some, last, signs)
        self.vmem.fetched[slot] = rows
        self.vmem.erased[slot] = signs

    def await_tile(self, slot: jax.Array) -> None:
        """Waits for a tile."""
        tile = self.vmem.tiles.at[slot]
        self.await_rows(tile, self.vmem.fetched[slot], self.vmem.sems.tiles.at[slot])

    def erase_pages(self, record: Noted, slot: jax.Array) -> None:
        """Zeroes the pages of a tile that are not in the pool, new rows and all."""

        @pl.when(self.vmem.erased[slot] < 0)
        def _() -> None:
            tile = self.vmem.tiles.at[slot]
            repeat(self.pages(record), lambda place: self.erase(record, tile, place))

    def erase(self, record: Noted, tile: Ref, place: jax.Array) -> None:
        """Zeroes a page of a tile that is not in the pool."""
        size = self.layout.page_rows

        @pl.when(self.pages_of(record)(place) < 0)
        def _() -> None:
            zeros = jnp.zeros((1, self.layout.width), jnp.int32)

            def clear(i: jax.Array) -> None:
                tile[pl.ds(place * size + i, 1)] = zeros

            repeat(size, clear)

    def store_groups(self, record: Noted, slot: jax.Array, begin: Any, end: Any) -> None:
        """Starts to write groups [begin, end) of a tile to the cache."""
        tile, sem = self.vmem.tiles.at[slot], self.vmem.sems.stores.at[slot]
        step = min(GROUP_ROWS, self.layout.page_rows)
        shift = self.layout.page_rows.bit_length() - 1

        def store(i: jax.Array) -> None:
            row = i * step
            place = row >> shift
            page = self.pages_of(record)(place)

            @pl.when(page >= 0)
            def _() -> None:
                target = (page << shift) + (row & (self.layout.page_rows - 1))
                self.move((tile, row), (self.hbm.cache, target), step, sem)
                self.vmem.stored[slot] += step

        parts = GROUP_ROWS // step  # pages smaller than a group: the next one is another request's
        last = jnp.minimum(end * parts, (self.pages(record) << shift) // step)
        lax.fori_loop(begin * parts, last, lambda i, _: store(i), None)

    def await_store(self, slot: jax.Array) -> None:
        """Waits until a tile's new rows are in the cache."""
        tile = self.vmem.tiles.at[slot]
        self.await_rows(tile, self.vmem.stored[slot], self.vmem.sems.stores.at[slot])
        self.vmem.stored[slot] = 0

    # New rows: words of the tokens' own order, which the kernel shifts into that of the positions.

    def shift(self, record: Noted) -> jax.Array:
        """Token row of a position, less the position."""
        return record.row - record.position

    def fresh_rows(self, record: Noted) -> tuple[jax.Array, jax.Array]:
        """Rows of words [begin, begin + count) with the record's new tokens."""
        pack, shift = self.layout.pack, self.shift(record)
        bits = pack.bit_length() - 1
        begin = ((record.key + record.cached + shift) >> bits) & -GROUP_ROWS
        last = (record.key + record.span - 1 + shift) >> bits
        return begin, ((last + GROUP_ROWS) & -GROUP_ROWS) - begin

    def fresh_copy(self, record: Noted, slot: jax.Array) -> Any:
        """The transfer of a record's new rows."""
        group = GROUP_ROWS * self.layout.pack
        begin, count = (
            pl.multiple_of(x * self.layout.pack, group) for x in self.fresh_rows(record)
        )
        source = self.hbm.fresh.at[pl.ds(begin, count)]
        target = self.vmem.fresh.at[slot, pl.ds(FRESH_ABOVE * group, count)]
        return pltpu.make_async_copy(source, target, self.vmem.sems.fresh.at[slot])

    def mend(self, record: Noted, slot: jax.Array, fresh: Ref | None) -> None:
        """Puts new rows into a tile, and zeroes what is behind its last key in the same group."""
        layout = self.layout
        pack, width, bits = layout.pack, 32 // layout.pack, layout.pack.bit_length() - 1
        group = GROUP_ROWS * pack
        tile, shift = self.vmem.tiles.at[slot], self.shift(record)
        places = iota((GROUP_ROWS, 1), 0) * pack

        def low(count: jax.Array) -> jax.Array:
            """A mask of the first `count` tokens of each word."""
            some = jnp.left_shift(1, jnp.clip(count, 0, pack - 1) * width) - 1
            return jnp.where(count >= pack, -1, some)

        def step(g: jax.Array, _: None) -> None:
            rows = pl.ds(pl.multiple_of(g * GROUP_ROWS, GROUP_ROWS), GROUP_ROWS)
            behind = g * group + places
            kept, valid = low(record.cached - behind), low(record.span - behind)
            mended = tile[rows] & (kept & valid)
            if fresh is not None:
                place = ((record.key + g * group) >> bits) + (shift >> bits)
                place += FRESH_ABOVE * GROUP_ROWS - self.fresh_rows(record)[0]
                new = shifted(fresh, pack, place, (shift & (pack - 1)) * width)
                mended |= new & (valid & ~kept)
            tile[rows] = mended

        lax.fori_loop(self.whole_group(record.cached), self.groups(record.span), step, None)

    def whole_group(self, keys: jax.Array) -> jax.Array:
        """Groups that are full of so many keys."""
        return keys >> ((GROUP_ROWS * self.layout.pack).bit_length() - 1)

    # Blocks: queries come in, outputs go out.

    def block_slot(self, record: Noted) -> jax.Array:
        """The buffer of a block's queries."""
        return record.block & (self.plan.blocks - 1)

    def fresh_slot(self, index: Any) -> jax.Array:
        """The buffer of a record's new rows."""
        return jnp.int32(index) & (self.plan.blocks - 1)

    def start_block(self, index: Any) -> None:
        """Starts to fetch what a record needs besides keys: queries, their tree, new rows."""
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

    def start_out(self, record: Noted) -> None:
        """Starts to write a block's outputs."""
        slot = record.block & 1
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

    def await_out(self, slot: Any) -> None:
        """Waits until a block's outputs have been written."""
        count = self.vmem.leaving[slot]

        @pl.when(count > 0)
        def _() -> None:
            for copy in self.out_copies(slot, 0, count):
                copy.wait()
            if self.problem.lse:
                self.each_lse(slot, 0, lambda copy: copy.wait())
            self.vmem.leaving[slot] = 0


def rows_of(ref: Ref, first: Any, count: Any) -> Ref:
    """Rows of words; both numbers are multiples of GROUP_ROWS."""
    if not isinstance(count, int):
        count = pl.multiple_of(count, GROUP_ROWS)
    return ref.at[pl.ds(pl.multiple_of(first, GROUP_ROWS), count)]


def shifted(tokens: Ref, pack: int, place: jax.Array, fields: jax.Array) -> jax.Array:
    """GROUP_ROWS rows of words from row `place` and, by `fields` bits, from the rows behind."""
    aligned = pl.multiple_of((place & -GROUP_ROWS) * pack, GROUP_ROWS * pack)
    rows = pltpu.bitcast(tokens[pl.ds(aligned, 2 * GROUP_ROWS * pack)], jnp.int32)
    down = 2 * GROUP_ROWS - (place & (GROUP_ROWS - 1))
    here = pltpu.roll(rows, down, 0)[:GROUP_ROWS]
    behind = pltpu.roll(rows, down - 1, 0)[:GROUP_ROWS]
    low = lax.shift_right_logical(here, jnp.broadcast_to(fields, here.shape))
    return low | jnp.where(fields == 0, 0, jnp.left_shift(behind, (32 - fields) & 31))


def repeat(times: Any, action: Callable[[jax.Array], None]) -> None:
    """action(0), ..., action(times - 1), as a loop of the kernel."""
    lax.fori_loop(0, times, lambda i, _: action(i), None)
