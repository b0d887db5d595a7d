"""The kernel: one pass over the records of a batch.

While a record is computed, later tiles and blocks are on their way. Per record: new rows are put
into the tile and the tile's changed groups are written to the cache; then every key/value head's
queries, its query heads one after another and each with all tokens of the block, meet the tile, as
rows (`rows.py`) or, where they are many, as columns (`columns.py`).
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
from jax.experimental.pallas import tpu as pltpu

from ragged_attention.chunks import Chunk
from ragged_attention.columns import Columns
from ragged_attention.layout import LANES
from ragged_attention.plan import MANY, VMEM_LEFT, Plan, Problem, Style, style_of
from ragged_attention.plumbing import Operands, Scratch
from ragged_attention.schedule import END, FENCE, FIRST, LAST, WRITES, Batch, Noted
from ragged_attention.tiles import is_missing
from tpukit.buffers import repeat
from tpukit.chips import Chip
from tpukit.compat import in_hbm
from tpukit.manual import manual_axes

Ref = Any


@dataclasses.dataclass(frozen=True)
class Pass(Columns):
    """The walk over the records: who does what when."""

    def run(self) -> None:
        """Fetches ahead, does every record in order, waits for what is still being written."""
        plan = self.plan
        cursor = self.begin()

        def step(at: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            index, cursor = at
            cursor = self.make(index + plan.ahead, cursor)
            if self.walk.limits.may_write_ahead:
                self.pass_fence(index)
            self.start_tile(index + plan.lookahead, index)
            self.start_block(index + plan.blocks - 1)
            self.compute(index)
            return index + 1, cursor

        index, _ = lax.while_loop(
            lambda at: ~self.record(at[0]).has(END), step, (jnp.int32(0), cursor)
        )
        self.end(index)

    def begin(self) -> Any:
        """Starts to fetch what the first records need; returns the cursor behind those made."""
        plan = self.plan

        def clear(slot: jax.Array) -> None:
            self.vmem.stored[slot] = 0

        repeat(plan.tiles, clear)
        self.vmem.leaving[0] = self.vmem.leaving[1] = 0
        if self.layout.keys.width != self.layout.key_dim:  # zeros stay beside the queries
            self.vmem.scaled[...] = jnp.zeros(self.vmem.scaled.shape, self.problem.compute_dtype)
        resident = self.batch_copies() if self.problem.resident else []
        for copy in resident:
            copy.start()
        cursor = self.walk.start()
        if self.problem.streams_pages:  # their lists take their time
            cursor = lax.fori_loop(0, plan.ahead, self.make, cursor)
            repeat(plan.lookahead, lambda i: self.start_tile(i, 0))
        else:
            cursor = lax.fori_loop(0, plan.lookahead, self.make_and_start, cursor)
            cursor = lax.fori_loop(plan.lookahead, plan.ahead, self.make, cursor)
        repeat(plan.blocks - 1, self.start_block)
        for copy in resident:
            copy.wait()
        return cursor

    def end(self, index: jax.Array) -> None:
        """Waits for all that is under way once record `index` is the END."""
        outputs = [self.batch_out()] if self.problem.resident else []
        for copy in outputs:
            copy.start()
        if self.problem.update:
            repeat(self.plan.tiles, self.await_store)
        for copy in outputs:
            copy.wait()
        repeat(2, self.await_out)

        def forget(i: jax.Array) -> None:  # what was fetched for records that are not there
            record = self.record(index + i)
            self.indices(record.slot, record.page, lambda copy: copy.wait())

        if self.problem.streams_pages:
            repeat(self.plan.ahead, forget)

    def make_and_start(self, index: jax.Array, cursor: Any) -> Any:
        """Makes one of the first records and starts to fetch its tile."""
        cursor = self.make(index, cursor)
        self.start_tile(index, 0)
        return cursor

    def pass_fence(self, index: jax.Array) -> None:
        """Behind a fence all is in the cache; what waited for that is fetched now."""

        @pl.when(self.record(index).has(FENCE))
        def _() -> None:
            repeat(self.plan.tiles, self.await_store)
            repeat(self.plan.lookahead, lambda i: self.start_tile(index + i, index))

    def compute(self, index: jax.Array) -> None:
        """Writes a record's new rows; attends with its block."""
        record, slot = self.record(index), self.tile(index)
        self.await_tile(slot)
        self.await_scales(record, slot)
        fresh = record.cached < record.span
        if self.problem.update:

            @pl.when(fresh)
            def _() -> None:
                place = self.fresh_slot(index)
                self.await_fresh(record, place)
                if self.walk.limits.may_write_ahead:
                    self.await_store(slot)
                self.mend(record, slot, self.vmem.fresh.at[place])
                begin, end = self.whole_group(record.cached), self.groups(record.span)
                self.store_groups(record, slot, begin, end)

        ragged = ~fresh & (self.groups(record.span) > self.whole_group(record.span))

        @pl.when(ragged | is_missing(self.vmem.missing[slot]))
        def _() -> None:
            @pl.when(ragged)
            def _() -> None:
                self.mend(record, slot, None)

            self.erase_pages(record, slot)

        def attend(tokens: int) -> None:
            self.attend(record, slot, style_of(self.problem, tokens, self.chip))

        def attend_all() -> None:
            smallest(record.count, self.plan.query_sizes, attend)

        whether(~record.has(WRITES), self.walk.limits.may_write_ahead, attend_all)

    def attend(self, record: Noted, slot: jax.Array, style: Style) -> None:
        """One tile for one block."""
        # Of one resident token, to do it all again is less than a branch.
        branch = style.tokens > 1 or not self.problem.resident
        chunk, meet = self.plan.chunk, self.columns if style.columns else self.rows
        sizes = self.plan.key_sizes(style)

        def first() -> None:
            self.open(record, style)
            if style.columns:
                self.look(record, slot, style)

        whether(record.has(FIRST), branch, first)

        def whole(i: jax.Array) -> None:
            begin = i * chunk
            meet(record, Chunk(slot, begin, chunk, chunk, chunk), style)

        def partial(i: jax.Array) -> None:
            begin = i * chunk

            def part(size: int) -> None:
                full = max([0, *(smaller for smaller in sizes if smaller < size)])
                step = LANES * self.layout.words_per_row
                doubtful = max(full - style.tokens, 0) // step * step
                doubtful = 0 if self.problem.windowed else doubtful
                meet(record, Chunk(slot, begin, size, full, doubtful), style)

            smallest(record.span - begin, sizes, part)

        bits = chunk.bit_length() - 1
        if style.tokens == 1 and not (self.problem.windowed or self.problem.tree):  # it sees all
            last = jnp.maximum(record.span - 1, 0) >> bits
            repeat(last, whole)
            partial(last)
        else:
            some = (record.span + chunk - 1) >> bits
            sure = self.all_seen(record) >> bits if style.tokens >= MANY else 0
            if style.tokens >= MANY:
                repeat(sure, whole)
            lax.fori_loop(sure, some, lambda i, _: partial(i), None)
            if style.columns:
                self.catch_up(record, slot, style, some)
        whether(record.has(LAST), branch, lambda: self.close(record, style))

    def all_seen(self, record: Noted) -> jax.Array:
        """How many keys of a tile, from the first on, every query of the block sees."""
        seen = record.span
        if self.problem.causal:
            own = 0 if self.problem.tree else 1  # a draft need not see itself
            seen = jnp.clip(record.position + own - record.key, 0, seen)
        if self.problem.windowed:
            oldest = record.position + record.count - record.window
            seen = jnp.where((record.window == 0) | (record.key > oldest), seen, 0)
        return seen


