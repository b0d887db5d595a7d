"""The SparseCore kernel: every subcore walks over its steps, rows of the next one on their way.

A step is a group of tokens and a chunk of columns. For each, the rows that count are gathered from
HBM, one stream per vector of indices; the stream leaves out what does not count. The sums of a step
go out while the next is computed. Indices come a window at a time and are cleaned on arrival, so
that nothing hostile becomes an address.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from gather_reduce.plan import SLOTS, Plan, Problem, Work, padded_entries, work_of
from gather_reduce.rows import FLOAT32, as_pair, decode, weighted_sum
from tpukit.chips import SparseCores
from tpukit.compat import push
from tpukit.manual import manual_axes

NO_ROW = -1
NAME = "gather_reduce"


@dataclasses.dataclass(frozen=True)
class Refs:
    """Operands in HBM and scratch of a subcore.

    Attributes:
      x: [rows or pairs of rows, words] words, or float32.
      indices, factors: [all entries] int32 and float32; factors None where there are none.
      out: [rows of words, parts * words] words, or float32.
      sums: [SLOTS, parts, rows of words of a step, chunk].
      ids: [entries of a window] those of the current one, cleaned.
      arrived, gone: [SLOTS] semaphores of rows, and of sums.
      rows: [SLOTS, entries of a step, chunk], or None where rows are added on their way.
      scales: [entries of a window] factors of the current one, cleaned, or None.
    """

    x: Any
    indices: Any
    factors: Any
    out: Any
    sums: Any
    ids: Any
    arrived: Any
    gone: Any
    rows: Any = None
    scales: Any = None


@dataclasses.dataclass(frozen=True)
class Term:
    """A row of a sum.

    Attributes:
      entry: which of the step's.
      factor: what it is multiplied by, in all lanes, or None.
      shift: what brings it to the top of words that it shares with another row, or None.
      counted: whether it counts, in all lanes, or None where it does.
    """

    entry: Any
    factor: jax.Array | None
    shift: jax.Array | None
    counted: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Walk:
    """A subcore's walk over its steps.

    Attributes:
      problem, plan, work: what there is to do.
      refs: with what.
      team, part: which steps are this subcore's, and which columns.
    """

    problem: Problem
    plan: Plan
    work: Work
    refs: Refs
    team: jax.Array
    part: jax.Array

    def run(self) -> None:
        """All windows."""

        @pl.loop(0, self.work.windows)
        def _(window: jax.Array) -> None:
            first = (self.team * self.work.windows + window) * self.work.window
            steps = jnp.clip(self.problem.num_groups - first, 0, self.work.window)

            @pl.when(steps > 0)
            def _() -> None:
                self.bring_entries(first)
                self.walk(first, steps * self.work.chunks)

    # Indices.

    def bring_entries(self, first: jax.Array) -> None:
        """The indices and factors of a window, with NO_ROW and 0 for what does not count."""
        refs, lanes = self.refs, self.work.lanes
        count = self.work.window * self.problem.entries
        here = pl.ds(pl.multiple_of(first * self.problem.entries, 8), count)
        pltpu.sync_copy(refs.indices.at[here], refs.ids.at[pl.ds(0, count)])
        if self.problem.weighted:
            pltpu.sync_copy(refs.factors.at[here], refs.scales.at[pl.ds(0, count)])

        @plsc.parallel_loop(0, -(-count // lanes) * lanes, lanes)
        def _(at: jax.Array) -> None:
            some = pl.ds(at, lanes)
            ids = refs.ids[some]
            counted = (ids >= 0) & (ids < self.problem.num_rows)
            if self.problem.weighted:
                scales = refs.scales[some]
                counted &= scales != 0
                refs.scales[some] = jnp.where(counted, scales, 0.0)
            refs.ids[some] = jnp.where(counted, ids, NO_ROW)

    def entries(self, group: jax.Array, piece: int) -> jax.Array:
        """A vector of a step's indices; NO_ROW in lanes that are another step's."""
        lanes, left = self.work.lanes, self.problem.entries - piece * self.work.lanes
        ids = self.refs.ids[pl.ds(group * self.problem.entries + piece * lanes, lanes)]
        return ids if left >= lanes else jnp.where(lax.iota(jnp.int32, lanes) < left, ids, NO_ROW)

    @property
    def pieces(self) -> int:
        """Vectors of indices of a step."""
        return padded_entries(self.problem, self.work.lanes) // self.work.lanes

    def all_count(self, group: jax.Array) -> jax.Array:
        """Whether every row of a step counts, so that none has to be selected away."""
        lanes = self.work.lanes
        least = jnp.zeros(lanes, jnp.int32)
        for piece in range(self.pieces):
            ids = self.refs.ids[pl.ds(group * self.problem.entries + piece * lanes, lanes)]
            left = self.problem.entries - piece * lanes
            if left < lanes:
                ids = jnp.where(lax.iota(jnp.int32, lanes) < left, ids, 0)
            least = jnp.minimum(least, ids)
        return jnp.min(least) >= 0

    # Schedule.

    def walk(self, first: jax.Array, count: jax.Array) -> None:
        """The steps of a window, each while the rows of the next are coming."""

        @pl.loop(0, count + 1)
        def _(ahead: jax.Array) -> None:
            @pl.when(ahead < count)
            def _() -> None:
                for copy in self.row_copies(ahead):
                    copy.start()

            @pl.when(ahead > 0)
            def _() -> None:
                self.step(first, ahead - 1)

        @pl.loop(jnp.maximum(count - SLOTS, 0), count)
        def _(step: jax.Array) -> None:
            self.wait_sums(first, step)

        for copy in self.out_copies(first, jnp.int32(0)):
            copy.wait_write()

    def step(self, first: jax.Array, step: jax.Array) -> None:
        """One step: its rows are coming, and those of the step before may be still going."""
        for copy in self.row_copies(step):
            copy.wait()
        pl.when(step >= SLOTS)(lambda: self.wait_sums(first, step - SLOTS))
        self.reduce(step)
        for copy in self.out_copies(first, step):
            copy.start()

    def wait_sums(self, first: jax.Array, step: jax.Array) -> None:
        """Waits until the sums of a step have left their buffer."""
        for copy in self.out_copies(first, step):
            copy.wait_read()

    def place(self, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Group in the window, first word, and slot of a step."""
        chunks = self.work.chunks
        group, chunk = (step, 0) if chunks == 1 else (step // chunks, lax.rem(step, chunks))
        mine = self.part * (chunks * self.plan.chunk)
        return group, pl.multiple_of(mine + chunk * self.plan.chunk, 128), step & (SLOTS - 1)

    # Plumbing.

    def row_copies(self, step: jax.Array) -> list[Any]:
        """The streams that gather the rows of a step."""
        group, word, slot = self.place(step)
        lanes = self.work.lanes
        copies = []
        for piece in range(self.pieces):
            ids = self.entries(group, piece)
            if self.problem.format.rows_per_word == 2:
                ids = lax.shift_right_arithmetic(ids, 1)
            chosen = plsc.Indices(ids, ignored_value=NO_ROW)
            source = self.refs.x.at[chosen, pl.ds(word, self.plan.chunk)]
            target = self.refs.rows.at[slot, pl.ds(piece * lanes, lanes)]
            copies.append(pltpu.make_async_copy(source, target, self.refs.arrived.at[slot]))
        return copies

    def out_copies(self, first: jax.Array, step: jax.Array) -> list[Any]:
        """What takes the sums of a step to HBM."""
        group, word, slot = self.place(step)
        rows = pl.ds((first + group) * self.problem.out_rows, self.problem.out_rows)
        return [
            push(
                self.refs.sums.at[slot, part],
                self.refs.out.at[rows, pl.ds(part * self.problem.words + word, self.plan.chunk)],
                self.refs.gone.at[slot],
            )
            for part in range(self.problem.format.parts)
        ]

    # Compute.

    def reduce(self, step: jax.Array) -> None:
        """The sums of a step."""
        group, _, slot = self.place(step)
        every = self.all_terms()
        clean = self.all_count(group)
        pl.when(clean)(lambda: self.reduce_rows(slot, self.terms(group, every, masked=False)))
        rest = ~clean
        if self.problem.ragged and self.problem.top_k > 2:
            pairs, few = self.pairs(group)
            pl.when(few)(lambda: self.reduce_rows(slot, self.terms(group, pairs, masked=True)))
            rest &= ~few
        pl.when(rest)(lambda: self.reduce_rows(slot, self.terms(group, every, masked=True)))

    def all_terms(self) -> list[list[Any]]:
        """Each token's entries in the step."""
        top_k = self.problem.top_k
        return [list(range(t * top_k, (t + 1) * top_k)) for t in range(self.problem.group)]

    def pairs(self, group: jax.Array) -> tuple[list[list[Any]], jax.Array]:
        """Two entries of each token, those that count first; and whether no token has more."""
        lanes, top_k = self.work.lanes, self.problem.top_k
        first = group * self.problem.entries
        ids = [self.refs.ids[pl.ds(first + n * lanes, lanes)] for n in range(self.pieces)]
        found, most = [], jnp.int32(0)
        for token in range(self.problem.group):
            begin = token * top_k
            one, two, count = (jnp.int32(n) for n in (begin, begin + 1, 0))
            for entry in range(begin, begin + top_k):
                counted = ids[entry // lanes][entry % lanes] >= 0
                one, two = (
                    jnp.where(counted & (count == 0), entry, one),
                    jnp.where(counted & (count == 1), entry, two),
                )
                count += counted.astype(jnp.int32)
            # Of a lone entry that comes second the other one must not be the same.
            two = jnp.where((count == 1) & (one == begin + 1), begin, two)
            found.append([one, two])
            most = jnp.maximum(most, count)
        return found, most <= 2

    def splat(self, ref: Any, group: jax.Array, entry: Any) -> jax.Array:
        """An entry of a step in all lanes of a vector."""
        place = jnp.full(self.work.lanes, group * self.problem.entries + entry, jnp.int32)
        return plsc.load_gather(ref, [place])

    def terms(
        self, group: jax.Array, tokens: Sequence[Sequence[Any]], *, masked: bool
    ) -> list[list[Term]]:
        """The terms of each token's sum, from their entries in the step."""
        pairs = self.problem.format.rows_per_word == 2

        def term(entry: Any) -> Term:
            ids = self.splat(self.refs.ids, group, entry) if masked or pairs else None
            scales = self.refs.scales
            return Term(
                entry=entry,
                factor=self.splat(scales, group, entry) if self.problem.weighted else None,
                shift=(1 - (ids & 1)) << 4 if pairs and ids is not None else None,
                counted=ids >= 0 if masked and ids is not None else None,
            )

        return [[term(entry) for entry in entries] for entries in tokens]

    def reduce_rows(self, slot: jax.Array, tokens: Sequence[Sequence[Term]]) -> None:
        """The sums of the given terms, token by token."""
        kind = self.problem.format

        def value(term: Term, columns: Any, part: Any) -> list[jax.Array]:
            word = self.refs.rows[slot, term.entry, columns]
            if term.counted is not None:
                word = jnp.where(term.counted, word, np.zeros((), word.dtype))
            return decode(kind, word, 24 - 8 * part if term.shift is None else term.shift)

        def sums_of(part: Any) -> None:
            @plsc.parallel_loop(0, self.plan.chunk, self.work.lanes)
            def _(at: jax.Array) -> None:
                columns = pl.ds(at, self.work.lanes)
                sums = []
                for terms in tokens:
                    factors = [t.factor for t in terms if t.factor is not None]
                    values = [value(term, columns, part) for term in terms]
                    sums.append(weighted_sum(values, factors or None))
                self.store(slot, part, columns, sums)

        if kind.parts == kind.together:
            sums_of(0)
        else:
            pl.loop(0, kind.parts)(sums_of)

    def store(
        self, slot: jax.Array, part: Any, columns: Any, sums: Sequence[Sequence[jax.Array]]
    ) -> None:
        """Sums of a step's tokens, from this part on, to their buffer."""
        for row in range(self.problem.out_rows):
            for n in range(self.problem.format.together):
                if self.problem.narrow:
                    value = as_pair(sums[2 * row][n], sums[2 * row + 1][n])
                else:
                    value = sums[row][n]
                self.refs.sums[slot, part + n, row, columns] = value


def gather_reduce_kernel(
    x: jax.Array,
    indices: jax.Array,
    factors: jax.Array | None = None,
    *,
    problem: Problem,
    plan: Plan,
    sparse: SparseCores,
    walk: type[Walk] = Walk,
) -> jax.Array:
    """Runs the kernel.

    Args:
      x: [num_rows, words] in the problem's format.
      indices: [tokens, top_k] int32.
      factors: [tokens, top_k] float32, or None.
      problem, plan, sparse: what, how, and on what; the problem with the steps of the plan.
      walk: what its subcores do.

    Returns:
      [tokens, parts * words], bfloat16 or float32.
    """
    work, kind = work_of(problem, plan, sparse), problem.format
    total = work.teams * work.steps * problem.entries
    tokens = problem.num_groups * problem.group
    out = jax.ShapeDtypeStruct(
        (tokens, kind.parts * problem.words),
        jnp.bfloat16 if problem.narrow else jnp.float32,
        manual_axis_type=manual_axes(*(a for a in (x, indices, factors) if a is not None)),
    )
    word = jnp.float32 if kind == FLOAT32 else jnp.int32
    sum_word = jnp.int32 if problem.narrow else jnp.float32
    window = -(-work.window * problem.entries // work.lanes) * work.lanes + work.lanes
    entries = padded_entries(problem, work.lanes)
    scratch = {
        "sums": pltpu.VMEM((SLOTS, kind.parts, problem.out_rows, plan.chunk), sum_word),
        "ids": pltpu.VMEM((window,), jnp.int32),
        "arrived": pltpu.SemaphoreType.DMA((SLOTS,)),
        "gone": pltpu.SemaphoreType.DMA((SLOTS,)),
    }
    if plan.engine == "sparsecore":
        scratch["rows"] = pltpu.VMEM((SLOTS, entries, plan.chunk), word)
    if problem.weighted:
        scratch["scales"] = pltpu.VMEM((window,), jnp.float32)

    def body(x: Any, indices: Any, *rest: Any, **scratch: Any) -> None:
        *factors, out = rest
        refs = Refs(
            x=x.bitcast(jnp.int32) if kind.rows_per_word == 2 else x,
            indices=indices,
            factors=factors[0] if factors else None,
            out=out.bitcast(jnp.int32) if problem.narrow else out,
            **scratch,
        )
        subcore = lax.axis_index("core") * work.subcores + lax.axis_index("subcore")
        team, part = subcore, jnp.int32(0)
        if plan.parts > 1:
            team, part = subcore // plan.parts, lax.rem(subcore, plan.parts)
        walk(problem, plan, work, refs, team, part).run()

    def flat(entries: jax.Array, fill: int) -> jax.Array:
        entries = entries.reshape(-1)
        return jnp.pad(entries, (0, total - entries.shape[0]), constant_values=fill)

    operands = [x, flat(indices, NO_ROW)]
    if factors is not None:
        operands.append(flat(factors.astype(jnp.float32), 0))
    mesh = plsc.VectorSubcoreMesh(
        core_axis_name="core",
        subcore_axis_name="subcore",
        num_cores=work.cores,
        num_subcores=work.subcores,
    )
    run = pl.kernel(
        body,
        out_type=out,
        mesh=mesh,
        scratch_types=scratch,
        compiler_params=pltpu.CompilerParams(needs_layout_passes=False),
        name=NAME,
    )
    sums: Any = run(*operands)
    return sums[: problem.num_tokens]
