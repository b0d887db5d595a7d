"""The kernel: one pass over the work items of a ragged batch, states updated in place.

Per grid step a block of heads walks through all items. An item's q, k, v rows arrive in a window,
fetched items ahead; a request's state arrives in a ring of states, fetched requests ahead, is
updated by all of the request's items and leaves again. Outputs leave as whole groups of ROWS rows;
a group that two items share waits in VMEM until the second has filled it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gla import channel, chunk
from gla.plan import Plan, Problem, vmem_allowed
from gla.plumbing import Operands, Plumbing, Scratch
from gla.recurrent import decode_token, pick, stage, unstage
from gla.schedule import CHUNK, FIRST, FRESH, LAST, NULL, ROWS, RUN, SKIP, Batch, list_items
from gla.shift import shift_rows
from gla.tables import ChannelTables, iota
from reference.gla import clip_log_decay

Ref = Any


class HalfDone(NamedTuple):
    """A head whose chunk is scored: its state and its output are still to come."""

    head: int
    k: jax.Array
    v: jax.Array
    state: jax.Array
    decays: Any  # of chunk or of channel
    scored: chunk.Scored


@dataclasses.dataclass(frozen=True)
class Walk(Plumbing):
    """One grid step: who does what when."""

    def run(self) -> None:
        """Fetches ahead, does every item in order, waits for what is still being written."""

        @pl.when(self.block == 0)
        def _() -> None:
            list_items(self.batch, self.schedule, self.problem.limits(self.plan))

        self.tables.build(self.hbm.log_decay, self.block, self.scale)
        repeat(self.plan.inputs - 1, self.inputs.start)
        repeat(self.plan.lookahead, self.loads.start)

        def step(item: jax.Array, _: None) -> None:
            self.inputs.start(item + self.plan.inputs - 1)
            self.inputs.wait(item)
            self.outputs.wait(item - 2)
            self.compute(item)
            self.join(item)
            self.outputs.start(item)

        lax.fori_loop(0, self.num_items, step, None)
        repeat(2, lambda i: self.outputs.wait(self.num_items - 2 + i))
        repeat(
            self.plan.states, lambda i: self.stores.wait(self.num_requests - self.plan.states + i)
        )

    def compute(self, item: jax.Array) -> None:
        """Fills the item's rows of its output window."""
        kind = self.schedule.kind[item]

        @pl.when(kind & FIRST != 0)
        def _() -> None:
            self.open_request(self.schedule.request[item])

        @pl.when(kind & SKIP != 0)
        def _() -> None:
            slot = self.outputs.slot(item)
            self.vmem.o[slot] = jnp.zeros(self.vmem.o.shape[1:], self.problem.dtype)

        @pl.when(kind & RUN != 0)
        def _() -> None:
            self.compute_run(item)

        @pl.when(kind & CHUNK != 0)
        def _() -> None:
            self.compute_chunk(item)

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
        stage(staged.q, self.vmem.q[slot, group])
        if isinstance(self.tables, ChannelTables):
            stage(staged.decay, jnp.exp(clip_log_decay(self.tables.steps[slot, group])))

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
        self.vmem.o[self.outputs.slot(item), group] = unstage(staged).astype(self.problem.dtype)

    def decode(self, state: Ref, slot: jax.Array, row: jax.Array) -> None:
        """One token through all heads of the block."""
        staged, width = self.vmem.staged, self.problem.value_dim

        def decay(h: int) -> jax.Array:
            if isinstance(self.tables, ChannelTables):
                return pick(staged.decay[h], row, width)
            return self.tables.token(h, slot, row, width)

        for heads in self.sets:
            done = [
                decode_token(
                    staged.q[h // self.problem.group],
                    self.vmem.k[slot, :ROWS, self.key_lanes(h)],
                    self.vmem.v[slot, :ROWS, self.value_lanes(h)],
                    state[h].astype(jnp.float32),
                    decay(h),
                    row,
                )
                for h in heads
            ]
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

    def compute_chunk(self, item: jax.Array) -> None:
        """One chunk of one request, in the smallest window that holds it."""
        kind, request = self.schedule.kind[item], self.schedule.request[item]
        buffer = self.vmem.states.at[self.loads.slot(request)]
        narrow = buffer.dtype != jnp.float32
        state = self.vmem.carry if narrow else buffer

        if narrow:

            @pl.when(kind & FIRST != 0)
            def _() -> None:
                state[...] = buffer[...].astype(jnp.float32)

        if self.problem.shifted:
            self.shift(item)
        begin, end = self.place(item)
        size = jnp.int32(self.plan.window)
        for smaller in reversed(self.plan.windows):
            size = jnp.where(end <= smaller, smaller, size)
        self.clear_outside(self.inputs.slot(item), begin, end, size)
        for window in self.plan.windows:

            @pl.when(size == window)
            def _(window: int = window) -> None:
                self.chunk_heads(item, state, window)

        if self.problem.shifted:
            shift_rows(self.vmem.o.at[self.outputs.slot(item)], self.begin(item))

        @pl.when(kind & LAST != 0)
        def _() -> None:
            if narrow:
                buffer[...] = state[...].astype(buffer.dtype)
            self.stores.start(request)

    def place(self, item: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First row and end of a chunk in its window while it is computed."""
        if self.problem.shifted:
            return jnp.int32(0), self.schedule.rows[item]
        return self.begin(item), self.end(item)

    def shift(self, item: jax.Array) -> None:
        """Moves a chunk's rows to the start of their windows."""
        slot, begin = self.inputs.slot(item), self.begin(item)
        for window in (self.vmem.q, self.vmem.k, self.vmem.v, *self.gates):
            shift_rows(window.at[slot], jnp.where(begin > 0, self.plan.window - begin, 0))

    @property
    def gates(self) -> tuple[Ref, ...]:
        """Windows of what differs from token to token, beside q, k and v, and is 0 outside."""
        return (self.tables.steps,) if isinstance(self.tables, ChannelTables) else ()

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
            lax.fori_loop(end // ROWS, size // ROWS, lambda group, _: clear(group), None)

    def decays(self, h: int, slot: jax.Array, begin: jax.Array, end: jax.Array, size: int) -> Any:
        """Decay factors of head h over a window of `size` rows."""
        dims = (self.problem.key_dim, self.problem.value_dim)
        if isinstance(self.tables, ChannelTables):
            return self.tables.window(h, slot, size, dims[0])
        return self.tables.chunk(h, begin, end, size, dims)

    def chunk_heads(self, item: jax.Array, state: Ref, size: int) -> None:
        """All heads in sets, the second half of a set beside the first half of the next."""
        slot, out = self.inputs.slot(item), self.outputs.slot(item)
        begin, end = self.place(item)
        self.tables.open(slot, begin, end, size)

        def finish(half_done: list[HalfDone]) -> None:
            for x in half_done:
                state[x.head] = chunk.advance(x.k, x.v, x.state, x.decays)
            for x in half_done:
                o = chunk.output(x.scored, x.v) * self.late_scale
                self.vmem.o[out, :size, self.value_lanes(x.head)] = o.astype(self.vmem.o.dtype)

        half_done: list[HalfDone] = []
        for heads in self.sets:
            q = [self.vmem.q[slot, :size, self.key_lanes(h)] for h in heads]
            k = [self.vmem.k[slot, :size, self.key_lanes(h)] for h in heads]
            v = [self.vmem.v[slot, :size, self.value_lanes(h)] for h in heads]
            before = [state[h] for h in heads]
            decays = [self.decays(h, slot, begin, end, size) for h in heads]
            score = channel.score if self.problem.per_channel else chunk.score
            scored = [score(*args) for args in zip(q, k, before, decays, strict=True)]
            finish(half_done)
            fields = zip(heads, k, v, before, decays, scored, strict=True)
            half_done = [HalfDone(*args) for args in fields]
        finish(half_done)

    def join(self, item: jax.Array) -> None:
        """Takes the rows before the item's first from the window of the item before."""
        begin, slot = self.begin(item), self.outputs.slot(item)

        @pl.when(begin > 0)
        def _() -> None:
            shared = pl.ds(pl.multiple_of(self.complete(item - 1), ROWS), ROWS)
            earlier = self.vmem.o[1 - slot, shared].astype(jnp.float32)
            window = self.vmem.o.at[slot, pl.ds(0, ROWS)]
            own = window[...].astype(jnp.float32)
            joined = jnp.where(iota(own.shape, 0) < begin, earlier, own)
            window[...] = joined.astype(self.problem.dtype)


def repeat(times: int, action: Callable[[jax.Array], None]) -> None:
    """action(0), ..., action(times - 1), as a loop of the kernel."""
    lax.fori_loop(0, times, lambda i, _: action(i), None)


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape of an output that varies over the same manual mesh axes as x."""
    axes = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes)


def gla_kernel(
    batch: Batch,
    operands: tuple[jax.Array, ...],
    *,
    problem: Problem,
    plan: Plan,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
      batch: int32 arrays slot_ids [N], cu_seqlens [N + 1], has_state [N].
      operands: q, k [T, qk_heads * key_dim], v [T, heads * value_dim], log_decay (see `Operands`),
        pool [slots, heads, key_dim, value_dim].
      problem: static facts of the call.
      plan: block sizes.
      scale: of the output.
      interpret: parameters of interpretation, or False.

    Returns:
      o [T, heads * value_dim] and the new pool.
    """
    v, pool = operands[2], operands[4]
    scalars = len(batch)
    if not interpret:  # else XLA copies small operands to VMEM first, only to be copied again
        operands = tuple(
            pltpu.with_memory_space_constraint(x, pltpu.HBM) if x.ndim > 1 else x for x in operands
        )

    def body(*refs: Ref) -> None:
        (q, k, v, log_decay, _), (o, pool), scratch = refs[scalars:-3], refs[-3:-1], refs[-1]
        operands = Operands(q, k, v, log_decay, pool, o)
        block = pl.program_id(0)
        Walk(problem, plan, scale, block, Batch(*refs[:scalars]), operands, scratch).run()

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    decay_spec = hbm if problem.per_token else pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.pallas_call(
        body,
        name="gla",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=(problem.heads // plan.heads,),
            in_specs=[hbm, hbm, hbm, decay_spec, hbm],
            out_specs=[hbm, hbm],
            scratch_shapes=[Scratch.shapes(problem, plan)],
        ),
        out_shape=[like(v), like(pool)],
        input_output_aliases={scalars + 4: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_allowed(problem, plan)
        ),
        interpret=interpret,
    )(*batch, *operands)
