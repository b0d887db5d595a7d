"""Where the kernel's data lies and how it gets there. Knows nothing of what is computed."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gla.fusions import Around, Windows
from gla.plan import OUTPUTS, Plan, Problem
from gla.recurrent import Staged
from gla.schedule import ROWS, SKIP, VERIFY, Batch, Schedule, group_start, in_group
from gla.tables import LANES, ChannelTables, ConstantTables, TokenTables, iota
from gla.tree import Tree
from tpukit.buffers import Index, Stream

Ref = Any


class Operands(NamedTuple):
    """Arrays in HBM, None where the problem has none; pool is written in place."""

    q: Ref  # [T, qk_heads * key_dim]
    k: Ref  # [T, qk_heads * key_dim]
    v: Ref  # [T, heads * value_dim]
    log_decay: Ref  # f32; [heads] in SMEM, [heads / h, T, h] or [T, heads * key_dim]
    words: Ref  # [T, LANES] i32, words of ancestors in lanes 0 and 1
    beta: Ref  # [heads / h, T, h] f32, with the delta rule
    around: Around
    pool: Ref  # [slots, heads, key_dim, value_dim]


class Results(NamedTuple):
    """Arrays in HBM, None where the problem has none."""

    o: Ref  # [T, heads * value_dim]
    pool: Ref  # [slots, heads, key_dim, value_dim]


class Scratch(NamedTuple):
    """On-chip memory; P = plan.inputs, S = plan.states, W = plan.window, h = plan.heads.

    What the problem does not need is None.
    """

    schedule: Schedule
    q: Ref  # [P, W, h / group * key_dim]
    k: Ref  # [P, W, h / group * key_dim]
    v: Ref  # [P, W, h * value_dim]
    o: Ref  # [OUTPUTS, W, h * value_dim]
    states: Ref  # [S, h, key_dim, value_dim] in the type of the pool
    carry: Ref  # [h, key_dim, value_dim] f32: a narrower state between the chunks of a request
    snapshots: Ref  # [2, h, key_dim, value_dim] in the type of the pool
    staged: Staged
    tables: list[Ref]
    betas: Ref  # [P, W, h] f32, with the delta rule
    tree: Tree
    around: Windows
    input_sems: Ref  # [P]
    word_sems: Ref  # [P]
    output_sems: Ref  # [OUTPUTS]
    load_sems: Ref  # [S]
    store_sems: Ref  # [S]
    snapshot_sems: Ref  # [2]

    @staticmethod
    def shapes(problem: Problem, plan: Plan) -> Scratch:
        """Shapes of the fields."""
        qk = (plan.window, plan.heads // problem.group * problem.key_dim)
        vo = (plan.window, plan.heads * problem.value_dim)
        state = (plan.heads, problem.key_dim, problem.value_dim)
        narrow = problem.state_dtype != jnp.float32
        betas = (plan.inputs, plan.window, plan.heads)
        tables = TokenTables if problem.per_token else ConstantTables
        tables = ChannelTables if problem.per_channel else tables
        none: Any = None
        dma, wanted = pltpu.SemaphoreType.DMA, problem.num_snapshots > 0
        return Scratch(
            schedule=Schedule.shapes(problem.limits(plan), problem.num_requests),
            q=pltpu.VMEM((plan.inputs, *qk), problem.dtype) if problem.outputs else None,
            k=pltpu.VMEM((plan.inputs, *qk), problem.dtype),
            v=pltpu.VMEM((plan.inputs, *vo), problem.dtype),
            o=pltpu.VMEM((OUTPUTS, *vo), problem.o_dtype) if problem.outputs else None,
            states=pltpu.VMEM((plan.states, *state), problem.state_dtype),
            carry=pltpu.VMEM(state if narrow else (1, 8, 128), jnp.float32),
            snapshots=pltpu.VMEM((2, *state), problem.state_dtype) if wanted else None,
            staged=Staged.shapes(problem, plan) if problem.outputs else none,
            tables=tables.shapes(problem, plan),
            betas=pltpu.VMEM(betas, jnp.float32) if problem.delta else None,
            tree=Tree.shapes(plan) if problem.tree else none,
            around=Windows.shapes(problem, plan),
            input_sems=dma((plan.inputs,)),
            word_sems=dma((plan.inputs,)) if problem.tree else None,
            output_sems=dma((OUTPUTS,)),
            load_sems=dma((plan.states,)),
            store_sems=dma((plan.states,)),
            snapshot_sems=dma((2,)) if wanted else None,
        )


@dataclasses.dataclass(frozen=True)
class Plumbing:
    """What each transfer of a grid step moves: `block` of plan.heads heads through all items."""

    problem: Problem
    plan: Plan
    scale: float
    block: jax.Array
    batch: Batch
    hbm: Operands
    results: Results
    vmem: Scratch

    @property
    def tables(self) -> ConstantTables | TokenTables | ChannelTables:
        """Where decay factors come from."""
        if self.problem.per_channel:
            steps, *sums = self.vmem.tables
            return ChannelTables(steps, tuple(sums))
        if self.problem.per_token:
            steps, sums, columns = self.vmem.tables
            return TokenTables(steps, sums, columns, self.early_scale, self.problem.form)
        within, rising, falling = self.vmem.tables
        return ConstantTables(within, rising, falling, self.problem.form)

    @property
    def early_scale(self) -> float:
        """What of the scale is in the decay factors."""
        return 1.0 if self.problem.per_channel or self.problem.delta else self.scale

    @property
    def late_scale(self) -> float:
        """What of the scale is not."""
        return self.scale if self.problem.per_channel or self.problem.delta else 1.0

    @property
    def schedule(self) -> Schedule:
        """The work items."""
        return self.vmem.schedule

    @property
    def num_items(self) -> jax.Array:
        """How many there are."""
        return self.schedule.counts[0]

    @property
    def num_requests(self) -> jax.Array:
        """How many requests have rows."""
        return self.schedule.counts[1]

    def begin(self, item: Index) -> jax.Array:
        """The item's first row, counted from the first row of its window, a whole group."""
        return in_group(self.schedule.row[item])

    def end(self, item: Index) -> jax.Array:
        """One past the item's last row, counted likewise."""
        return self.begin(item) + self.schedule.rows[item]

    def lanes(self, width: int) -> Any:
        """The lanes of this block in a row of all heads, `width` of them."""
        if self.plan.heads == self.problem.heads:
            return pl.ds(0, width)
        return pl.ds(pl.multiple_of(self.block * width, LANES), width)

    def rows(self, item: Index, count: jax.Array, first: jax.Array | int = 0) -> Any:
        """`count` rows of HBM from row `first` of the item's window; both multiples of ROWS."""
        base = group_start(self.schedule.row[item]) + first
        return pl.ds(pl.multiple_of(base, ROWS), pl.multiple_of(count, ROWS))

    @property
    def inputs(self) -> Stream:
        """Per item: the groups of q, k, v (and log decays, and gates) that it touches."""

        def copies(item: Index, slot: jax.Array) -> list[Any]:
            rows = self.rows(item, group_start(self.end(item) + ROWS - 1))
            sem = self.vmem.input_sems.at[slot]
            moves = self.tables.copies(self.hbm.log_decay, self.block, rows, slot, sem)
            for source, window in (
                (self.hbm.q, self.vmem.q),
                (self.hbm.k, self.vmem.k),
                (self.hbm.v, self.vmem.v),
                (self.hbm.around.gate, self.vmem.around.gate),
            ):
                if source is None:
                    continue
                part = source.at[rows, self.lanes(window.shape[2])]
                moves.append(pltpu.make_async_copy(part, window.at[slot, pl.ds(0, rows.size)], sem))
            if self.hbm.around.turns is not None:
                window = self.vmem.around.turns.at[slot, pl.ds(0, rows.size)]
                moves.append(pltpu.make_async_copy(self.hbm.around.turns.at[rows], window, sem))
            if self.hbm.beta is not None:
                strengths = self.vmem.betas.at[slot, pl.ds(0, rows.size)]
                source = self.hbm.beta.at[self.block, rows]
                moves.append(pltpu.make_async_copy(source, strengths, sem))
            return moves

        def exists(item: Index) -> jax.Array:
            inside = item < self.num_items
            return inside & (self.schedule.kind[jnp.where(inside, item, 0)] & SKIP == 0)

        return Stream(copies, self.plan.inputs, exists)

    @property
    def words(self) -> Stream:
        """Per item of drafts: their words of ancestors."""

        def copies(item: Index, slot: jax.Array) -> list[Any]:
            rows = self.rows(item, group_start(self.end(item) + ROWS - 1))
            target = self.vmem.tree.words.at[slot, pl.ds(0, rows.size)]
            sem = self.vmem.word_sems.at[slot]
            return [pltpu.make_async_copy(self.hbm.words.at[rows], target, sem)]

        def exists(item: Index) -> jax.Array:
            inside = item < self.num_items
            return inside & (self.schedule.kind[jnp.where(inside, item, 0)] & VERIFY != 0)

        return Stream(copies, self.plan.inputs, exists)

    @property
    def outputs(self) -> Stream:
        """Per item: the groups of o that it completes."""

        def copies(item: Index, slot: jax.Array) -> list[Any]:
            first, count = self.complete(item)
            rows = self.rows(item, count, first)
            part = self.results.o.at[rows, self.lanes(self.vmem.o.shape[2])]
            window = self.vmem.o.at[slot, pl.ds(pl.multiple_of(first, ROWS), rows.size)]
            return [pltpu.make_async_copy(window, part, self.vmem.output_sems.at[slot])]

        return Stream(copies, OUTPUTS, lambda item: (item >= 0) & (self.complete(item)[1] > 0))

    def complete(self, item: Index) -> tuple[jax.Array, jax.Array]:
        """First row and rows of the window's groups that need no item after this one."""
        item = jnp.maximum(item, 0)
        if not self.problem.form.reverse:
            return jnp.int32(0), group_start(self.end(item))
        first = group_start(self.begin(item) + ROWS - 1)
        return first, group_start(self.end(item) + ROWS - 1) - first

    def join(self, item: jax.Array) -> None:
        """Takes the other rows of the group that is shared with the item before."""
        slot = self.outputs.slot(item)
        if self.problem.form.reverse:  # its last group is the first of the other window
            bound, mine = in_group(self.end(item)), group_start(self.end(item))
            theirs = jnp.int32(0)
        else:
            bound, mine = self.begin(item), jnp.int32(0)
            theirs = group_start(self.end(jnp.maximum(item - 1, 0)))

        @pl.when(bound > 0)
        def _() -> None:
            other = self.outputs.slot(item - 1)
            earlier = self.vmem.o[other, pl.ds(pl.multiple_of(theirs, ROWS), ROWS)]
            window = self.vmem.o.at[slot, pl.ds(pl.multiple_of(mine, ROWS), ROWS)]
            lower, upper = earlier.astype(jnp.float32), window[...].astype(jnp.float32)
            if self.problem.form.reverse:
                lower, upper = upper, lower
            joined = jnp.where(iota(lower.shape, 0) < bound, lower, upper)
            window[...] = joined.astype(window.dtype)

    def state(self, slot: jax.Array) -> Ref:
        """This block's heads of a slot of the pool."""
        return self.results.pool.at[slot, pl.ds(self.block * self.plan.heads, self.plan.heads)]

    @property
    def loads(self) -> Stream:
        """Per request: its state, if it resumes."""

        def copies(request: Index, slot: jax.Array) -> list[Any]:
            source = self.state(self.schedule.load[request])
            return [
                pltpu.make_async_copy(
                    source, self.vmem.states.at[slot], self.vmem.load_sems.at[slot]
                )
            ]

        def exists(request: Index) -> jax.Array:
            inside = request < self.num_requests
            return inside & (self.schedule.load[jnp.where(inside, request, 0)] >= 0)

        return Stream(copies, self.plan.states, exists)

    @property
    def stores(self) -> Stream:
        """Per request: its state, if it is kept."""

        def copies(request: Index, slot: jax.Array) -> list[Any]:
            target = self.state(self.schedule.store[request])
            return [
                pltpu.make_async_copy(
                    self.vmem.states.at[slot], target, self.vmem.store_sems.at[slot]
                )
            ]

        def exists(request: Index) -> jax.Array:
            inside = (request >= 0) & (request < self.num_requests)
            return inside & (self.schedule.store[jnp.where(inside, request, 0)] >= 0)

        return Stream(copies, self.plan.states, exists)

    @property
    def snapshots(self) -> Stream:
        """Per snapshot: a state to another slot."""

        def copies(number: Index, slot: jax.Array) -> list[Any]:
            target = self.state(self.schedule.target[number])
            source, sem = self.vmem.snapshots.at[slot], self.vmem.snapshot_sems.at[slot]
            return [pltpu.make_async_copy(source, target, sem)]

        return Stream(copies, 2, lambda number: jnp.int32(number) >= 0)
