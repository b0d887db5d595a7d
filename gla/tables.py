"""Decay factors inside the kernel: where they come from and how a head reads them.

Sources with one face. `ConstantTables` (one log decay per head) builds tables of powers once per
grid step and only slices them afterwards. `TokenTables` (one log decay per token and head) sums a
window's log decays once per item and takes exponentials of their differences. `ChannelTables` (one
per token and key channel) fetches them; `gla.channel` does the rest.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gla import channel
from gla.chunk import Decays, iota
from gla.plan import Plan, Problem
from gla.schedule import ROWS, Form
from reference.gla import clip_log_decay

Ref = Any
LANES = 128


def spread(x: jax.Array, width: int) -> jax.Array:
    """X [n, LANES], the same in all lanes, as [n, width]."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


def power(g: jax.Array, exponent: jax.Array) -> jax.Array:
    """e^(g exponent) where exponent >= 0, else 0."""
    return jnp.where(exponent >= 0, jnp.exp(g * jnp.maximum(exponent, 0).astype(jnp.float32)), 0.0)


@dataclasses.dataclass(frozen=True)
class ConstantTables:
    """Powers of each head's decay, the same in all lanes; W = plan.window, h = plan.heads.

    Attributes:
      within: [h, W, W] scale * e^(g (i - j)) for j <= i, else 0; transposed if time is reversed.
      rising: [h, 2 ROWS + W, LANES] row ROWS + n holds scale * e^(g n) for n >= 0, else 0.
      falling: [h, 2 W, LANES] row W - n holds e^(g n) for n >= 0, else 0.
      form: of the recurrence; one that is reversed or late, but not both, has the scale in
        `falling`, and its sums of decays leave out that of row i or j itself.
    """

    within: Ref
    rising: Ref
    falling: Ref
    form: Form

    @staticmethod
    def shapes(problem: Problem, plan: Plan) -> list[Any]:
        """Shapes of the attributes."""
        heads, window = plan.heads, plan.window
        return [
            pltpu.VMEM((heads, window, window), jnp.float32),
            pltpu.VMEM((heads, 2 * ROWS + window, LANES), jnp.float32),
            pltpu.VMEM((heads, 2 * window, LANES), jnp.float32),
        ]

    def build(self, log_decay: Ref, block: jax.Array, scale: float) -> None:
        """Fills the tables of a grid step. log_decay: [heads] f32 in SMEM."""
        heads, window, _ = self.within.shape

        def fill(h: jax.Array, _: None) -> None:
            g = clip_log_decay(log_decay[block * heads + h])
            square = (window, window)
            reader = int(self.form.reverse)
            self.within[h] = scale * power(g, iota(square, reader) - iota(square, 1 - reader))
            up, down = (1.0, scale) if self.form.short else (scale, 1.0)
            self.rising[h] = up * power(g, iota(self.rising.shape[1:], 0) - ROWS)
            self.falling[h] = down * power(g, window - iota(self.falling.shape[1:], 0))

        lax.fori_loop(0, heads, fill, None)

    def copies(
        self, log_decay: Ref, block: jax.Array, rows: Any, slot: jax.Array, sem: Ref
    ) -> list[Any]:
        """DMAs of an item: none."""
        return []

    def open(self, slot: jax.Array, begin: jax.Array, end: jax.Array, size: int) -> None:
        """Prepares an item: nothing to do."""

    def row(self, log_decay: Ref, block: jax.Array) -> jax.Array:
        """[1, heads] log decays. log_decay: [heads] f32 in SMEM."""
        heads = self.within.shape[0]
        steps = jnp.zeros((1, heads), jnp.float32)
        for h in range(heads):
            steps = jnp.where(iota(steps.shape, 1) == h, log_decay[block * heads + h], steps)
        return clip_log_decay(steps)

    def chunk(
        self, h: int, begin: jax.Array, end: jax.Array, size: int, dims: tuple[int, int]
    ) -> Decays:
        """Factors of head h over a window of `size` rows whose rows [begin, end) are the chunk."""
        window = self.within.shape[1]
        key_dim, value_dim = dims
        own = 0 if self.form.short else 1
        since = self.rising[h, pl.ds(ROWS + own - begin, size)]
        until = self.falling[h, pl.ds(window + own - end, size)]
        if self.form.short:
            whole = self.rising[h, pl.ds(ROWS + (end - begin), 1)]
        else:
            whole = self.falling[h, pl.ds(window - (end - begin), 1)]
        if self.form.reverse:
            since, until = until, since
        return Decays(
            within=self.within[h, :size, :size],
            since=spread(since, value_dim),
            until=spread(until, key_dim),
            whole=spread(whole, value_dim),
        )

    def token(self, h: int, slot: jax.Array, row: jax.Array, width: int) -> jax.Array:
        """[1, width] decay of one token."""
        window = self.within.shape[1]
        return spread(self.falling[h, window - 1 : window], width)


