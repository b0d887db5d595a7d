"""A tile of keys and values: its pages come in, new rows enter it, and its groups go out again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ragged_attention.flash import iota
from ragged_attention.layout import LANES
from ragged_attention.plumbing import (
    JOINED,
    MISSING,
    RUN,
    RUN_BIT,
    UNITS_BIT,
)
from ragged_attention.row_scales import RowScales
from ragged_attention.schedule import END, GROUP_ROWS, WRITES, Noted
from tpukit.buffers import repeat

Ref = Any
UNROLL = 8  # pages whose transfers are started together: scalar code has long latencies


@dataclasses.dataclass(frozen=True)
class Tiles(RowScales):
    """What happens to a tile before and after it is computed."""

    def start_tile(self, index: Any, now: Any) -> None:
        """Starts to fetch the tile of a record, unless a fence is between it and record `now`."""
        record = self.record(index)
        free = (record.kind & END) == 0
        if self.walk.limits.may_write_ahead:
            free &= record.fences == self.record(now).fences

        @pl.when(free)
        def _() -> None:
            self.fetch_tile(record, self.tile(index))
            self.fetch_scales(record, self.tile(index))

    def fetch_tile(self, record: Noted, slot: jax.Array) -> None:
        """Starts to fetch a tile; small pages that are adjacent move together."""
        self.indices(record.slot, record.page, lambda copy: copy.wait())
        tile, sem = self.vmem.tiles.at[slot], self.vmem.sems.tiles.at[slot]
        keys = record.span
        if self.walk.limits.may_write_ahead:  # only a group that is partly in the cache is needed
            whole = self.whole_group(record.cached) == self.groups(record.cached)
            keys = jnp.where(record.has(WRITES), jnp.where(whole, 0, record.cached), keys)
            pl.when(keys > 0)(lambda: self.await_store(slot))
        elif self.problem.update:
            self.await_store(slot)
        size, pages = self.problem.page_units, self.pages(keys)
        units = jnp.minimum(self.groups(keys) * self.parts, pages * size)
        entry_at = self.entries_of(record)

        def fetch(place: Any, entry: jax.Array, count: Any) -> None:
            """Starts to fetch units from a page on."""
            self.move((self.hbm.cache, first_unit(entry)), (tile, place * size), count, sem)

        def run(i: jax.Array, seen: jax.Array) -> jax.Array:
            entry, begin = entry_at(i * RUN), i * (RUN // UNROLL)
            adjacent = (entry >> RUN_BIT) & 1

            # Loops of no pass or some: small conditions become predicates, which save nothing.
            repeat(adjacent, lambda _: fetch(i * RUN, entry, RUN * size))
            end = begin + jnp.where(adjacent == 1, 0, RUN // UNROLL)
            return lax.fori_loop(begin, end, several, seen)

        def several(i: jax.Array, seen: jax.Array) -> jax.Array:
            entries = [entry_at(i * UNROLL, j) for j in range(UNROLL)]
            for j, entry in enumerate(entries):
                fetch(i * UNROLL + j, entry, size)
            return functools.reduce(jnp.bitwise_or, entries, seen)

        def one(place: jax.Array, seen: jax.Array) -> jax.Array:
            entry = entry_at(place)
            fetch(place, entry, jnp.minimum(units - place * size, size))
            return seen | entry

        done, seen = 0, jnp.int32(0)
        if self.layout.page_size <= JOINED:
            runs = units >> (RUN * size).bit_length() - 1
            done, seen = runs * (RUN // UNROLL), lax.fori_loop(0, runs, run, seen)
        full = units >> (UNROLL * size).bit_length() - 1
        seen = lax.fori_loop(done, full, several, seen)
        seen = lax.fori_loop(full * UNROLL, pages, one, seen)
        self.vmem.fetched[slot] = units
        self.vmem.missing[slot] = seen

    @property
    def parts(self) -> int:
        """Units of a group."""
        return GROUP_ROWS // self.problem.unit

    def await_tile(self, slot: jax.Array) -> None:
        """Waits for a tile."""
        tile = self.vmem.tiles.at[slot]
        self.await_units(tile, self.vmem.fetched[slot], self.vmem.sems.tiles.at[slot])

    def erase_pages(self, record: Noted, slot: jax.Array) -> None:
        """Zeroes the pages of a tile that are not in the pool, new rows and all."""
        repeat(self.pages(record.span), lambda place: self.erase(record, slot, place))

    def erase(self, record: Noted, slot: jax.Array, place: jax.Array) -> None:
        """Zeroes a page of a tile that is not in the pool."""
        tile, size = self.vmem.tiles.at[slot], self.problem.page_units

        @pl.when(is_missing(self.entries_of(record)(place)))
        def _() -> None:
            zeros = jnp.zeros((self.problem.unit, self.layout.width), jnp.int32)

            def clear(i: jax.Array) -> None:
                self.unit_of(tile, place * size + i)[...] = zeros

            repeat(size, clear)
            self.erase_scales(slot, place)

    def store_groups(self, record: Noted, slot: jax.Array, begin: Any, end: Any) -> None:
        """Starts to write groups [begin, end) of a tile, at least one, to the cache."""
        tile, sem = self.vmem.tiles.at[slot], self.vmem.sems.stores.at[slot]
        size = self.problem.page_units
        shift = size.bit_length() - 1

        first = begin * self.parts
        # Pages smaller than a group: the next one is another request's.
        last = jnp.minimum(end * self.parts, self.pages(record.span) << shift)

        def store(place: jax.Array) -> None:
            entry = self.entries_of(record)(place)

            @pl.when(~is_missing(entry))
            def _() -> None:
                page = place << shift
                here = jnp.maximum(page, first)
                count = jnp.minimum(page + size, last) - here
                target = first_unit(entry) + here - page
                self.move((tile, here), (self.hbm.cache, target), count, sem)
                self.vmem.stored[slot] += count

        at_least_once(first >> shift, (last + size - 1) >> shift, store)

    def await_store(self, slot: jax.Array) -> None:
        """Waits until a tile's new rows are in the cache."""
        tile = self.vmem.tiles.at[slot]
        self.await_units(tile, self.vmem.stored[slot], self.vmem.sems.stores.at[slot])
        self.vmem.stored[slot] = 0

    # New rows: words of the tokens' own order, which the kernel shifts into that of the positions.

    def mend(self, record: Noted, slot: jax.Array, fresh: Ref | None) -> None:
        """Puts new rows into a tile, and zeroes what is behind its last key in the same group."""
        pack, width = self.layout.pack, 32 // self.layout.pack
        bits = pack.bit_length() - 1
        tile, shift = self.vmem.tiles.at[slot], self.shift(record)
        places = iota((GROUP_ROWS, 1), 0) * pack

        def low(count: jax.Array) -> jax.Array:
            """A mask of the first `count` tokens of each word."""
            some = jnp.left_shift(1, jnp.clip(count, 0, pack - 1) * width) - 1
            return jnp.where(count >= pack, -1, some)

        def mend(g: jax.Array) -> None:
            begins = [
                g * self.layout.group + i * self.layout.run
                for i in range(self.layout.words_per_row)
            ]

            def first(count: jax.Array) -> jax.Array:
                return self.joined([low(count - begin - places) for begin in begins])

            kept, valid = first(record.cached), first(record.span)
            mended = tile[g] & (kept & valid)
            if fresh is not None:
                mended |= self.joined([new_words(fresh, x) for x in begins]) & (valid & ~kept)
            tile[g] = mended

        def new_words(fresh: Ref, begin: Any) -> jax.Array:
            """Words of new rows for the tile's keys from `begin` on."""
            place = ((record.key + begin) >> bits) + (shift >> bits)
            place += self.fresh_above * GROUP_ROWS
            place -= 0 if self.problem.resident else self.fresh_rows(record)[0]
            return shifted(fresh, pack, place, (shift & (pack - 1)) * width)

        at_least_once(self.whole_group(record.cached), self.groups(record.span), mend)

    def joined(self, halves: list[jax.Array]) -> jax.Array:
        """A group's rows from words of its halves, as in `layout.joined`; [8, 1] are all lanes."""
        if len(halves) == 1:
            return halves[0]
        width, rank = self.layout.token_width, self.layout.value_dim
        one, other = (jnp.broadcast_to(x, (GROUP_ROWS, width)) for x in halves)
        lane = iota((GROUP_ROWS, LANES), 1)
        moved = pltpu.roll(other[:, rank:], LANES // 2, 1)
        rotated = jnp.where(lane < LANES // 2, one[:, rank:], moved)
        return jnp.concatenate([one[:, :rank], other[:, :rank], rotated], axis=1)

    def whole_group(self, keys: Any) -> Any:
        """Groups that are full of so many keys."""
        return keys >> (self.layout.group.bit_length() - 1)


def at_least_once(begin: jax.Array, end: jax.Array, action: Callable[[Any], None]) -> None:
    """action(begin), ..., action(end - 1); most often once, and that without a loop."""
    action(begin)
    lax.fori_loop(begin + 1, end, lambda i, _: action(i), None)


def first_unit(entry: jax.Array) -> jax.Array:
    """Where a page begins in the cache."""
    return entry >> UNITS_BIT


def is_missing(entry: jax.Array) -> jax.Array:
    """Whether a page, or one of several, is not in the pool."""
    return (entry & MISSING) != 0


def shifted(tokens: Ref, pack: int, place: jax.Array, fields: jax.Array) -> jax.Array:
    """GROUP_ROWS rows of words from row `place` and, by `fields` bits, from the rows behind."""
    aligned = pl.multiple_of((place & -GROUP_ROWS) * pack, GROUP_ROWS * pack)
    rows = pltpu.bitcast(tokens[pl.ds(aligned, 2 * GROUP_ROWS * pack)], jnp.int32)
    row = iota((GROUP_ROWS, 1), 0)

    def rows_from(first: jax.Array) -> jax.Array:
        up = (GROUP_ROWS - first) & (GROUP_ROWS - 1)
        one, other = (pltpu.roll(half, up, 0) for half in (rows[:GROUP_ROWS], rows[GROUP_ROWS:]))
        return jnp.where(row < GROUP_ROWS - first, one, other)

    first = place & (GROUP_ROWS - 1)
    here, behind = rows_from(first), rows_from(first + 1)
    low = lax.shift_right_logical(here, jnp.broadcast_to(fields, here.shape))
    return low | jnp.where(fields == 0, 0, jnp.left_shift(behind, (32 - fields) & 31))
