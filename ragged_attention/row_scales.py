"""Scales of rows: from the pool into the order of the list of pages, and to the lanes of logits.

A page's scales are too few to be worth a transfer. So XLA gathers those of all listed pages before
the kernel, as blocks of 128 keys; a tile's are then one transfer, whatever its pages. Where pages
are shorter than a block a tile may begin within one, and its scales are moved to the front.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ragged_attention.flash import iota
from ragged_attention.layout import LANES, round_up
from ragged_attention.plan import Problem
from ragged_attention.plumbing import LANE_BITS, Plumbing
from ragged_attention.schedule import WRITES, Noted
from tpukit.buffers import repeat

Ref = Any


def listed(scale: jax.Array, indices: jax.Array, problem: Problem) -> jax.Array:
    """[blocks, kv_heads, 128] f32: scales of rows in the order of the list of pages.

    Args:
      scale: [pages, page_size, kv_heads] f32.
      indices: [n] int32 pages; one that is not in the pool has anything, see `erase_scales`.
      problem: static facts of the call.
    """
    heads, size = problem.layout.kv_heads, problem.layout.page_size
    place = jnp.clip(indices, 0, problem.num_pages - 1)
    least = round_up(max(len(place), 1), max(LANES // size, 1))
    place = jnp.pad(place, (0, least - len(place)))
    if size >= LANES:
        found = scale.at[place].get(mode="promise_in_bounds")
        return found.reshape(-1, LANES, heads).swapaxes(1, 2)
    found = scale.swapaxes(1, 2).at[place].get(mode="promise_in_bounds")  # as they lie in HBM
    found = found.reshape(-1, LANES // size, heads, size).swapaxes(1, 2)
    return found.reshape(-1, heads, LANES)


@dataclasses.dataclass(frozen=True)
class RowScales(Plumbing):
    """A tile's scales: they come in beside it, and are read by chunk and head."""

    @property
    def scale_rings(self) -> list[tuple[Ref, Ref]]:
        """Where scales lie in HBM, and their buffers: of keys, of values, of neither."""
        sources = (self.hbm.k_scales, self.hbm.v_scales)
        rings = zip(sources, (self.vmem.k_scales, self.vmem.v_scales), strict=True)
        return [(source, ring) for source, ring in rings if source is not None]

    def scale_place(self, record: Noted) -> tuple[jax.Array, Any, jax.Array]:
        """The first block with scales of a tile, the tile's first lane in it, and how many."""
        first = record.page * self.layout.page_size
        lane = first & (LANES - 1) if self.layout.page_size < LANES else 0
        count = (lane + record.span + LANES - 1) >> LANE_BITS
        if self.walk.limits.may_write_ahead:
            count = jnp.where(record.has(WRITES), 0, count)
        return first >> LANE_BITS, lane, count

    def scale_copies(self, slot: jax.Array, first: Any, count: jax.Array) -> list[Any]:
        """The transfers of a tile's scales."""
        blocks, sem = pl.ds(0, count), self.vmem.sems.row_scales.at[slot]
        return [
            pltpu.make_async_copy(source.at[pl.ds(first, count)], ring.at[slot, blocks], sem)
            for source, ring in self.scale_rings
        ]

    def fetch_scales(self, record: Noted, slot: jax.Array) -> None:
        """Starts to fetch a tile's scales."""
        if not self.problem.row_scales:
            return
        first, _, count = self.scale_place(record)

        @pl.when(count > 0)
        def _() -> None:
            for copy in self.scale_copies(slot, first, count):
                copy.start()

    def await_scales(self, record: Noted, slot: jax.Array) -> None:
        """Waits for a tile's scales, and moves the first to lane 0."""
        if not self.problem.row_scales:
            return
        lane, count = self.scale_place(record)[1:]

        @pl.when(count > 0)
        def _() -> None:
            for copy in self.scale_copies(slot, 0, count):
                copy.wait()

        def move(i: jax.Array) -> None:
            for _, ring in self.scale_rings:
                here, behind = (pltpu.roll(ring[slot, i + j], LANES - lane, 1) for j in range(2))
                ring[slot, i] = jnp.where(iota(here.shape, 1) < LANES - lane, here, behind)

        if self.layout.page_size < LANES:
            most = self.plan.keys // LANES  # the last block has no other behind it
            repeat(jnp.where(lane == 0, 0, jnp.minimum(count, most)), move)

    def erase_scales(self, slot: jax.Array, place: jax.Array) -> None:
        """Scales of a page that is not in the pool are 1: it reads as zeros, and not as NaN."""
        size = self.layout.page_size
        first = place * size
        for _, ring in self.scale_rings:
            for i in range(max(size // LANES, 1)):
                block = (first >> LANE_BITS) + i
                here = ring[slot, block]
                lane = iota(here.shape, 1) - (first & (LANES - 1))
                ring[slot, block] = jnp.where((lane >= 0) & (lane < size), 1.0, here)

    def scales_of(self, ring: Ref, head: Any, slot: jax.Array, begin: Any, size: int) -> jax.Array:
        """[1, size] scales of a head for keys of a tile, from `begin` on, in the keys' order."""
        row, first = pl.ds(head, 1), begin >> LANE_BITS
        blocks = [ring[slot, first + i, row] for i in range(size // LANES)]
        if self.layout.words_per_row == 2:
            pairs = zip(blocks[::2], blocks[1::2], strict=True)
            blocks = [self.half_of(pair, half) for pair in pairs for half in (0, 1)]
        return jnp.concatenate(blocks, axis=1)

    def half_of(self, pair: tuple[jax.Array, jax.Array], half: int) -> jax.Array:
        """[1, 128] scales of the first or second halves of groups, from those of 256 keys."""
        run = self.layout.run
        found, lane = pair[0], iota(pair[0].shape, 1)
        for part in range(LANES // run):
            block, first = divmod((2 * part + half) * run, LANES)
            moved = pltpu.roll(pair[block], (part * run - first) % LANES, 1)
            found = jnp.where(lane // run == part, moved, found)
        return found
