"""The kernel: one pass over the work items of a ragged batch, states updated in place.

Per grid step a block of heads walks through all items. An item's q, k, v rows arrive in a window,
fetched items ahead; a request's state arrives in a ring of states, fetched requests ahead, is
updated by all of the request's items and leaves again. Outputs leave as whole groups of ROWS rows;
a group that two items share waits in VMEM until the second has filled it.
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

from gla import channel, chunk, delta, fusions
from gla.plan import OUTPUTS, Plan, Problem, vmem_allowed
from gla.plumbing import Operands, Plumbing, Results, Scratch
from gla.recurrent import columns_of, decode_token, pick, stage, unpack, unstage
from gla.schedule import (
    CHUNK,
    FIRST,
    FRESH,
    LAST,
    NULL,
    ROWS,
    RUN,
    SKIP,
    SNAPSHOT,
    VERIFY,
    Batch,
    list_items,
)
from gla.shift import shift_rows
from gla.tables import ChannelTables, ConstantTables, iota, spread
from reference.gla import clip_log_decay
from tpukit.buffers import repeat
from tpukit.compat import in_hbm
from tpukit.manual import manual_axes

Ref = Any
DONE = object()


@dataclasses.dataclass(frozen=True)
class Walk(Plumbing):
    """One grid step: who does what when."""

    def run(self) -> None:
        """Fetches ahead, does every item in order, waits for what is still being written."""

        @pl.when(self.block == 0)
        def _() -> None:
            list_items(self.batch, self.schedule, self.problem.limits(self.plan))

        repeat(self.plan.inputs - 1, self.fetch)
        repeat(self.plan.lookahead, self.loads.start)
        self.tables.build(self.hbm.log_decay, self.block, self.early_scale)

        def step(item: jax.Array, _: None) -> None:
            self.fetch(item + self.plan.inputs - 1)
            self.inputs.wait(item)
            if not self.problem.outputs:
                self.compute(item)
                return
            self.outputs.wait(item - OUTPUTS)
            self.norm_inputs(item)
            self.compute(item)
            self.norm_outputs(item)
            self.join(item)
            self.outputs.start(item)

        lax.fori_loop(0, self.num_items, step, None)
        if self.problem.outputs:
            repeat(OUTPUTS, lambda i: self.outputs.wait(self.num_items - OUTPUTS + i))
        repeat(
            self.plan.states, lambda i: self.stores.wait(self.num_requests - self.plan.states + i)
        )
        if self.problem.num_snapshots:
            repeat(2, lambda i: self.snapshots.wait(self.schedule.counts[2] - 2 + i))

    def fetch(self, item: jax.Array) -> None:
        """Starts the transfers of an item's inputs."""
        self.inputs.start(item)
        if self.problem.tree:
            self.words.start(item)

    def norm_inputs(self, item: jax.Array) -> None:
        """Norms and turns the item's q and k, if that is fused."""
        spec, slot = self.problem.prologue, self.inputs.slot(item)
        if spec is not None:
            window, around = self.vmem, self.vmem.around

            @pl.when(self.schedule.kind[item] & SKIP == 0)
            def _() -> None:
                angles, weight = around.turns.at[slot], self.hbm.around.qk_weight
                q, k = window.q.at[slot], window.k.at[slot]
                fusions.apply_norm_rope(q, k, angles, weight, self.end(item), spec)

    def norm_outputs(self, item: jax.Array) -> None:
        """Norms and gates the item's o, if that is fused."""
        spec, slot = self.problem.epilogue, self.inputs.slot(item)
        if spec is not None:
            width = spec.heads_per_group * self.problem.value_dim

            @pl.when(self.schedule.kind[item] & SKIP == 0)
            def _() -> None:
                o, gate = self.vmem.o.at[self.outputs.slot(item)], self.vmem.around.gate.at[slot]
                weight = self.hbm.around.o_weight
                fusions.apply_norm_gate(o, gate, weight, self.end(item), width, spec.eps)

    def compute(self, item: jax.Array) -> None:
        """Fills the item's rows of its output window."""
        kind = self.schedule.kind[item]

        @pl.when(kind & FIRST != 0)
        def _() -> None:
            self.open_request(self.schedule.request[item])

        if self.problem.outputs:

            @pl.when(kind & SKIP != 0)
            def _() -> None:
                slot = self.outputs.slot(item)
                self.vmem.o[slot] = jnp.zeros(self.vmem.o.shape[1:], self.vmem.o.dtype)

        if self.problem.limits(self.plan).runs:

            @pl.when(kind & RUN != 0)
            def _() -> None:
                self.compute_run(item)

        @pl.when(kind & CHUNK != 0)
        def _() -> None:
            self.compute_chunk(item)

        if self.problem.drafts:

            @pl.when(kind & VERIFY != 0)
            def _() -> None:
                self.verify(item)

        if self.problem.num_snapshots:

            @pl.when(kind & SNAPSHOT != 0)
            def _() -> None:
                self.take_snapshot(item)

    def open_request(self, request: jax.Array) -> Ref:
        """Waits for the request's state and fetches another; returns the state's buffer."""
        self.loads.wait(request)
        ahead = request + self.plan.lookahead
        self.stores.wait(jnp.where(ahead < self.num_requests, ahead - self.plan.states, -1))
        self.loads.start(ahead)
        state = self.vmem.states.at[self.loads.slot(request)]

        @pl.when(self.schedule.load[request] == FRESH)
        def _() -> None:
            def clear(h: jax.Array) -> None:
                state[h] = jnp.zeros(state.shape[1:], state.dtype)

            repeat(self.plan.heads, clear)

        return state

    def compute_run(self, item: jax.Array) -> None:
        """Consecutive requests of one token each."""
        slot, begin = self.inputs.slot(item), self.begin(item)
        group = pl.ds(0, ROWS)
        staged = self.vmem.staged
        stage(staged, *(x[slot, group] for x in (self.vmem.q, self.vmem.k, self.vmem.v)))
        if isinstance(self.tables, ChannelTables):
            steps = self.tables.steps[slot, group]
            columns_of(jnp.exp(clip_log_decay(steps)), staged.decay)

        def token(i: jax.Array, _: None) -> None:
            request, row = self.schedule.request[item] + i, begin + i
            state = self.open_request(request)
            null = self.schedule.load[request] == NULL

            @pl.when(null)
            def _() -> None:
                staged.o[:, pl.ds(row, 1)] = jnp.zeros(
                    (staged.o.shape[0], 1, staged.o.shape[2]), jnp.float32
                )

            @pl.when(~null)
            def _() -> None:
                self.decode(state, slot, row)

            self.stores.start(request)

        lax.fori_loop(0, self.schedule.rows[item], token, None)
        self.vmem.o[self.outputs.slot(item), group] = unstage(staged).astype(self.vmem.o.dtype)

    def decode(self, state: Ref, slot: jax.Array, row: jax.Array) -> None:
        """One token through all heads of the block."""
        staged, width = self.vmem.staged, self.problem.value_dim

        def decay(h: int) -> jax.Array:
            if isinstance(self.tables, ChannelTables):
                return spread(pick(staged.decay[h], row), width)
            return self.tables.token(h, slot, row, width)

        def token(h: int) -> tuple[jax.Array, jax.Array]:
            q, k = unpack(staged.qk[h // self.problem.group], row, self.problem.dtype)
            v, before = staged.v[h, pl.ds(row, 1)], state[h].astype(jnp.float32)
            if self.problem.delta:
                beta = self.vmem.betas[slot, pl.ds(row, 1), h : h + 1]
                return delta.decode_token(q, k, v, before, decay(h), beta)
            return decode_token(q, k, v, before, decay(h))

        for heads in self.sets:
            done = [token(h) for h in heads]
            for h, (o, new) in zip(heads, done, strict=True):
                staged.o[h, pl.ds(row, 1)] = self.scale * o
                state[h] = new.astype(state.dtype)

    def key_lanes(self, h: int) -> slice:
        """Where head h of the block finds its q and k in a row."""
        head, width = h // self.problem.group, self.problem.key_dim
        return slice(head * width, (head + 1) * width)

    def value_lanes(self, h: int) -> slice:
        """Where head h of the block has its v and o in a row."""
        width = self.problem.value_dim
        return slice(h * width, (h + 1) * width)

    @property
    def sets(self) -> list[range]:
        """Heads in the sets whose work is interleaved."""
        size = self.plan.interleave
        return [range(h, h + size) for h in range(0, self.plan.heads, size)]

    @property
    def narrow(self) -> bool:
        """Whether states are kept in a type narrower than that of sums."""
        return self.problem.state_dtype != jnp.float32

    def carried(self, item: jax.Array) -> Ref:
        """The state that the chunks of the item's request share, f32."""
        request = self.schedule.request[item]
        buffer = self.vmem.states.at[self.loads.slot(request)]
        if not self.narrow:
            return buffer

        @pl.when(self.schedule.kind[item] & FIRST != 0)
        def _() -> None:
            self.vmem.carry[...] = buffer[...].astype(jnp.float32)

        return self.vmem.carry

    def compute_chunk(self, item: jax.Array) -> None:
        """One chunk of one request."""
        request, state = self.schedule.request[item], self.carried(item)
        self.in_window(
            item, self.plan.windows, lambda size: self.chunk_heads(item, state, size, drafts=False)
        )

        @pl.when(self.schedule.kind[item] & LAST != 0)
        def _() -> None:
            if self.narrow:
                buffer = self.vmem.states.at[self.loads.slot(request)]
                buffer[...] = state[...].astype(buffer.dtype)
            self.stores.start(request)

    def verify(self, item: jax.Array) -> None:
        """Drafts that nothing follows: their state is read and left as it is."""
        state = self.carried(item)
        if self.problem.tree:
            self.words.wait(item)

        def heads(size: int) -> None:
            if self.problem.tree:
                self.open_tree(item, size)
            self.chunk_heads(item, state, size, drafts=True)

        self.in_window(item, self.plan.draft_windows, heads)

    def open_tree(self, item: jax.Array, size: int) -> None:
        """Finds out which draft descends from which."""
        slot, begin, end = self.inputs.slot(item), self.begin(item), self.end(item)
        tables: Any = self.tables
        if isinstance(tables, ConstantTables):
            steps = tables.row(self.hbm.log_decay, self.block)
        else:
            steps = tables.inside(slot, begin, end, size)
        self.vmem.tree.open(self.vmem.tree.words[slot, :size], begin, steps, self.scale)

    def take_snapshot(self, item: jax.Array) -> None:
        """Sends the state after the item to another slot."""
        number = self.schedule.snapshot[item]
        self.snapshots.wait(number - 2)
        target = self.vmem.snapshots.at[self.snapshots.slot(number)]
        request = self.schedule.request[item]
        state = self.vmem.carry if self.narrow else self.vmem.states.at[self.loads.slot(request)]

        def copy(h: jax.Array) -> None:
            target[h] = state[h].astype(target.dtype)

        repeat(self.plan.heads, copy)
        self.snapshots.start(number)

    def in_window(
        self, item: jax.Array, windows: tuple[int, ...], action: Callable[[int], None]
    ) -> None:
        """action(size) for the smallest window that holds the item, zeros around its k and v."""
        if self.problem.shifted:
            self.shift(item)
        begin, end = self.place(item)
        size = jnp.int32(windows[-1])
        for smaller in reversed(windows):
            size = jnp.where(end <= smaller, smaller, size)
        self.clear_outside(self.inputs.slot(item), begin, end, size)
        for window in windows:

            @pl.when(size == window)
            def _(window: int = window) -> None:
                action(window)

        if self.problem.shifted and self.problem.outputs:
            shift_rows(self.vmem.o.at[self.outputs.slot(item)], self.begin(item))

    def place(self, item: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First row and end of a chunk in its window while it is computed."""
        if self.problem.shifted:
            return jnp.int32(0), self.schedule.rows[item]
        return self.begin(item), self.end(item)

    def shift(self, item: jax.Array) -> None:
        """Moves a chunk's rows to the start of their windows."""
        slot, begin = self.inputs.slot(item), self.begin(item)
        q = (self.vmem.q,) if self.problem.outputs else ()
        for window in (*q, self.vmem.k, self.vmem.v, *self.gates):
            shift_rows(window.at[slot], jnp.where(begin > 0, self.plan.window - begin, 0))

    @property
    def gates(self) -> tuple[Ref, ...]:
        """Windows of what differs from token to token, beside q, k and v, and is 0 outside."""
        steps = (self.tables.steps,) if isinstance(self.tables, ChannelTables) else ()
        return (*steps, self.vmem.betas) if self.problem.delta else steps

    def clear_outside(
        self, slot: jax.Array, begin: jax.Array, end: jax.Array, size: jax.Array
    ) -> None:
        """Zeroes the rows of k and v outside [begin, end) of a window, whatever they hold."""

        def clear(group: jax.Array) -> None:
            start = pl.multiple_of(group * ROWS, ROWS)
            for window in (self.vmem.k, self.vmem.v, *self.gates):
                rows = window.at[slot, pl.ds(start, ROWS)]
                values = rows[...].astype(jnp.float32)
                row = start + iota(values.shape, 0)
                inside = (row >= begin) & (row < end)
                rows[...] = jnp.where(inside, values, 0.0).astype(rows.dtype)

        @pl.when((begin > 0) | (end < size))
        def _() -> None:
            clear(jnp.int32(0))
            from_second = jnp.maximum(end // ROWS, 1)
            lax.fori_loop(from_second, size // ROWS, lambda group, _: clear(group), None)

    def decays(
        self, heads: range, slot: jax.Array, begin: jax.Array, end: jax.Array, size: int
    ) -> list[Any]:
        """Decay factors of each of these heads over a window of `size` rows."""
        dims = (self.problem.key_dim, self.problem.value_dim)
        if isinstance(self.tables, ChannelTables):
            return self.tables.windows(heads, slot, size, dims[0])
        return [self.tables.chunk(h, begin, end, size, dims) for h in heads]

    def chunk_heads(self, item: jax.Array, state: Ref, size: int, drafts: bool) -> None:
        """All heads in sets, the next stage of each set beside the stage before of the next set."""
        if not (drafts and self.problem.tree):
            self.tables.open(self.inputs.slot(item), *self.place(item), size)
        running: list[chunk.Stages[None]] = []
        starting = [self.chunk_set(heads, item, state, size, drafts) for heads in self.sets]
        while starting or running:
            running = [*starting[:1], *running]
            starting = starting[1:]
            running = [stages for stages in running if next(stages, DONE) is not DONE]

    def chunk_set(
        self, heads: range, item: jax.Array, state: Ref, size: int, drafts: bool
    ) -> chunk.Stages[None]:
        """One set of heads."""
        slot, out = self.inputs.slot(item), self.outputs.slot(item)
        k = [self.vmem.k[slot, :size, self.key_lanes(h)] for h in heads]
        v = [self.vmem.v[slot, :size, self.value_lanes(h)] for h in heads]
        before = [state[h] for h in heads]
        decays: list[Any]
        if drafts and self.problem.tree:
            decays = [self.vmem.tree.decays(h, size, self.scale) for h in heads]
        else:
            decays = self.decays(heads, slot, *self.place(item), size)
        if self.problem.per_channel:
            yield
        scored: list[Any] = [None] * len(heads)
        if self.problem.outputs:
            q = [self.vmem.q[slot, :size, self.key_lanes(h)] for h in heads]
            form: Any = channel if self.problem.per_channel else chunk
            fields = list(zip(q, k, before, decays, strict=True))
            if self.problem.delta:
                betas = [self.vmem.betas[slot, :size, h : h + 1] for h in heads]
                scored, v = yield from delta.score(fields, v, betas, form)
            else:
                scored = [form.score(*args) for args in fields]
        yield
        for i, h in enumerate(heads):
            o, new = chunk.finish(k[i], v[i], before[i], decays[i], scored[i], keeps=not drafts)
            if o is not None:
                o = (o * self.late_scale).astype(self.vmem.o.dtype)
                self.vmem.o[out, :size, self.value_lanes(h)] = o
            if new is not None:
                state[h] = new


def gla_kernel(
    batch: Batch,
    operands: Operands,
    *,
    problem: Problem,
    plan: Plan,
    scale: float,
    interpret: Any = False,
) -> Results:
    """Runs the kernel.

    Args:
      batch: int32 arrays.
      operands: the arrays that the problem has; the pool is donated.
      problem: static facts of the call.
      plan: block sizes.
      scale: of the output.
      interpret: parameters of interpretation, or False.
    """
    scalars, blocks = len([x for x in batch if x is not None]), problem.heads // plan.heads
    axes = manual_axes(*jax.tree.leaves((batch, operands)))
    like = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=axes)
    if not interpret:  # else XLA copies small operands to VMEM first, only to be copied again
        pinned = jax.tree.map(
            lambda x: in_hbm(x) if x.ndim > 1 else x,
            operands._replace(pool=None),
        )
        operands = pinned._replace(
            around=pinned.around.with_weights(operands.around),
            pool=in_hbm(operands.pool, aliased=True),
        )

    def body(*refs: Ref) -> None:
        inputs, *results, scratch = refs[scalars:]
        block = pl.program_id(0)
        steer = Batch(*refs[:scalars])
        Walk(problem, plan, scale, block, steer, inputs, Results(*results), scratch).run()

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    in_specs = jax.tree.map(lambda _: hbm, operands)
    in_specs = in_specs._replace(around=fusions.specs(operands.around, blocks))
    if not problem.per_token:
        in_specs = in_specs._replace(log_decay=pl.BlockSpec(memory_space=pltpu.SMEM))
    o, pool = operands.v.shape, operands.pool
    shapes = Results(
        like(o, problem.o_dtype) if problem.outputs else None, like(pool.shape, pool.dtype)
    )
    return pl.pallas_call(
        body,
        name="gla_late" if problem.form.late else "gla",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=(blocks,),
            in_specs=[in_specs],
            out_specs=jax.tree.map(lambda _: hbm, shapes),
            scratch_shapes=[Scratch.shapes(problem, plan)],
        ),
        out_shape=shapes,
        input_output_aliases={
            scalars + len(jax.tree.leaves(operands)) - 1: len(jax.tree.leaves(shapes)) - 1
        },
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_allowed(problem, plan)
        ),
        interpret=interpret,
    )(*[x for x in batch if x is not None], operands)
