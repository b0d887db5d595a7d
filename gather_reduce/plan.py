"""The static problem, how it is cut up, what that takes, and where it had better run."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from gather_reduce.rows import FORMATS, Format
from tpukit.chips import Chip, SparseCores
from tpukit.errors import ArgumentError, UnsupportedError

LANES = 128  # columns of a tile in HBM
MAX_TOP_K = 32  # rows of a token that the kernel unrolls
STEP_ROWS = 16  # rows of one step, where top_k allows it: their factors stay in registers
WINDOW_ENTRIES = 512  # indices that a subcore holds at once, about
SLOTS = 2  # buffers of rows and of sums
SPARE_VMEM = 2048  # bytes of a subcore that are left to the compiler

# Microseconds and bundles of the cost model. The start of a SparseCore kernel is an assumption; a
# TensorCore gathers a row in 4.3 ns (18.1 ms for 4.19M rows: JAX's SparseCore guide), and writes
# and reads once more what it gathers. Bundles per step and transfer: counted in compiled programs.
START_US = 5.0
ROW_US = 0.0043
STEP_BUNDLES = 200
STREAM_BUNDLES = 2

Engine = Literal["sparsecore", "adder", "xla"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything about a call that is known when it is traced.

    Attributes:
      num_tokens, top_k: of the indices.
      num_rows: rows of x.
      words: 32-bit words of a row, a multiple of 128.
      rows: name of the format of x, a key of `rows.FORMATS`.
      weighted: whether rows are multiplied by factors.
      narrow: whether the output is bfloat16, else float32.
      ragged: whether most rows may not count, so that steps with few deserve code of their own.
      step_tokens: tokens of a step where the plan says how many, else 0.
    """

    num_tokens: int
    top_k: int
    num_rows: int
    words: int
    rows: str
    weighted: bool
    narrow: bool
    ragged: bool = False
    step_tokens: int = 0

    @property
    def format(self) -> Format:
        """The format of x."""
        return FORMATS[self.rows]

    @property
    def group(self) -> int:
        """Tokens of a step: some 16 rows; bfloat16 outputs share words in pairs."""
        if self.step_tokens:
            return self.step_tokens
        most = max(1, STEP_ROWS // self.top_k)
        tokens = 1 << (most.bit_length() - 1)
        return max(tokens, 2) if self.narrow else tokens

    @property
    def entries(self) -> int:
        """Indices of a step."""
        return self.group * self.top_k

    @property
    def num_groups(self) -> int:
        """Steps that all tokens take, for each chunk of columns."""
        return -(-self.num_tokens // self.group)

    @property
    def out_rows(self) -> int:
        """Rows of 32-bit words that a step writes."""
        return self.group // 2 if self.narrow else self.group


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a call runs, and how it is cut up there.

    Attributes:
      engine: "sparsecore"; "xla" for what XLA makes of the reference; or "adder", the SparseCore
        with rows that are added up on their way, see `gather_reduce.adder`.
      parts: subcores that share the tokens of a step, each with some columns.
      chunk: words of a row that are gathered at once.
    """

    engine: Engine
    parts: int = 1
    chunk: int = LANES


@dataclasses.dataclass(frozen=True)
class Work:
    """What each subcore does: a plan, applied to a problem.

    Attributes:
      lanes: of a vector.
      cores, subcores: of the mesh.
      teams: subcores that share a step count once.
      windows: of a team; the indices of one are in its memory at a time.
      window: steps of a window.
      chunks: chunks of a subcore's columns.
    """

    lanes: int
    cores: int
    subcores: int
    teams: int
    windows: int
    window: int
    chunks: int

    @property
    def steps(self) -> int:
        """Steps of a team, those that do not exist included."""
        return self.windows * self.window


def work_of(problem: Problem, plan: Plan, sparse: SparseCores) -> Work:
    """Spreads the steps of a problem over the subcores of a chip."""
    count = sparse.cores * sparse.subcores
    teams = count // plan.parts
    steps = -(-problem.num_groups // teams)
    most = max(1, WINDOW_ENTRIES // problem.entries)
    windows = max(1, -(-steps // most))
    whole = 8 // math.gcd(8, problem.entries)  # offsets of transfers are multiples of 8
    window = -(-max(1, -(-steps // windows)) // whole) * whole
    return Work(
        lanes=sparse.lanes,
        cores=sparse.cores,
        subcores=sparse.subcores,
        teams=teams,
        windows=windows,
        window=window,
        chunks=problem.words // plan.parts // plan.chunk,
    )


def stepped(problem: Problem, plan: Plan, sparse: SparseCores) -> Problem:
    """The problem with the steps that the plan's engine takes."""
    if plan.engine != "adder":
        return problem
    return dataclasses.replace(problem, step_tokens=sparse.lanes)


def padded_entries(problem: Problem, lanes: int) -> int:
    """Rows that a step's buffer has: indices are used a vector at a time."""
    return -(-problem.entries // lanes) * lanes


def vmem_bytes(problem: Problem, plan: Plan, sparse: SparseCores) -> int:
    """Bytes of a subcore's memory that the kernel's buffers take."""
    problem = stepped(problem, plan, sparse)
    work = work_of(problem, plan, sparse)
    entries = work.window * problem.entries + 2 * sparse.lanes
    rows = -(-padded_entries(problem, sparse.lanes) // 8) * 8 * plan.chunk
    if plan.engine == "adder":
        rows = 0  # they are added to the sums, and are nowhere else
    sums = problem.out_rows * problem.format.parts * plan.chunk
    return 4 * (SLOTS * (rows + sums) + entries * (2 if problem.weighted else 1))


def bundles(problem: Problem, plan: Plan, chip: Chip) -> int:
    """Bundles that the busiest subcore issues, about."""
    sparse = chip.sparse
    if sparse is None:
        return 0
    work = work_of(problem, plan, sparse)
    vectors = plan.chunk // sparse.lanes
    per_row = {"float32": 1, "bfloat16": 2, "packed bfloat16": 2, "packed float8_e4m3fn": 23}
    parts = problem.format.parts
    slots = problem.entries * (per_row[problem.rows] + parts * (2 if problem.weighted else 1))
    streams = -(-problem.entries // sparse.lanes) * plan.chunk // LANES
    per_vector = max(-(-slots // 3), problem.entries)  # three vector slots, one load slot
    step = STEP_BUNDLES + streams * STREAM_BUNDLES + vectors * per_vector
    return -(-problem.num_groups // work.teams) * work.chunks * step


def sparse_us(problem: Problem, plan: Plan, chip: Chip) -> float:
    """Predicted microseconds on the SparseCores."""
    row_bytes = problem.words * 4
    moved = problem.num_tokens * (problem.top_k + 1) * row_bytes
    issue = bundles(problem, plan, chip) / (chip.clock_ghz * 1e3)
    return START_US + max(issue, moved / (chip.hbm_gb_per_s * 1e3))


def xla_us(problem: Problem, chip: Chip) -> float:
    """Predicted microseconds on the TensorCore, with all rows gathered before they are summed."""
    count = problem.num_tokens * problem.top_k
    row_bytes = problem.words * 4 // problem.format.rows_per_word
    return count * (ROW_US + 3 * row_bytes / (chip.hbm_gb_per_s * 1e3))


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which plan a call gets, and why.

    Attributes:
      plan: the plan.
      source: "argument" or the cost "model".
      why: a sentence about that choice.
      vmem_bytes: of a subcore, 0 on the TensorCore.
      vmem_limit: what a subcore has.
    """

    plan: Plan
    source: str
    why: str
    vmem_bytes: int
    vmem_limit: int

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(self.plan).items())
        return f"{sizes} ({self.source}: {self.why})"


def check_plan(problem: Problem, plan: Plan, chip: Chip) -> None:
    """Checks that a plan is legal for a problem.

    Raises:
      ArgumentError: a field does not suit the problem.
      UnsupportedError: the chip cannot run it.
    """
    if plan.engine == "xla":
        return
    sparse = chip.sparse
    if sparse is None:
        raise UnsupportedError(
            where="gather_reduce",
            what="engine='sparsecore'",
            place=chip.name,
            why="it has no SparseCore",
            advice="Use implementation='auto', which runs it on the TensorCore.",
        )
    if problem.top_k > MAX_TOP_K:
        raise UnsupportedError(
            where="gather_reduce",
            what=f"top_k of {problem.top_k}",
            place=f"the SparseCores of {chip.name}",
            why=f"the kernel is for at most {MAX_TOP_K}",
            advice="Use implementation='auto', which runs it on the TensorCore.",
        )

    def refuse(field: str, expected: str) -> None:
        got = f"is {getattr(plan, field)}"
        raise ArgumentError(
            where="gather_reduce", argument=f"plan.{field}", got=got, expected=expected
        )

    if plan.engine == "adder" and (problem.rows != "float32" or problem.weighted or problem.narrow):
        refuse("engine", "'sparsecore': 'adder' is for float32 without weights, float32 out")
    tiles = problem.words // LANES
    if plan.parts < 1 or (sparse.cores * sparse.subcores) % plan.parts or tiles % plan.parts:
        refuse("parts", f"a divisor of {sparse.cores * sparse.subcores} and of {tiles} tiles")
    if plan.chunk < LANES or plan.chunk % LANES or problem.words // plan.parts % plan.chunk:
        refuse("chunk", f"a multiple of {LANES} that divides {problem.words // plan.parts} words")
    needed = vmem_bytes(problem, plan, sparse)
    if needed > sparse.vmem_bytes - SPARE_VMEM:
        raise UnsupportedError(
            where="gather_reduce",
            what=f"plan {plan} with {needed} bytes",
            place=chip.name,
            why=f"a subcore has {sparse.vmem_bytes - SPARE_VMEM}",
            advice="Use a smaller chunk.",
        )


def candidates(problem: Problem, chip: Chip) -> list[Plan]:
    """The plans that are legal on the SparseCores of a chip."""
    sparse = chip.sparse
    if sparse is None or problem.top_k > MAX_TOP_K:
        return []
    count, tiles = sparse.cores * sparse.subcores, problem.words // LANES
    found = []
    for parts in (n for n in range(1, count + 1) if count % n == 0 and tiles % n == 0):
        mine = tiles // parts
        for chunk in (n * LANES for n in range(1, mine + 1) if mine % n == 0):
            plan = Plan("sparsecore", parts, chunk)
            if vmem_bytes(problem, plan, sparse) <= sparse.vmem_bytes - SPARE_VMEM:
                found.append(plan)
    return found


def plan_for(
    problem: Problem, chip: Chip, plan: Plan | None = None, *, sparse_only: bool = False
) -> Explanation:
    """The plan of a call: the caller's, else the cost model's.

    Args:
      problem: the problem.
      chip: the chip.
      plan: the caller's, or None.
      sparse_only: the TensorCore is no choice.

    Raises:
      ArgumentError, UnsupportedError: the plan is not legal, or there is none.
    """
    limit = chip.sparse.vmem_bytes if chip.sparse else 0

    def explained(plan: Plan, source: str, why: str) -> Explanation:
        on_sparse = plan.engine != "xla" and chip.sparse is not None
        used = vmem_bytes(problem, plan, chip.sparse) if on_sparse and chip.sparse else 0
        return Explanation(plan, source, why, used, limit)

    if plan is not None:
        check_plan(problem, plan, chip)
        return explained(plan, "argument", "the caller's")
    other = xla_us(problem, chip)
    plans = candidates(problem, chip)
    if not plans:
        if sparse_only:
            check_plan(problem, Plan("sparsecore"), chip)
        why = f"{chip.name} has no SparseCore" if chip.sparse is None else "top_k is too large"
        return explained(Plan("xla"), "model", why)
    best = min(plans, key=lambda p: (bundles(problem, p, chip), p.parts, -p.chunk))
    here = sparse_us(problem, best, chip)
    why = f"predicted {here:.1f} us on the SparseCores, {other:.1f} us on the TensorCore"
    if here <= other or sparse_only:
        return explained(best, "model", why)
    return explained(Plan("xla"), "model", why)
