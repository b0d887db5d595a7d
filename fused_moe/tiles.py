"""Tiles of tokens: which there are, and their rows fetched by expert.

A visit is one tile: up to plan.tile rows of one expert, device by device. Tokens that have several
experts on this device are numbered as their first expert takes them; the number says where their
sum waits between two experts, and, where there is not enough room for all, in which pass over the
experts it is their turn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fused_moe.dispatch import FIRST, LANES, TOKEN
from fused_moe.plumbing import (
    LANE_BITS,
    LEAVING,
    LOADING,
    REPEATED,
    STORING,
    VISITS,
    WINDOW,
    each,
    row,
    rows,
    start,
    total,
    wait_rows,
)
from fused_moe.slices import Experts, Rings
from fused_moe.spec import ROWS
from tpukit.buffers import repeat


@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries that device `s` has for a tile's expert.

    Attributes:
      tiles: of this device.
      slot: of the tile.
      s: the device that they come from.
      begin: the first row of its entries that is in the window.
    """

    tiles: Tiles
    slot: jax.Array
    s: jax.Array
    begin: jax.Array

    def __getitem__(self, i: jax.Array) -> jax.Array:
        """Entry i of all entries of the device."""
        first = self.s * self.tiles.problem.layout.window_rows - self.begin
        windows = self.tiles.vmem.books.windows
        return windows[self.slot, first + (i >> LANE_BITS), i & (LANES - 1)]

    def token(self, code: jax.Array) -> jax.Array:
        """The token's row among all received ones."""
        return self.s * self.tiles.problem.num_tokens + (code & TOKEN)


