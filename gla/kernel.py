"""The kernel: one pass over the work items of a ragged batch, states updated in place.

Per grid step a block of heads walks through all items. An item's q, k, v rows arrive in a window,
fetched items ahead; a request's state arrives in a ring of states, fetched requests ahead, is updated
by all of the request's items and leaves again. Outputs leave as whole groups of ROWS rows; a group
that two items share waits in VMEM until the second has filled it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gla import chunk
from gla.plan import Plan, Problem
from gla.recurrent import Staged, decode_token, stage, unstage
from gla.schedule import CHUNK, FRESH, NULL, ROWS, RUN, SKIP, Schedule
from gla.tables import ConstantTables, TokenTables, iota
from tpukit.buffers import Index, Stream

Ref = Any


class Operands(NamedTuple):
    """Arrays in HBM; pool is written in place."""

    q: Ref  # [T, qk_heads * key_dim]
    k: Ref  # [T, qk_heads * key_dim]
    v: Ref  # [T, heads * value_dim]
    log_decay: Ref  # f32, constant: [heads] in SMEM; per token: [heads / h, T, h]
    pool: Ref  # [slots, heads, key_dim, value_dim]
    o: Ref  # [T, heads * value_dim]


class Scratch(NamedTuple):
    """VMEM and semaphores; P = plan.inputs, S = plan.states, W = plan.window, h = plan.heads."""

    q: Ref  # [P, W, h / group * key_dim]
    k: Ref  # [P, W, h / group * key_dim]
    v: Ref  # [P, W, h * value_dim]
    o: Ref  # [2, W, h * value_dim]
    states: Ref  # [S, h, key_dim, value_dim] in the type of the pool
    carry: Ref  # [h, key_dim, value_dim] f32: a narrower state between the chunks of a request
    staged: Staged
    tables: list[Ref]
    input_sems: Ref  # [P]
    output_sems: Ref  # [2]
    load_sems: Ref  # [S]
    store_sems: Ref  # [S]

    @staticmethod
    def shapes(problem: Problem, plan: Plan) -> "Scratch":
        """Shapes of the fields."""
        qk = (plan.window, plan.heads // problem.group * problem.key_dim)
        vo = (plan.window, plan.heads * problem.value_dim)
        state = (plan.heads, problem.key_dim, problem.value_dim)
        narrow = problem.state_dtype != jnp.float32
        tables = TokenTables if problem.per_token else ConstantTables
        return Scratch(
            q=pltpu.VMEM((plan.inputs, *qk), problem.dtype),
            k=pltpu.VMEM((plan.inputs, *qk), problem.dtype),
            v=pltpu.VMEM((plan.inputs, *vo), problem.dtype),
            o=pltpu.VMEM((2, *vo), problem.dtype),
            states=pltpu.VMEM((plan.states, *state), problem.state_dtype),
            carry=pltpu.VMEM(state if narrow else (1, 8, 128), jnp.float32),
            staged=Staged.scratch(problem, plan),
            tables=tables.scratch(problem, plan),
            input_sems=pltpu.SemaphoreType.DMA((plan.inputs,)),
            output_sems=pltpu.SemaphoreType.DMA((2,)),
            load_sems=pltpu.SemaphoreType.DMA((plan.states,)),
            store_sems=pltpu.SemaphoreType.DMA((plan.states,)),
        )


@dataclasses.dataclass(frozen=True)
class Walk:
    """One grid step: `block` of plan.heads heads through all items."""

    problem: Problem
    plan: Plan
    scale: float
    block: jax.Array
    schedule: Schedule
    hbm: Operands
    vmem: Scratch

    # Plumbing: what each transfer moves.

    @property
    def tables(self) -> ConstantTables | TokenTables:
        if self.problem.per_token:
            return TokenTables(*self.vmem.tables, self.scale)
        return ConstantTables(*self.vmem.tables)

    @property
    def num_items(self) -> jax.Array:
        return self.schedule.counts[0]

    @property
    def num_requests(self) -> jax.Array:
        return self.schedule.counts[1]

    def end(self, item: Index) -> jax.Array:
        """One past the item's last row, counted from its window's first."""
        return self.schedule.begin[item] + self.schedule.rows[item]

    def lanes(self, width: int) -> Any:
        """The lanes of this block in a row of all heads, `width` of them."""
        start = self.block * width
        return pl.ds(pl.multiple_of(start, 128) if width % 128 == 0 else start, width)

    def rows(self, item: Index, count: jax.Array) -> Any:
        """`count` rows of HBM from the item's first group; both multiples of ROWS."""
        return pl.ds(pl.multiple_of(self.schedule.base[item], ROWS), pl.multiple_of(count, ROWS))

    @property
    def inputs(self) -> Stream:
        """Per item: the groups of q, k, v (and log decays) that it touches."""

        def copies(item: Index, slot: jax.Array) -> list[Any]:
            rows = self.rows(item, (self.end(item) + ROWS - 1) // ROWS * ROWS)
            sem = self.vmem.input_sems.at[slot]
            moves = self.tables.copies(self.hbm.log_decay, self.block, rows, slot, sem)
            for source, window in (
                (self.hbm.q, self.vmem.q),
                (self.hbm.k, self.vmem.k),
                (self.hbm.v, self.vmem.v),
            ):
                part = source.at[rows, self.lanes(window.shape[2])]
                moves.append(pltpu.make_async_copy(part, window.at[slot, pl.ds(0, rows.size)], sem))
            return moves

        def exists(item: Index) -> jax.Array:
            inside = item < self.num_items
            return inside & (self.schedule.kind[jnp.where(inside, item, 0)] != SKIP)

        return Stream(copies, self.plan.inputs, exists)

    @property
    def outputs(self) -> Stream:
        """Per item: the groups of o that it completes."""

        def copies(item: Index, slot: jax.Array) -> list[Any]:
            rows = self.rows(item, self.complete(item))
            part = self.hbm.o.at[rows, self.lanes(self.vmem.o.shape[2])]
            window = self.vmem.o.at[slot, pl.ds(0, rows.size)]
            return [pltpu.make_async_copy(window, part, self.vmem.output_sems.at[slot])]

        return Stream(copies, 2, lambda item: (item >= 0) & (self.complete(item) > 0))

    def complete(self, item: Index) -> jax.Array:
        """Rows of the window up to the last whole group."""
        return self.end(jnp.maximum(item, 0)) // ROWS * ROWS

    def state(self, slot: jax.Array) -> Ref:
        """This block's heads of a slot of the pool."""
        return self.hbm.pool.at[slot, pl.ds(self.block * self.plan.heads, self.plan.heads)]

    @property
    def loads(self) -> Stream:
        """Per request: its state, if it resumes."""

        def copies(request: Index, slot: jax.Array) -> list[Any]:
            source = self.state(self.schedule.load[request])
            return [pltpu.make_async_copy(source, self.vmem.states.at[slot], self.vmem.load_sems.at[slot])]

        def exists(request: Index) -> jax.Array:
            inside = request < self.num_requests
            return inside & (self.schedule.load[jnp.where(inside, request, 0)] >= 0)

        return Stream(copies, self.plan.states, exists)

    @property
    def stores(self) -> Stream:
        """Per request: its state, if it is kept."""

        def copies(request: Index, slot: jax.Array) -> list[Any]:
            target = self.state(self.schedule.store[request])
            return [pltpu.make_async_copy(self.vmem.states.at[slot], target, self.vmem.store_sems.at[slot])]

        def exists(request: Index) -> jax.Array:
            inside = (request >= 0) & (request < self.num_requests)
            return inside & (self.schedule.store[jnp.where(inside, request, 0)] >= 0)

        return Stream(copies, self.plan.states, exists)

    # Schedule: who does what when.

    def run(self) -> None:
        """Fetches ahead, does every item in order, waits for what is still being written."""
        self.tables.build(self.hbm.log_decay, self.block, self.scale)
        for item in range(self.plan.inputs - 1):
            self.inputs.start(item)
        for request in range(self.plan.lookahead):
            self.loads.start(request)

        def step(item: jax.Array, _: None) -> None:
            self.inputs.start(item + self.plan.inputs - 1)
            self.inputs.wait(item)
            self.outputs.wait(item - 2)
            self.compute(item)
            self.join(item)
            self.outputs.start(item)

        lax.fori_loop(0, self.num_items, step, None)
        for age in (2, 1):
            self.outputs.wait(self.num_items - age)
        for age in range(self.plan.states, 0, -1):
            self.stores.wait(self.num_requests - age)

    def compute(self, item: jax.Array) -> None:
        """Fills the item's rows of its output window."""
        kind, end = self.schedule.kind[item], self.end(item)

        @pl.when(kind == SKIP)
        def _() -> None:
            slot = self.outputs.slot(item)
            self.vmem.o[slot] = jnp.zeros(self.vmem.o.shape[1:], self.problem.dtype)

        @pl.when(kind == RUN)
        def _() -> None:
            self.compute_run(item)

        smaller = 0
        for size in self.plan.windows:

            @pl.when((kind == CHUNK) & (end > smaller) & (end <= size))
            def _(size: int = size) -> None:
                self.compute_chunk(item, size)

            smaller = size

    def open_request(self, request: jax.Array) -> Ref:
        """Waits for the request's state and fetches another; returns the state's buffer."""
        self.loads.wait(request)
        ahead = request + self.plan.lookahead
        self.stores.wait(jnp.where(ahead < self.num_requests, ahead - self.plan.states, -1))
        self.loads.start(ahead)
        state = self.vmem.states.at[self.loads.slot(request)]

        @pl.when(self.schedule.load[request] == FRESH)
        def _() -> None:
            state[...] = jnp.zeros(state.shape, state.dtype)

        return state

    def compute_run(self, item: jax.Array) -> None:
        """Consecutive requests of one token each."""
        slot, begin = self.inputs.slot(item), self.schedule.begin[item]
        group = pl.ds(0, ROWS)
        staged = self.vmem.staged
        stage(staged, self.vmem.q[slot, group], self.vmem.k[slot, group], self.vmem.v[slot, group])

        def token(i: jax.Array, _: None) -> None:
            request, row = self.schedule.request[item] + i, begin + i
            state = self.open_request(request)
            null = self.schedule.load[request] == NULL

            @pl.when(null)
            def _() -> None:
                staged.o[:, pl.ds(row, 1)] = jnp.zeros((staged.o.shape[0], 1, staged.o.shape[2]), jnp.float32)

            @pl.when(~null)
            def _() -> None:
                self.decode(state, slot, row)

            self.stores.start(request)

        lax.fori_loop(0, self.schedule.rows[item], token, None)
        self.vmem.o[self.outputs.slot(item), group] = unstage(staged).astype(self.problem.dtype)

    def decode(self, state: Ref, slot: jax.Array, row: jax.Array) -> None:
        """One token through all heads of the block."""
        width, staged = self.problem.value_dim, self.vmem.staged
        for h in range(self.plan.heads):
            o, new = decode_token(
                staged.columns[h // self.problem.group],
                staged.v[h, pl.ds(row, 1)],
                state[h].astype(jnp.float32),
                self.tables.token(h, slot, row, width),
                row,
            )
            staged.o[h, pl.ds(row, 1)] = self.scale * o
            state[h] = new.astype(state.dtype)

    def compute_chunk(self, item: jax.Array, size: int) -> None:
        """One chunk of one request, in a window of `size` rows."""
        slot = self.inputs.slot(item)
        begin, end = self.schedule.begin[item], self.end(item)
        request = self.schedule.request[item]
        first, last = self.schedule.first[item] == 1, self.schedule.last[item] == 1
        buffer = self.vmem.states.at[self.loads.slot(request)]
        narrow = buffer.dtype != jnp.float32
        state = self.vmem.carry if narrow else buffer

        @pl.when(first)
        def _() -> None:
            self.open_request(request)
            if narrow:
                state[...] = buffer[...].astype(jnp.float32)

        for window in (self.vmem.k, self.vmem.v):
            clear_outside(window.at[slot], begin, end, size)
        self.tables.open(slot, begin, end, size)
        self.chunk_heads(item, state, size)

        @pl.when(last)
        def _() -> None:
            if narrow:
                buffer[...] = state[...].astype(buffer.dtype)
            self.stores.start(request)

    def chunk_heads(self, item: jax.Array, state: Ref, size: int) -> None:
        """All heads of the block, a few at a time, the second half of each set beside the first of the next."""
        slot, out = self.inputs.slot(item), self.outputs.slot(item)
        begin, end = self.schedule.begin[item], self.end(item)
        key_dim, value_dim = self.problem.key_dim, self.problem.value_dim
        unfinished: list[tuple[int, chunk.Scored, jax.Array]] = []

        def finish() -> None:
            for h, scored, v in unfinished:
                self.vmem.o[out, :size, h * value_dim : (h + 1) * value_dim] = chunk.output(scored, v)

        for start in range(0, self.plan.heads, self.plan.interleave):
            heads = range(start, start + self.plan.interleave)
            keys = [slice(h // self.problem.group * key_dim, (h // self.problem.group + 1) * key_dim) for h in heads]
            q = [self.vmem.q[slot, :size, lanes] for lanes in keys]
            k = [self.vmem.k[slot, :size, lanes] for lanes in keys]
            v = [self.vmem.v[slot, :size, h * value_dim : (h + 1) * value_dim] for h in heads]
            before = [state[h] for h in heads]
            decays = [self.tables.chunk(h, begin, end, size, (key_dim, value_dim)) for h in heads]
            scored = [chunk.score(*args) for args in zip(q, k, before, decays)]
            after = [chunk.advance(*args) for args in zip(k, v, before, decays)]
            for h, new in zip(heads, after):
                state[h] = new
            finish()
            unfinished = list(zip(heads, scored, v))
        finish()

    def join(self, item: jax.Array) -> None:
        """Takes the rows before the item's first from the window of the item before."""
        begin, slot = self.schedule.begin[item], self.outputs.slot(item)

        @pl.when(begin > 0)
        def _() -> None:
            shared = pl.ds(pl.multiple_of(self.complete(item - 1), ROWS), ROWS)
            earlier = self.vmem.o[1 - slot, shared].astype(jnp.float32)
            window = self.vmem.o.at[slot, pl.ds(0, ROWS)]
            own = window[...].astype(jnp.float32)
            joined = jnp.where(iota(own.shape, 0) < begin, earlier, own)
            window[...] = joined.astype(self.problem.dtype)


def clear_outside(window: Ref, begin: jax.Array, end: jax.Array, size: int) -> None:
    """Zeroes the rows of a window outside [begin, end), whatever they hold."""
    for start in range(0, size, ROWS):

        @pl.when((begin > start) | (end < start + ROWS))
        def _(start: int = start) -> None:
            group = window.at[pl.ds(start, ROWS)]
            values = group[...].astype(jnp.float32)
            row = start + iota(values.shape, 0)
            group[...] = jnp.where((row >= begin) & (row < end), values, 0.0).astype(group.dtype)


def gla_kernel(
    schedule: Schedule,
    operands: tuple[jax.Array, ...],
    *,
    problem: Problem,
    plan: Plan,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
      schedule: of the batch.
      operands: q, k [T, qk_heads * key_dim], v [T, heads * value_dim], log_decay (see `Operands`),
        pool [slots, heads, key_dim, value_dim].
      problem: static facts of the call.
      plan: block sizes.
      scale: of the output.
      interpret: parameters of interpretation, or False.

    Returns:
      o [T, heads * value_dim] and the new pool.
    """
    q, _, v, _, pool = operands
    num_scalars = len(schedule)

    def body(*refs: Ref) -> None:
        scalars, rest = refs[:num_scalars], refs[num_scalars:]
        (q_ref, k_ref, v_ref, decay_ref, _), (o_ref, pool_ref), scratch = rest[:5], rest[5:7], rest[7]
        hbm = Operands(q_ref, k_ref, v_ref, decay_ref, pool_ref, o_ref)
        Walk(problem, plan, scale, pl.program_id(0), Schedule(*scalars), hbm, scratch).run()

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    decay_spec = anywhere if problem.per_token else pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.pallas_call(
        body,
        name="gla",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=num_scalars,
            grid=(problem.heads // plan.heads,),
            in_specs=[anywhere, anywhere, anywhere, decay_spec, anywhere],
            out_specs=[anywhere, anywhere],
            scratch_shapes=[Scratch.shapes(problem, plan)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        ],
        input_output_aliases={num_scalars + 4: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=60 << 20
        ),
        interpret=interpret,
    )(*schedule, *operands)
