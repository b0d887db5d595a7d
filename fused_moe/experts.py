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
from fused_moe.dispatch import LANES, LAST, SLOT, TOKEN, TOKEN_BITS
from fused_moe.plumbing import (
    LEAVING,
    LOADING,
    STORING,
    groups,
    row,
    rows,
    start,
    total,
    wait_rows,
)
from fused_moe.rows import lanes, narrow, row_scale, scale_of
from fused_moe.slices import Experts
from fused_moe.spec import ROWS
from fused_moe.tiles import Tiles
from reference.fused_moe import gated
from tpukit.buffers import Stream, repeat

SCALE_OF, WEIGHT_OF, RESUMES = 0, 1, 2  # planes of Scratch.factors


@dataclasses.dataclass(frozen=True)
class Visits(Tiles):
    """What is done with a tile."""

    def run(self) -> None:
        """Visits every tile."""
        for experts in self.experts[:-1]:
            repeat(self.shared_visits, lambda v, experts=experts: self.visit_rows(experts, v))
        routed, n = self.experts[-1], self.shared_visits
        if not n and not self.plan.bulk:
            self.gather(jnp.int32(0))
        visit = self.visit_rows if self.plan.bulk else self.visit_routed

        def step(state: jax.Array) -> jax.Array:
            visit(routed, state)
            return state + 1

        lax.while_loop(lambda v: v < n + self.routed_visits(), step, jnp.int32(n))
        for slot in range(2):
            self.wait_leaving(slot)
        if not self.plan.bulk:
            self.wait_storing()

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

        repeat(groups(count), group)

    def routed_factors(self, expert: jax.Array) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
        """Scale, weight and whether a sum is resumed, from the tails of a routed expert's rows."""
        first = self.me * self.problem.experts_here
        top_k = self.problem.top_k

        def factors(tail: jax.Array) -> tuple[jax.Array, ...]:
            ids = jnp.where(lanes(tail.shape) < top_k, tail, -1)
            weights = pltpu.roll(tail, LANES - top_k, 1)  # slot j's into lane j
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

    def start_shared(self, begin: int, end: int) -> None:
        """Starts slices [begin, end) as far as they are the shared expert's: they need no list."""
        for names in (("gate", "up"), ("down",)):
            for experts in self.experts[:-1]:
                for index in range(begin, end):
                    self.stream(experts, names).start(index)

    def start_routed(self) -> None:
        """Fills the rings with slices of routed experts, where the shared one leaves room."""
        for names in (("gate", "up"), ("down",)):
            for index in range(self.plan.depth):
                self.stream(self.experts[-1], names).start(index)

    def each_slice(
        self,
        experts: Experts,
        names: tuple[str, ...],
        visit: jax.Array,
        action: Callable[..., None],
    ) -> None:
        """action(part, slot) for every slice of a visit, each replaced as soon as it is used."""
        first, count = self.numbers(experts, names)
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

        repeat(groups(count), group)

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
                y = weight * self.projection(experts, "down", x, slot, factor)
                if not self.plan.bulk:
                    resumes = self.vmem.factors[RESUMES, :size, :1] > 0
                    y += jnp.where(resumes, self.vmem.y[:size, columns], 0.0)
                self.vmem.y[:size, columns] = y

            self.sized(count, compute)

        self.each_slice(experts, ("down",), visit, slice_)

    def pack(self, slot: jax.Array, count: jax.Array) -> None:
        """Packs the results of a tile, once what is leaving from there is gone."""
        self.wait_leaving(slot)

        def group(i: jax.Array) -> None:
            y = rows(self.vmem.y, i * ROWS, ROWS)
            target = rows(self.vmem.out.at[slot], i * ROWS, ROWS)
            if self.plan.bulk:
                target[...] = y[...].astype(target.dtype)
                return
            no_tail = jnp.zeros((ROWS, LANES), jnp.int32)
            self.problem.rows_back.store(lambda part: y[:, part], target, no_tail)

        repeat(groups(count), group)

    def wait_leaving(self, slot: Any) -> None:
        """Waits until a buffer of results may be written."""
        counts = self.vmem.books.counts
        leaving = self.vmem.sems.leaving.at[slot]
        wait_rows(self.hbm.returned, leaving, counts[LEAVING + slot])
        counts[LEAVING + slot] = 0

    def visit_routed(self, experts: Experts, visit: jax.Array) -> None:
        """One tile of a routed expert."""
        slot, books = visit & 1, self.vmem.books
        count = books.spans[slot, 2 * self.problem.num_devices]
        wait_rows(self.hbm.received, self.vmem.sems.gathered.at[slot], count)
        self.unpack(slot, count, self.routed_factors(experts.expert(visit)))
        self.first_products(experts, visit, count)
        self.load_partials(slot)
        self.gather(visit + 1)
        self.open_window(visit + 2)
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

        books.counts[LEAVING + slot] = total(self.problem.num_devices, alone)
        self.each_row(slot, finished, one_of_several)

    def visit_rows(self, experts: Experts, visit: jax.Array) -> None:
        """One tile of consecutive rows: of the shared expert, or in bulk of any."""
        slot, bulk, sems = visit & 1, self.plan.bulk, self.vmem.sems
        first, count = experts.rows(visit)
        wait_rows(self.hbm.received, sems.gathered.at[slot], count)
        one, zero = jnp.ones((ROWS, 1), jnp.float32), jnp.zeros((ROWS, 1), jnp.float32)
        if experts.first == self.shared_visits:  # the routed ones
            routed = self.routed_factors(experts.expert(visit))
            self.unpack(slot, count, lambda tail: (*routed(tail)[:2], zero))
        else:
            self.unpack(slot, count, lambda tail: (self.scale(tail), one, zero))
        self.fetch_rows(visit + 2)
        self.first_products(experts, visit, count)
        if not bulk:

            @pl.when(visit == self.shared_visits - 1)
            def _() -> None:
                self.gather(visit + 1)

        self.narrow_h(experts, count)
        self.second_product(experts, visit, count)
        self.pack(slot, count)
        # results of a call's own tokens go behind those of all slots, in bulk where the rows were
        own = (self.problem.top_k - self.me) * self.problem.num_tokens
        home = rows(self.hbm.returned, first if bulk else own + first, count)
        start(rows(self.vmem.out.at[slot], 0, count), home, sems.leaving.at[slot])
        self.vmem.books.counts[LEAVING + slot] = count
