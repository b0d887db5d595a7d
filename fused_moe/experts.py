"""The experts: rows gathered by expert, two products, results on their way home.

A visit computes one tile: up to plan.tile rows of one expert. Rows of a token that has several
experts on this device are added up here, in the order of the experts, in float32: between two of
its experts the sum waits among the partials. After the last one it goes home.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fused_moe import ffn
from fused_moe.dispatch import FIRST, LANES, LAST, SLOT, TOKEN, TOKEN_BITS, WEIGHTS, Table
from fused_moe.plan import ROWS
from fused_moe.plumbing import (
    LEAVING,
    LOADING,
    REPEATED,
    STORING,
    VISITS,
    each,
    repeat,
    row,
    rows,
    start,
    wait_rows,
)
from fused_moe.rows import lanes, narrow, row_scale, scale_of
from fused_moe.slices import Experts, Rings
from reference.fused_moe import gated
from tpukit.buffers import Stream

SCALE_OF, WEIGHT_OF, RESUMES = 0, 1, 2  # planes of Scratch.factors


@dataclasses.dataclass(frozen=True)
class Visits(Rings):
    """All tiles of this device, one after another."""

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
            here.append(Experts(weights.shared, shape, 0, lambda: n, 0, 0, lambda _: 0))
            first_up = n * (shape.inter // self.plan.inter_slice)
        routed = Experts(
            weights,
            self.problem.routed,
            n,
            lambda: n + self.routed_visits(),
            first_up,
            n * self.downs,
            lambda visit: self.vmem.books.visit_expert[self.in_pass(visit - n)[1]],
        )
        return (*here, routed)

    def list_visits(self) -> None:
        """Lists the tiles of the routed experts, by expert."""
        books, first = self.vmem.books, Table.BOUNDS + 2 * self.me * self.problem.experts_here

        def expert(e: jax.Array, count: jax.Array) -> jax.Array:
            def device(s: jax.Array, total: jax.Array) -> jax.Array:
                return total + self.entry(s, first + 2 * e + 2) - self.entry(s, first + 2 * e)

            total = lax.fori_loop(0, self.problem.num_devices, device, jnp.int32(0))
            tiles = (total + self.plan.tile - 1) // self.plan.tile

            def tile(i: jax.Array) -> None:
                books.visit_expert[count + i] = e
                books.visit_row[count + i] = i * self.plan.tile

            repeat(tiles, tile)
            return count + tiles

        count = lax.fori_loop(0, self.problem.experts_here, expert, jnp.int32(0))
        books.counts[VISITS] = count
        for name in (REPEATED, LOADING, STORING, LEAVING, LEAVING + 1):
            books.counts[name] = 0

    @property
    def enough_partials(self) -> bool:
        """Whether no batch can need more partials than there are."""
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

    def run(self) -> None:
        """Visits every tile."""
        for experts in self.experts[:-1]:
            repeat(self.shared_visits, lambda v, experts=experts: self.visit_shared(experts, v))
        routed, n = self.experts[-1], self.shared_visits
        if not n:
            self.gather(jnp.int32(0))

        def step(state: jax.Array) -> jax.Array:
            self.visit_routed(routed, state)
            return state + 1

        lax.while_loop(lambda v: v < n + self.routed_visits(), step, jnp.int32(n))
        for slot in range(2):
            self.wait_leaving(slot)
        self.wait_storing()

    # Tiles of tokens

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

            place = Table.BOUNDS + 2 * (self.me * self.problem.experts_here + expert)

            def device(s: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
                seen, r = state
                begin, several, end = (self.entry(s, place + i) for i in range(3))

                def inside(i: jax.Array) -> jax.Array:
                    return jnp.clip(i, first_row - seen + begin, limit - seen + begin)

                books.spans[slot, 2 * s] = r
                alone = jnp.where(turn == 0, inside(several), inside(begin))
                shift = r - inside(begin)
                each(inside(begin), alone, lambda i: self.take(s, i, shift + i, slot))
                r = shift + alone
                books.spans[slot, 2 * s + 1] = r
                r = lax.fori_loop(
                    inside(several),
                    inside(end),
                    lambda i, r: self.take_one_of_several(s, i, r, slot, turn),
                    r,
                )
                return seen + end - begin, r

            limit = first_row + self.plan.tile
            start_ = (jnp.int32(0), jnp.int32(0))
            _, count = lax.fori_loop(0, self.problem.num_devices, device, start_)
            books.spans[slot, 2 * self.problem.num_devices] = count

    def wait_arrived(self, expert: jax.Array) -> None:
        """Waits for the rows from other devices that have this expert first."""
        place = self.problem.table.firsts + self.me * self.problem.experts_here + expert

        def device(i: jax.Array, total: jax.Array) -> jax.Array:
            return total + self.entry(self.other(i), place)

        others = self.problem.num_devices - 1
        count = lax.fori_loop(0, others, device, jnp.int32(0))
        wait_rows(self.hbm.received, self.vmem.sems.arrived.at[expert], count)

    def take(self, s: jax.Array, i: jax.Array, r: jax.Array, slot: jax.Array) -> None:
        """Starts fetching row r of a tile, entry i of device s."""
        books = self.vmem.books
        code = self.entry(s, self.problem.table.entries + i)
        books.codes[slot, r] = code
        token = row(self.hbm.received, s * self.problem.num_tokens + (code & TOKEN))
        start(token, row(self.vmem.words.at[slot], r), self.vmem.sems.gathered.at[slot])

    def take_one_of_several(
        self, s: jax.Array, i: jax.Array, r: jax.Array, slot: jax.Array, turn: jax.Array
    ) -> jax.Array:
        """The same for a token with several experts here, if this is its pass; returns the next row."""
        books = self.vmem.books
        code = self.entry(s, self.problem.table.entries + i)
        token = s * self.problem.num_tokens + (code & TOKEN)

        @pl.when((code & FIRST != 0) & (turn == 0))
        def _() -> None:
            number = books.counts[REPEATED]
            books.partial_of[token] = number
            books.counts[REPEATED] = number + 1

        place = books.partial_of[token] - turn * self.plan.partials
        wanted = (place >= 0) & (place < self.plan.partials)

        @pl.when(wanted)
        def _() -> None:
            books.places[slot, r] = place
            self.take(s, i, r, slot)

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
            if alone is not None:
                each(begin, middle, lambda r: alone(device, r))
            lax.fori_loop(middle, end, lambda r, _: several(device, r), None)

        loops(self.me, None)
        others = self.problem.num_devices - 1
        repeat(others, lambda i: loops(self.other(i), self.other(i)))

    def wait_storing(self) -> None:
        """Waits until the last tile's sums are among the partials."""
        counts = self.vmem.books.counts
        wait_rows(self.hbm.partials, self.vmem.sems.partial.at[0], counts[STORING])
        counts[STORING] = 0

    def unpack(self, slot: jax.Array, count: jax.Array, factors: Callable[[Any], Any]) -> None:
        """Brings a tile's rows into the layout of products, and their factors beside them."""
        fmt = self.problem.rows_out

        def group(i: jax.Array) -> None:
            words = rows(self.vmem.words.at[slot], i * ROWS, ROWS)
            target = rows(self.vmem.x, i * ROWS, ROWS)
            for part, values in fmt.load(words):
                target[:, part] = values
            for plane, values in enumerate(factors(fmt.tail(words))):
                wide = jnp.broadcast_to(values, (ROWS, LANES))
                rows(self.vmem.factors.at[plane], i * ROWS, ROWS)[...] = wide

        repeat((count + ROWS - 1) // ROWS, group)

    def routed_factors(self, expert: jax.Array) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
        """Scale, weight and whether a sum is resumed, from the tails of a routed expert's rows."""
        first = self.me * self.problem.experts_here
        top_k = self.problem.top_k

        def factors(tail: jax.Array) -> tuple[jax.Array, ...]:
            ids = jnp.where(lanes(tail.shape) < top_k, tail, -1)
            weights = pltpu.roll(tail, LANES - top_k * WEIGHTS, 1)  # slot j's into lane j
            mine = lax.bitcast_convert_type(weights, jnp.float32)
            weight = jnp.sum(jnp.where(ids == first + expert, mine, 0.0), axis=1, keepdims=True)
            earlier = (ids >= first) & (ids < first + expert)
            resumes = jnp.max(earlier.astype(jnp.float32), axis=1, keepdims=True)
            return self.scale(tail), weight, resumes

        return factors

    def scale(self, tail: jax.Array) -> jax.Array:
        """The scale of rows, 1 where they have none."""
        one = jnp.ones((ROWS, 1), jnp.float32)
        return scale_of(tail) if self.problem.quantised else one

    # Products

    def sized(self, count: jax.Array, action: Callable[[int], None]) -> None:
        """action(size) for the smallest size of tile that holds `count` rows."""
        low = 0
        for size in self.plan.tiles:

            @pl.when((count > low) & (count <= size))
            def _(size: int = size) -> None:
                action(size)

            low = size

    def streams(self, names: tuple[str, ...]) -> list[Stream]:
        """The slices of the shared expert and of the routed ones, in one numbering."""
        return [self.stream(experts, names) for experts in self.experts]

    def start_first(self, experts: tuple[Experts, ...]) -> None:
        """Fills the rings with the first slices of all, as far as they belong to these experts."""
        for names in (("gate", "up"), ("down",)):
            for one in experts:
                repeat(self.plan.depth, self.stream(one, names).start)

    def each_slice(
        self,
        experts: Experts,
        names: tuple[str, ...],
        visit: jax.Array,
        action: Callable[..., None],
    ) -> None:
        """action(part, slot) for every slice of a visit, each replaced as soon as it is used."""
        down = names == ("down",)
        count = self.downs if down else self.ups(experts)
        first = experts.first_down if down else experts.first_up
        mine = self.stream(experts, names)

        def step(part: jax.Array) -> None:
            index = first + (visit - experts.first) * count + part
            mine.wait(index)
            action(part, mine.slot(index))
            for stream in self.streams(names):
                stream.start(index + self.plan.depth)

        repeat(count, step)

    def projection(
        self, experts: Experts, name: str, x: jax.Array, slot: jax.Array, factor: jax.Array
    ) -> jax.Array:
        """Factor * (x @ slice) + bias."""
        ring = getattr(self.vmem, name)
        weights = experts.weights
        weight, scale, bias = (getattr(weights, name + part) for part in ("", "_scale", "_bias"))
        return ffn.product(
            x,
            ring.weight[slot, : weight.shape[1]],
            None if scale is None else ring.scale[slot, : scale.shape[1]],
            None if bias is None else ring.bias[slot],
            factor,
        )

    def first_products(self, experts: Experts, visit: jax.Array, count: jax.Array) -> None:
        """H = gated(x gate, x up)."""

        def slice_(part: jax.Array, slot: jax.Array) -> None:
            columns = pl.ds(
                pl.multiple_of(part * self.plan.inter_slice, LANES), self.plan.inter_slice
            )

            def compute(size: int) -> None:
                x = self.vmem.x[:size]
                factor = self.vmem.factors[SCALE_OF, :size, :1]
                gate = self.projection(experts, "gate", x, slot, factor)
                up = self.projection(experts, "up", x, slot, factor)
                problem = self.problem
                self.vmem.h[:size, columns] = gated(gate, up, problem.activation, problem.limit)

            self.sized(count, compute)

        self.each_slice(experts, ("gate", "up"), visit, slice_)

    def narrow_h(self, experts: Experts, count: jax.Array) -> None:
        """H in the type of the second product, each row with its own scale if that is quantised."""
        inter = experts.shape.inter

        def group(i: jax.Array) -> None:
            h = rows(self.vmem.h, i * ROWS, ROWS)[:, :inter]
            scale = jnp.ones((ROWS, 1), jnp.float32)
            if self.problem.quantised:
                amax = jnp.max(jnp.abs(h), axis=1, keepdims=True)
                scale = row_scale(amax, self.problem.row_dtype)
                h = narrow(h * (1 / scale), self.problem.row_dtype)
            rows(self.vmem.hq, i * ROWS, ROWS)[:, :inter] = h.astype(self.problem.row_dtype)
            wide = jnp.broadcast_to(scale, (ROWS, LANES))
            rows(self.vmem.h_scale, i * ROWS, ROWS)[...] = wide

        repeat((count + ROWS - 1) // ROWS, group)

    def second_product(self, experts: Experts, visit: jax.Array, count: jax.Array) -> None:
        """Y = weight * (h down), added to what is there for rows that resume a sum."""

        def slice_(part: jax.Array, slot: jax.Array) -> None:
            columns = pl.ds(
                pl.multiple_of(part * self.plan.hidden_slice, LANES), self.plan.hidden_slice
            )

            def compute(size: int) -> None:
                x = self.vmem.hq[:size, : experts.shape.inter]
                factor = self.vmem.h_scale[:size, :1]
                weight = self.vmem.factors[WEIGHT_OF, :size, :1]
                resumes = self.vmem.factors[RESUMES, :size, :1] > 0
                y = weight * self.projection(experts, "down", x, slot, factor)
                self.vmem.y[:size, columns] = y + jnp.where(
                    resumes, self.vmem.y[:size, columns], 0.0
                )

            self.sized(count, compute)

        self.each_slice(experts, ("down",), visit, slice_)

    def pack(self, slot: jax.Array, count: jax.Array) -> None:
        """Packs the results of a tile, once what is leaving from there is gone."""
        self.wait_leaving(slot)

        def group(i: jax.Array) -> None:
            y = rows(self.vmem.y, i * ROWS, ROWS)
            target = rows(self.vmem.out.at[slot], i * ROWS, ROWS)
            no_tail = jnp.zeros((ROWS, LANES), jnp.int32)
            self.problem.rows_back.store(lambda part: y[:, part], target, no_tail)

        repeat((count + ROWS - 1) // ROWS, group)

    def wait_leaving(self, slot: Any) -> None:
        """Waits until a buffer of results may be written."""
        counts = self.vmem.books.counts
        leaving = self.vmem.sems.leaving.at[slot]
        wait_rows(self.hbm.returned, leaving, counts[LEAVING + slot])
        counts[LEAVING + slot] = 0

    # Visits

    def visit_routed(self, experts: Experts, visit: jax.Array) -> None:
        """One tile of a routed expert."""
        slot, books = visit & 1, self.vmem.books
        count = books.spans[slot, 2 * self.problem.num_devices]
        wait_rows(self.hbm.received, self.vmem.sems.gathered.at[slot], count)
        self.unpack(slot, count, self.routed_factors(experts.expert(visit)))
        self.load_partials(slot)
        self.first_products(experts, visit, count)
        self.gather(visit + 1)
        self.narrow_h(experts, count)
        wait_rows(self.hbm.partials, self.vmem.sems.partial.at[1], books.counts[LOADING])
        books.counts[LOADING] = 0
        self.second_product(experts, visit, count)
        self.pack(slot, count)
        self.send_home(slot)

    def send_home(self, slot: jax.Array) -> None:
        """Starts moving a tile's results to their tokens' devices, and sums to the partials."""
        books, sems = self.vmem.books, self.vmem.sems

        def finished(device: Any, r: jax.Array) -> None:
            code = books.codes[slot, r]
            brought = (code >> TOKEN_BITS & SLOT) * self.problem.num_tokens + (code & TOKEN)
            result, home = row(self.vmem.out.at[slot], r), row(self.hbm.returned, brought)
            if device is None:
                start(result, home, sems.leaving.at[slot])
            else:
                self.send(result, home, sems.leaving.at[slot], sems.home.at[0], device)

        def one_of_several(device: Any, r: jax.Array) -> None:
            last = books.codes[slot, r] & LAST != 0

            @pl.when(last)
            def _() -> None:
                finished(device, r)
                books.counts[LEAVING + slot] += 1

            @pl.when(~last)
            def _() -> None:
                partial = row(self.hbm.partials, books.places[slot, r])
                start(row(self.vmem.y, r), partial, sems.partial.at[0])
                books.counts[STORING] += 1

        def alone(s: jax.Array) -> jax.Array:
            return books.spans[slot, 2 * s + 1] - books.spans[slot, 2 * s]

        count = lax.fori_loop(
            0, self.problem.num_devices, lambda s, total: total + alone(s), jnp.int32(0)
        )
        books.counts[LEAVING + slot] = count
        self.each_row(slot, finished, one_of_several)

    def visit_shared(self, experts: Experts, visit: jax.Array) -> None:
        """One tile of the shared expert: consecutive own tokens."""
        slot, sems = visit & 1, self.vmem.sems
        first = visit * self.plan.tile
        count = jnp.minimum(self.problem.num_tokens - first, self.plan.tile)
        count = pl.multiple_of(count, ROWS)
        words = rows(self.vmem.words.at[slot], 0, count)
        own = self.me * self.problem.num_tokens + first
        start(rows(self.hbm.received, own, count), words, sems.gathered.at[slot])
        wait_rows(self.hbm.received, sems.gathered.at[slot], count)
        one, zero = jnp.ones((ROWS, 1), jnp.float32), jnp.zeros((ROWS, 1), jnp.float32)
        self.unpack(slot, count, lambda tail: (self.scale(tail), one, zero))
        self.first_products(experts, visit, count)

        @pl.when(visit == self.shared_visits - 1)
        def _() -> None:
            self.gather(visit + 1)

        self.narrow_h(experts, count)
        self.second_product(experts, visit, count)
        self.pack(slot, count)
        home = rows(self.hbm.returned, self.problem.top_k * self.problem.num_tokens + first, count)
        start(rows(self.vmem.out.at[slot], 0, count), home, sems.leaving.at[slot])
        self.vmem.books.counts[LEAVING + slot] = count