def whether(condition: jax.Array, matters: bool, action: Callable[[], None]) -> None:
    """action(), if the condition holds or does not matter."""
    if matters:
        pl.when(condition)(action)
    else:
        action()


def smallest(value: jax.Array, sizes: tuple[int, ...], action: Callable[[int], None]) -> None:
    """action(s) for the smallest of ascending sizes that is at least `value`; few branches."""
    if len(sizes) == 1:
        action(sizes[0])
        return
    half = len(sizes) // 2
    low, high = sizes[:half], sizes[half:]
    lax.cond(
        value <= low[-1],
        lambda _: smallest(value, low, action),
        lambda _: smallest(value, high, action),
        None,
    )


def ragged_attention_kernel(
    batch: Batch,
    operands: dict[str, jax.Array],
    *,
    problem: Problem,
    plan: Plan,
    chip: Chip,
    interpret: Any = False,
    bounds_checks: bool = True,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Runs the kernel.

    Args:
      batch: int32 arrays.
      operands: the inputs among `Operands`, by name.
      problem: static facts of the call.
      plan: block sizes.
      chip: the chip planned for.
      interpret: parameters of interpretation, or False.
      bounds_checks: the compiler's checks of transfers.

    Returns:
      o [T, q_heads, value_dim], the logarithms [T, lanes] if wanted, and the cache.
    """
    names = [name for name in Operands._fields if name in operands]
    scalars = len(batch) + (1 if problem.streams_pages else 2)  # and scales, and a list of pages
    local = {"scales", "sinks"} if problem.streams_pages else {"scales", "sinks", "indices"}
    inputs = {
        name: x if interpret or name in local else in_hbm(x, aliased=name == "cache")
        for name, x in operands.items()
    }
    axes = manual_axes(*batch, *operands.values())
    like = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=axes)
    shape = (problem.num_tokens, problem.q_heads, problem.layout.value_dim)
    outputs = {"o": like(shape, problem.dtype)}
    if problem.lse:
        outputs["lse"] = like((problem.num_tokens, problem.lse_lanes), jnp.float32)
    outputs["cache"] = like(operands["cache"].shape, jnp.int32)

    def body(*refs: Ref) -> None:
        described, refs = Batch(*refs[: len(batch)]), refs[len(batch) :]
        given = dict(zip(names, refs, strict=False)) | dict(
            zip(outputs, refs[len(names) :], strict=False)
        )
        hbm = Operands(*(given.get(name) for name in Operands._fields))
        Pass(problem, plan, described, hbm, refs[-1], chip).run()

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    results = pl.pallas_call(
        body,
        name="ragged_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=(1,),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.VMEM) if name == "sinks" else hbm
                for name in names[scalars - len(batch) :]
            ],
            out_specs=[hbm] * len(outputs),
            scratch_shapes=[Scratch.shapes(problem, plan, chip)],
        ),
        out_shape=list(outputs.values()),
        input_output_aliases={len(batch) + names.index("cache"): len(outputs) - 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=chip.vmem_bytes - VMEM_LEFT,
            disable_bounds_checks=not bounds_checks,
        ),
        interpret=interpret,
    )(*batch, *(inputs[name] for name in names))
    found = dict(zip(outputs, results, strict=True))
    return found["o"], found.get("lse"), found["cache"]