@dataclasses.dataclass(frozen=True)
class TokenTables:
    """Sums of a window's log decays; P = plan.inputs, W = plan.window, h = plan.heads.

    Attributes:
      steps: [P, W, h] log decays as fetched.
      sums: [W + 8, h] sum of the item's log decays up to and including each row, or leaving it out
        where the form is short; row W has the sum of all.
      columns: [h, W] the same, transposed.
      scale: of the output.
      form: of the recurrence.
    """

    steps: Ref
    sums: Ref
    columns: Ref
    scale: float
    form: Form

    @staticmethod
    def shapes(problem: Problem, plan: Plan) -> list[Any]:
        """Shapes of the attributes."""
        heads, window = plan.heads, plan.window
        return [
            pltpu.VMEM((plan.inputs, window, heads), jnp.float32),
            pltpu.VMEM((window + 8, heads), jnp.float32),
            pltpu.VMEM((heads, window), jnp.float32),
        ]

    def build(self, log_decay: Ref, block: jax.Array, scale: float) -> None:
        """Prepares a grid step: nothing to do."""

    def copies(
        self, log_decay: Ref, block: jax.Array, rows: Any, slot: jax.Array, sem: Ref
    ) -> list[Any]:
        """DMAs of an item. log_decay: [heads / h, T, h] f32 in HBM."""
        source = log_decay.at[block, rows]
        return [pltpu.make_async_copy(source, self.steps.at[slot, pl.ds(0, rows.size)], sem)]

    def inside(self, slot: jax.Array, begin: jax.Array, end: jax.Array, size: int) -> jax.Array:
        """[size, h] log decays of the rows [begin, end) of a window, zeros around them."""
        row = iota((size, self.sums.shape[1]), 0)
        inside = (row >= begin) & (row < end)
        return jnp.where(inside, clip_log_decay(self.steps[slot, :size]), 0.0)

    def open(self, slot: jax.Array, begin: jax.Array, end: jax.Array, size: int) -> None:
        """Sums the log decays of an item whose rows are [begin, end) of a window of `size`."""
        row = iota((size, self.sums.shape[1]), 0)
        total = self.inside(slot, begin, end, size)
        step = 1
        while step < size:
            total += jnp.where(row >= step, pltpu.roll(total, step, 0), 0.0)
            step *= 2
        window = self.columns.shape[1]
        self.sums[window : window + 1] = total[size - 1 : size]
        if self.form.short:
            total = jnp.where(row >= 1, pltpu.roll(total, 1, 0), 0.0)
        self.sums[:size] = total
        self.columns[:, :size] = total.T

    def chunk(
        self, h: int, begin: jax.Array, end: jax.Array, size: int, dims: tuple[int, int]
    ) -> Decays:
        """Factors of head h over a window of `size` rows whose rows [begin, end) are the chunk."""
        window = self.columns.shape[1]
        key_dim, value_dim = dims
        upto = jnp.broadcast_to(self.sums[:size, h : h + 1], (size, LANES))  # once for all uses
        last = self.sums[window : window + 1, h : h + 1]
        square = (size, size)
        distance = spread(upto, size) - self.columns[h : h + 1, :size]
        lower = iota(square, 0) >= iota(square, 1)
        since, until = jnp.exp(upto), jnp.exp(last - upto)
        if self.form.reverse:
            distance, lower = -distance, iota(square, 0) <= iota(square, 1)
            since, until = until, since
        if self.form.late:
            until = self.scale * until
        else:
            since = self.scale * since
        return Decays(
            within=self.scale * jnp.exp(jnp.where(lower, distance, -jnp.inf)),
            since=spread(since, value_dim),
            until=spread(until, key_dim),
            whole=jnp.exp(last),
        )

    def token(self, h: int, slot: jax.Array, row: jax.Array, width: int) -> jax.Array:
        """[1, 1] decay of the token in row `row` of the window in buffer `slot`."""
        return jnp.exp(clip_log_decay(self.steps[slot, pl.ds(row, 1), h : h + 1]))


@dataclasses.dataclass(frozen=True)
class ChannelTables:
    """A window's log decays per key channel; P = plan.inputs, W = plan.window, h = plan.heads.

    Attributes:
      steps: [P, W, h * key_dim] log decays as fetched, then 0 outside the chunk.
      sums: per window size `channel.short_sums`; f32, or bf16 and twice side by side.
    """

    steps: Ref
    sums: tuple[Ref, ...]

    @staticmethod
    def shapes(problem: Problem, plan: Plan) -> list[Any]:
        """Shapes of the attributes."""
        steps = (plan.inputs, plan.window, plan.heads * problem.key_dim)
        terms = 1 if problem.dtype == jnp.float32 else 2
        sums = [pltpu.VMEM((4 * size, terms * size), problem.dtype) for size in plan.windows]
        return [pltpu.VMEM(steps, jnp.float32), *sums]

    def build(self, log_decay: Ref, block: jax.Array, scale: float) -> None:
        """Fills the matrices of sums."""
        for sums in self.sums:
            size = sums.shape[0] // 4
            for lane in range(0, sums.shape[1], size):
                sums[:, lane : lane + size] = channel.short_sums(size).astype(sums.dtype)

    def copies(
        self, log_decay: Ref, block: jax.Array, rows: Any, slot: jax.Array, sem: Ref
    ) -> list[Any]:
        """DMAs of an item. log_decay: [T, heads * key_dim] f32 in HBM."""
        width = self.steps.shape[2]
        first = 0 if width == log_decay.shape[1] else pl.multiple_of(block * width, LANES)
        source = log_decay.at[rows, pl.ds(first, width)]
        return [pltpu.make_async_copy(source, self.steps.at[slot, pl.ds(0, rows.size)], sem)]

    def open(self, slot: jax.Array, begin: jax.Array, end: jax.Array, size: int) -> None:
        """Prepares an item: nothing to do."""

    def windows(
        self, heads: range, slot: jax.Array, size: int, key_dim: int
    ) -> list[channel.Decays]:
        """Factors of each of these heads over the first `size` rows of a window."""
        sums = next(sums for sums in self.sums if sums.shape[0] == 4 * size)
        lanes = slice(heads.start * key_dim, heads.stop * key_dim)
        steps = self.steps[slot, :size, lanes]
        return channel.decays_of(clip_log_decay(steps), sums[...], len(heads))