@dataclasses.dataclass(frozen=True)
class Tiles(Rings):
    """All tiles of this device, one after another: those of the shared expert, then the routed."""

    @property
    def shared_visits(self) -> int:
        """Tiles of the shared expert: all own tokens."""
        return 0 if self.problem.shared is None else -(-self.problem.num_tokens // self.plan.tile)

    @property
    def experts(self) -> tuple[Experts, ...]:
        """The shared expert, if any, and the routed ones."""
        weights, n = self.hbm.weights, self.shared_visits
        here = []
        first_up = 0
        if self.problem.shared is not None and weights.shared is not None:
            shape = self.problem.shared
            tokens = self.own_tokens
            here.append(Experts(weights.shared, shape, 0, lambda: n, 0, 0, lambda _: 0, tokens))
            first_up = n * (shape.inter // self.plan.inter_slice)
        routed = Experts(
            weights,
            self.problem.routed,
            n,
            lambda: n + self.routed_visits(),
            first_up,
            n * self.downs,
            lambda visit: self.vmem.books.visit_expert[self.in_pass(visit - n)[1]],
            self.sorted_rows,
        )
        return (*here, routed)

    def own_tokens(self, visit: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The received rows of a visit of the shared expert: own tokens."""
        first = visit * self.plan.tile
        count = jnp.minimum(self.problem.num_tokens - first, self.plan.tile)
        return self.me * self.problem.num_tokens + first, pl.multiple_of(count, ROWS)

    def sorted_rows(self, visit: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The received rows of a routed visit in bulk."""
        books, tile = self.vmem.books, visit - self.shared_visits
        expert, offset = books.visit_expert[tile], books.visit_row[tile]
        first = self.head(self.me, 2 * expert) + offset
        count = jnp.minimum(self.head(self.me, 2 * expert + 2) - first, self.plan.tile)
        return first, pl.multiple_of(count, ROWS)

    def fetch_rows(self, visit: jax.Array) -> None:
        """Starts fetching the rows of a visit, if there is one and its rows are consecutive."""
        slot = visit & 1
        for experts in self.experts if self.plan.bulk else self.experts[:-1]:

            @pl.when((visit >= experts.first) & (visit < experts.end()))
            def _(experts: Experts = experts) -> None:
                first, count = experts.rows(visit)
                words, done = rows(self.vmem.words.at[slot], 0, count), self.vmem.sems.gathered
                start(rows(self.hbm.received, first, count), words, done.at[slot])

    def list_visits(self) -> None:
        """Lists the tiles of the routed experts, by expert."""
        books, layout = self.vmem.books, self.problem.layout

        def expert(e: jax.Array, count: jax.Array) -> jax.Array:
            def of_device(s: jax.Array) -> jax.Array:
                return self.head(s, 2 * e + 2) - self.head(s, 2 * e)

            rows = total(layout.num_devices, of_device)
            tiles = (rows + self.plan.tile - 1) // self.plan.tile

            def tile(i: jax.Array) -> None:
                books.visit_expert[count + i] = e
                books.visit_row[count + i] = i * self.plan.tile

            repeat(tiles, tile)
            return count + tiles

        count = lax.fori_loop(0, layout.experts, expert, jnp.int32(0))
        books.counts[VISITS] = count
        for name in (REPEATED, LOADING, STORING, LEAVING, LEAVING + 1):
            books.counts[name] = 0

    @property
    def enough_partials(self) -> bool:
        """Whether no batch can need more partials than there are; in bulk none does."""
        if self.plan.bulk:
            return True
        return self.plan.partials >= self.problem.num_devices * self.problem.num_tokens

    def routed_visits(self) -> jax.Array:
        """Tiles of routed experts, in all passes."""
        counts = self.vmem.books.counts
        if self.enough_partials:
            return counts[VISITS]
        size = self.plan.partials
        passes = lax.div(counts[REPEATED] + size - 1, size)
        return counts[VISITS] * jnp.maximum(passes, 1)

    def in_pass(self, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The pass that a routed tile belongs to, and its number there."""
        if self.enough_partials:
            return jnp.int32(0), tile
        visits = jnp.maximum(self.vmem.books.counts[VISITS], 1)
        which = lax.div(tile, visits)
        return which, tile - which * visits

    def open_window(self, visit: jax.Array) -> None:
        """Starts fetching the entries of a routed visit's expert, if there is one."""
        tile, layout, books = visit - self.shared_visits, self.problem.layout, self.vmem.books

        @pl.when(tile < self.routed_visits())
        def _() -> None:
            slot = visit & 1
            expert = books.visit_expert[self.in_pass(tile)[1]]
            window, done = books.windows.at[slot], self.vmem.sems.window.at[slot]

            def device(s: jax.Array) -> jax.Array:
                begin, end = self.span(self.head(s, 2 * expert), self.head(s, 2 * expert + 2))
                source, target = s * layout.entry_rows, s * layout.window_rows - begin

                def fetch(r: jax.Array, _: None) -> None:
                    start(row(self.hbm.entries, source + r), row(window, target + r), done)

                lax.fori_loop(begin, end, fetch, None)
                return end - begin

            books.counts[WINDOW + slot] = total(layout.num_devices, device)

    def gather(self, visit: jax.Array) -> None:
        """Starts fetching the rows of a routed visit, if there is one."""
        tile = visit - self.shared_visits

        @pl.when(tile < self.routed_visits())
        def _() -> None:
            books, slot = self.vmem.books, visit & 1
            turn, index = self.in_pass(tile)
            expert, first_row = books.visit_expert[index], books.visit_row[index]

            @pl.when((first_row == 0) & (turn == 0))
            def _() -> None:
                self.wait_arrived(expert)

            wait_rows(self.hbm.entries, self.vmem.sems.window.at[slot], books.counts[WINDOW + slot])

            def device(s: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
                seen, r = state
                begin, several, end = (self.head(s, 2 * expert + i) for i in range(3))
                entries = Entries(self, slot, s, begin >> LANE_BITS)

                def inside(i: jax.Array) -> jax.Array:
                    return jnp.clip(i, first_row - seen + begin, limit - seen + begin)

                books.spans[slot, 2 * s] = r
                alone = jnp.where(turn == 0, inside(several), inside(begin))
                shift = r - inside(begin)
                each(inside(begin), alone, lambda i: self.take(entries, i, shift + i))
                r = shift + alone
                books.spans[slot, 2 * s + 1] = r
                first, last = inside(several), inside(end)

                def take(i: jax.Array, r: jax.Array) -> jax.Array:
                    return self.take_one_of_several(entries, i, r, turn)

                def take_next(i: jax.Array) -> None:
                    take(i, r + i - first)

                if self.enough_partials:  # then all are taken
                    each(first, last, take_next)
                    return seen + end - begin, r + last - first
                return seen + end - begin, lax.fori_loop(first, last, take, r)

            limit = first_row + self.plan.tile
            start_ = (jnp.int32(0), jnp.int32(0))
            _, count = lax.fori_loop(0, self.problem.num_devices, device, start_)
            books.spans[slot, 2 * self.problem.num_devices] = count

    def wait_arrived(self, expert: jax.Array) -> None:
        """Waits for the rows from other devices that have this expert first."""
        place = self.problem.layout.firsts + expert

        others = self.problem.num_devices - 1
        count = total(others, lambda i: self.head(self.other(i), place))
        wait_rows(self.hbm.received, self.vmem.sems.arrived.at[expert], count)

    def take(self, entries: Entries, i: jax.Array, r: jax.Array) -> None:
        """Starts fetching row r of a tile, entry i of a device."""
        slot, code = entries.slot, entries[i]
        self.vmem.books.codes[slot, r] = code
        token = row(self.hbm.received, entries.token(code))
        start(token, row(self.vmem.words.at[slot], r), self.vmem.sems.gathered.at[slot])

    def take_one_of_several(
        self, entries: Entries, i: jax.Array, r: jax.Array, turn: jax.Array
    ) -> jax.Array:
        """The same for a token with several experts here, if it is in this pass; returns r + 1."""
        books, code = self.vmem.books, entries[i]
        token, number = entries.token(code), books.counts[REPEATED]
        opens = (code & FIRST != 0) & (turn == 0)
        place = jnp.where(opens, number, books.partial_of[token])
        books.partial_of[token] = place
        books.counts[REPEATED] = number + opens.astype(jnp.int32)
        if self.enough_partials:
            books.places[entries.slot, r] = place
            self.take(entries, i, r)
            return r + 1
        place -= turn * self.plan.partials
        wanted = (place >= 0) & (place < self.plan.partials)

        @pl.when(wanted)
        def _() -> None:
            books.places[entries.slot, r] = place
            self.take(entries, i, r)

        return r + wanted.astype(jnp.int32)

    def load_partials(self, slot: jax.Array) -> None:
        """Starts fetching the sums that a tile's rows resume."""
        books = self.vmem.books
        self.wait_storing()

        def load(_: Any, r: jax.Array) -> None:
            @pl.when(books.codes[slot, r] & FIRST == 0)
            def _() -> None:
                partial = row(self.hbm.partials, books.places[slot, r])
                start(partial, row(self.vmem.y, r), self.vmem.sems.partial.at[1])
                books.counts[LOADING] += 1

        self.each_row(slot, None, load)

    def each_row(
        self,
        slot: jax.Array,
        alone: Callable[[Any, jax.Array], None] | None,
        several: Callable[[Any, jax.Array], None],
    ) -> None:
        """alone(device, row) and several(device, row) for the rows of a tile, device by device.

        The device is None for rows of this one.
        """
        spans = self.vmem.books.spans

        def loops(s: jax.Array, device: Any) -> None:
            begin, middle, end = (spans[slot, 2 * s + i] for i in range(3))

            @pl.when(begin < end)
            def _() -> None:
                if alone is not None:
                    each(begin, middle, functools.partial(alone, device))
                each(middle, end, functools.partial(several, device))

        loops(self.me, None)
        if self.problem.num_devices > 1:
            others = self.problem.num_devices - 1
            repeat(others, lambda i: loops(self.other(i), self.other(i)))

    def wait_storing(self) -> None:
        """Waits until the last tile's sums are among the partials."""
        counts = self.vmem.books.counts
        wait_rows(self.hbm.partials, self.vmem.sems.partial.at[0], counts[STORING])
        counts[STORING] = 0
