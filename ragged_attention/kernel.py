"""The kernel: one pass over the records of a batch.

While a record is computed, later tiles and blocks are on their way. Per record: new rows are put
into the tile and the tile's changed groups are written to the cache; then every key/value head's
rows, its query heads one after another and each with all tokens of the block, meet the tile.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ragged_attention import flash
from ragged_attention.blocks import Blocks
from ragged_attention.flash import UNSEEN, iota
from ragged_attention.layout import LANES
from ragged_attention.plan import (
    HEADS_AT_ONCE,
    MANY,
    VMEM_LEFT,
    Plan,
    Problem,
    Style,
    style_of,
)
from ragged_attention.plumbing import Operands, Scratch, repeat
from ragged_attention.schedule import END, FENCE, FIRST, LAST, Batch, Noted
from tpukit.chips import Chip
from tpukit.manual import manual_axes

Ref = Any


class Tile(NamedTuple):
    """A record's tile as it is computed.

    Attributes:
      slot: its buffer.
      size: keys that are computed.
      full: at least so many of them are the tile's.
      doubtful: from this one on queries may not see them.
    """

    slot: jax.Array
    size: int
    full: int
    doubtful: int


class Strip(NamedTuple):
    """Rows of a head that are computed together."""

    head: Any
    rows: slice


@dataclasses.dataclass(frozen=True)
class Pass(Blocks):
    """The walk over the records: who does what when."""

    def run(self) -> None:
        """Fetches ahead, does every record in order, waits for what is still being written."""
        plan = self.plan

        def clear(slot: jax.Array) -> None:
            self.vmem.stored[slot] = 0

        repeat(plan.tiles, clear)
        self.vmem.leaving[0] = self.vmem.leaving[1] = 0
        if self.layout.keys.width != self.layout.key_dim:  # zeros stay beside the queries
            self.vmem.scaled[...] = jnp.zeros(self.vmem.scaled.shape, self.problem.compute_dtype)
        cursor = lax.fori_loop(0, plan.ahead, self.make, self.walk.start())
        repeat(plan.lookahead, lambda i: self.start_tile(i, 0))
        repeat(plan.blocks - 1, self.start_block)

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
        if self.problem.update:
            repeat(plan.tiles, self.await_store)
        repeat(2, self.await_out)

        def forget(i: jax.Array) -> None:  # what was fetched for records that are not there
            record = self.record(index + i)
            self.indices(record.slot, record.page, lambda copy: copy.wait())

        if self.problem.streams_pages:
            repeat(plan.ahead, forget)

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
        fresh = record.cached < record.span
        if self.problem.update:

            @pl.when(fresh)
            def _() -> None:
                place = self.fresh_slot(index)
                self.fresh_copy(record, place).wait()
                self.mend(record, slot, self.vmem.fresh.at[place])
                begin, end = self.whole_group(record.cached), self.groups(record.span)
                self.store_groups(record, slot, begin, end)

        @pl.when(~fresh & (self.groups(record.span) > self.whole_group(record.span)))
        def _() -> None:
            self.mend(record, slot, None)

        self.erase_pages(record, slot)

        def attend(tokens: int) -> None:
            self.attend(record, slot, style_of(self.problem, tokens, self.side))

        @pl.when(record.count > 0)
        def _() -> None:
            smallest(record.count, self.plan.query_sizes, attend)

    def attend(self, record: Noted, slot: jax.Array, style: Style) -> None:
        """One tile for one block."""

        @pl.when(record.has(FIRST))
        def _() -> None:
            self.open(record, style)

        def part(size: int) -> None:
            full = max([0, *(smaller for smaller in self.plan.key_sizes if smaller < size)])
            doubtful = max(full - style.tokens, 0) // LANES * LANES
            doubtful = 0 if self.problem.windowed else doubtful
            self.heads(record, Tile(slot, size, full, doubtful), style)

        def partial(_: None) -> None:
            @pl.when(record.span > 0)
            def _() -> None:
                smallest(record.span, self.plan.key_sizes, part)

        def whole(_: None) -> None:
            keys = self.plan.keys
            self.heads(record, Tile(slot, keys, keys, keys), style)

        if style.tokens >= MANY:
            lax.cond(self.all_seen(record), whole, partial, None)
        else:
            partial(None)

        @pl.when(record.has(LAST))
        def _() -> None:
            self.close(record, style)

    def all_seen(self, record: Noted) -> jax.Array:
        """Whether every query of the block sees every key of a full tile."""
        seen = record.span == self.plan.keys
        if self.problem.causal:
            seen &= record.key + self.plan.keys <= record.position + 1
        if self.problem.windowed:
            oldest = record.position + record.count - record.window
            seen &= (record.window == 0) | (record.key > oldest)
        return seen

    # Tiles are attended to.

    def heads(self, record: Noted, tile: Tile, style: Style) -> None:
        """All heads; the logits of a strip are made while the strip before is folded in."""
        heads = self.layout.kv_heads
        step = heads if style.unrolled else math.gcd(heads, HEADS_AT_ONCE)

        def some(i: Any) -> None:
            strips = [Strip(i * step + h, rows) for h in range(step) for rows in style.strips]
            self.strips(record, tile, style, strips)

        if step == heads:
            some(0)
        else:
            repeat(heads // step, some)

    def strips(self, record: Noted, tile: Tile, style: Style, strips: list[Strip]) -> None:
        """Strips of rows, one after another."""
        masks: dict[tuple[int, int], jax.Array] = {}
        keys: dict[int, jax.Array] = {}
        values: dict[int, jax.Array] = {}

        def once(cache: dict[int, jax.Array], key: Any, make: Any) -> jax.Array:
            if id(key) not in cache:
                cache[id(key)] = make(key)
            return cache[id(key)]

        def logits(strip: Strip) -> jax.Array:
            k = once(keys, strip.head, lambda h: self.keys_of(h, tile))
            q = self.vmem.scaled[strip.head, strip.rows, : k.shape[1] * (1 + style.split)]
            s = flash.logits(q, k, self.factor(strip.head), self.problem.soft_cap)
            if tile.doubtful == tile.size:
                return s
            rows = strip.rows.start % style.tokens, strip.rows.stop - strip.rows.start
            if rows not in masks:
                masks[rows] = self.seen(record, tile, style, strip.rows)
            known, doubtful = s[:, : tile.doubtful], s[:, tile.doubtful :]
            doubtful = jnp.where(masks[rows], doubtful, UNSEEN)
            return jnp.concatenate([known, doubtful], axis=1) if tile.doubtful else doubtful

        def fold(strip: Strip, s: jax.Array) -> None:
            head, rows = strip
            state = self.known(head, rows, style, opens)
            v = once(values, head, lambda h: self.values_of(record, h, tile))
            state = flash.fold(state, s, v, self.problem.compute_dtype, style.sum_by_matmul)
            for ref, new in zip(refs, state, strict=True):
                ref[head, rows] = new

        refs, opens = (self.vmem.top, self.vmem.total, self.vmem.sum), record.has(FIRST)
        before = None
        for strip in strips:
            s = logits(strip)
            if before is not None:
                fold(*before)
            before = strip, s
        if before is not None:
            fold(*before)

    def words(self, window: Any, head: Any, tile: Tile) -> jax.Array:
        """Words of a head's keys or values."""
        lane = window.lane(head)
        lane = lane if isinstance(lane, int) else pl.multiple_of(lane, LANES)
        return self.vmem.tiles[
            tile.slot, : tile.size // self.layout.pack, pl.ds(lane, window.width)
        ]

    def keys_of(self, head: Any, tile: Tile) -> jax.Array:
        """[size, key lanes]."""
        words = self.words(self.layout.keys, head, tile)
        return flash.unpacked(words, self.layout.dtype, self.problem.compute_dtype)

    def values_of(self, record: Noted, head: Any, tile: Tile) -> jax.Array:
        """[size, value lanes]; zeros behind the tile's last key, where anything may lie."""
        pack = self.layout.pack
        words = self.words(self.layout.vals, head, tile)
        if tile.full < tile.size:
            sure = tile.full // pack
            rows = (record.span + pack - 1) >> (pack.bit_length() - 1)
            last = words[sure:]
            last = jnp.where(sure + iota(last.shape, 0) < rows, last, 0)
            words = jnp.concatenate([words[:sure], last], axis=0) if sure else last
        return flash.unpacked(words, self.layout.dtype, self.problem.compute_dtype)

    def seen(self, record: Noted, tile: Tile, style: Style, rows: slice) -> jax.Array:
        """[rows, doubtful keys] whether a row's query sees a key."""
        shape = (rows.stop - rows.start, tile.size - tile.doubtful)
        key = record.key + tile.doubtful + iota((1, shape[1]), 1)
        token = (rows.start + iota((shape[0], 1), 0)) & (style.tokens - 1)
        query = record.position + token
        seen = jnp.broadcast_to(key < record.key + record.span, shape)
        if self.problem.causal:
            before = key <= query
            if self.problem.tree:
                drafts = record.is_tree == 1
                before = (before & ~drafts) | (self.ancestor(record, style, rows, key) & drafts)
            seen &= before
        if self.problem.windowed:
            seen &= (key > query - record.window) | (record.window == 0)
        return seen

    def ancestor(self, record: Noted, style: Style, rows: slice, key: jax.Array) -> jax.Array:
        """[rows, keys] whether a key is a token's ancestor, or before the request's queries."""
        count = rows.stop - rows.start
        begin, distinct = rows.start % style.tokens, min(count, style.tokens)
        place = (record.row & 7) + begin
        words = self.vmem.tree[self.block_slot(record), pl.ds(place, distinct)]
        if count > distinct:
            words = jnp.concatenate([words] * (count // distinct), axis=0)
        draft = jnp.broadcast_to(key - record.first, (count, key.shape[1]))
        word = jnp.where(draft < 32, words[:, 0:1], words[:, 1:2])
        bit = lax.shift_right_logical(word, draft & 31) & 1
        return (draft < 0) | (bit == 1)


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
    spaces = {"scales": pltpu.SMEM, "sinks": pltpu.VMEM}
    if not problem.streams_pages:
        spaces["indices"] = pltpu.SMEM
    inputs = {
        name: x if interpret or name in spaces else pltpu.with_memory_space_constraint(x, pltpu.HBM)
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
        scalars, refs = Batch(*refs[: len(batch)]), refs[len(batch) :]
        given = dict(zip(names, refs, strict=False)) | dict(
            zip(outputs, refs[len(names) :], strict=False)
        )
        hbm = Operands(*(given.get(name) for name in Operands._fields))
        Pass(problem, plan, scalars, hbm, refs[-1], chip.mxu_side).run()

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    results = pl.pallas_call(
        body,
        name="ragged_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(batch),
            grid=(1,),
            in_specs=[
                pl.BlockSpec(memory_space=spaces[name]) if name in spaces else hbm for name in names
            ],
            out_specs=[hbm] * len(outputs),
            scratch_shapes=[Scratch.shapes(problem, plan, chip.mxu_side)],
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
