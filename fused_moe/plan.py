"""The static problem, the block sizes, and the memory they take."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from fused_moe.cost import Costs, costs
from fused_moe.dispatch import LANES, Layout, round_up
from fused_moe.rows import RowFormat
from reference.fused_moe import Activation
from tpukit import planning, tuning
from tpukit.buffers import padded
from tpukit.chips import Chip
from tpukit.errors import ArgumentError, UnsupportedError

ROWS = 32  # rows of a tile of the narrowest type: counts of rows in memory are multiples of it
PARTIALS_BYTES = 64_000_000
SMEM_WORDS = 2**17  # that the lists may take, of the 2**18 of every chip: scalars are spilled there


@dataclasses.dataclass(frozen=True)
class ExpertShape:
    """What the experts of a layer are like; the shared one may differ from the routed ones.

    Attributes:
      inter: width between the projections.
      gate_blocks: blocks of inputs with a scale of their own in gate and up, 0 without scales.
      down_blocks: the same of down.
      biased: whether the projections have biases.
    """

    inter: int
    gate_blocks: int
    down_blocks: int
    biased: bool


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything about a call that is known when it is traced.

    Attributes:
      axes: name and size of each mesh axis that experts are spread over; none on one device.
      num_tokens: of a device, a multiple of ROWS.
      top_k: slots of a token.
      num_experts: of all devices.
      hidden: width of a token, a multiple of 512.
      dtype: of tokens and output.
      weight_dtype: of all projections.
      row_dtype: of tokens as they travel and are multiplied.
      return_dtype: of results as they travel.
      routed, shared: the experts; shared is None without one.
      activation, limit: see `reference.fused_moe.gated`.
    """

    axes: tuple[tuple[str, int], ...]
    num_tokens: int
    top_k: int
    num_experts: int
    hidden: int
    dtype: Any
    weight_dtype: Any
    row_dtype: Any
    return_dtype: Any
    routed: ExpertShape
    shared: ExpertShape | None
    activation: Activation
    limit: float | None

    @property
    def num_devices(self) -> int:
        """Devices that share the experts."""
        return math.prod(size for _, size in self.axes)

    @property
    def experts_here(self) -> int:
        """Experts of a device."""
        return self.num_experts // self.num_devices

    @property
    def slots(self) -> int:
        """Rows that a token gets back at most, that of the shared expert included."""
        return self.top_k + (self.shared is not None)

    @property
    def bulk_rows(self) -> int:
        """Rows of all experts where they travel in bulk: each expert's begin at a multiple."""
        entries = self.num_tokens * self.top_k
        padded = round_up(entries + (ROWS - 1) * min(self.num_experts, entries), ROWS)
        return padded + self.num_tokens * (self.shared is not None)

    @property
    def layout(self) -> Layout:
        """Where the lists hold what."""
        return Layout(self.num_devices, self.num_experts, self.num_tokens, self.top_k)

    @property
    def rows_out(self) -> RowFormat:
        """Tokens as they travel."""
        return RowFormat(self.hidden, self.row_dtype, tailed=True)

    @property
    def rows_back(self) -> RowFormat:
        """Results as they travel."""
        return RowFormat(self.hidden, self.return_dtype, tailed=self.return_dtype != jnp.bfloat16)

    @property
    def quantised(self) -> bool:
        """Whether both products have quantised left sides."""
        return self.rows_out.scaled

    @property
    def shapes(self) -> tuple[ExpertShape, ...]:
        """Of routed and shared experts."""
        return (self.routed,) if self.shared is None else (self.routed, self.shared)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Block sizes of the kernel.

    Attributes:
      tile: rows of one expert that are computed at once, a multiple of 32.
      inter_slice: columns of gate and up in VMEM at once.
      hidden_slice: columns of down in VMEM at once.
      depth: buffers of each kind of slice, a power of two.
      partials: tokens that may be between two experts of a device. Where a batch needs more, the
        experts are visited again for the rest.
      bulk: 1 where rows are sorted by expert before the kernel and added up after it, so that whole
        tiles travel, on one device only; 0 where the kernel moves each row by itself.
    """

    tile: int
    inter_slice: int
    hidden_slice: int
    depth: int = 2
    partials: int = 2048
    bulk: int = 0

    @property
    def tiles(self) -> tuple[int, ...]:
        """Numbers of rows that the kernel is specialised for, ascending."""
        sizes = [self.tile]
        while sizes[0] % (4 * ROWS) == 0:
            sizes.insert(0, sizes[0] // 4)
        return tuple(sizes)

    @property
    def pieces(self) -> int:
        """Blocks of ROWS results that fit the two buffers of tiles, a power of two."""
        return 1 << ((2 * self.tile // ROWS).bit_length() - 1)

    def visits(self, problem: Problem) -> int:
        """Most tiles of routed experts that a device can have in one pass."""
        rows = problem.num_devices * problem.num_tokens
        most = rows * min(problem.top_k, problem.experts_here)
        return problem.experts_here + most // self.tile


@dataclasses.dataclass(frozen=True)
class Explanation(planning.Explanation[Problem, Plan]):
    """Which plan a call gets, and why; whether the kernel is the cheaper way.

    Attributes:
      hbm_bytes: what a device needs besides arguments and output.
      costs: of the kernel with this plan, and of the grouped layer.
    """

    hbm_bytes: int
    costs: Costs

    @property
    def implementation(self) -> Literal["pallas", "grouped"]:
        """What implementation="auto" runs: the cheaper one, or the kernel if a plan is given."""
        kernel = self.source == "argument" or self.costs.fused <= self.costs.grouped
        return "pallas" if kernel else "grouped"

    @property
    def needs(self) -> str:
        """The memory that it takes, and what follows, in words."""
        memory = f"{super().needs}, {self.hbm_bytes / 1e6:.0f} MB HBM"
        return f"{memory}; {self.implementation}, cost model: {self.costs}"


Buffer = tuple[tuple[int, ...], Any]


def buffers(problem: Problem, plan: Plan) -> dict[str, Buffer]:
    """Shape and type of every buffer in VMEM, by its name in `plumbing.Scratch`."""
    tile, depth, hidden = plan.tile, plan.depth, problem.hidden
    inter = max(shape.inter for shape in problem.shapes)
    gate_blocks = max(shape.gate_blocks for shape in problem.shapes)
    down_blocks = max(shape.down_blocks for shape in problem.shapes)
    found: dict[str, Buffer] = {
        "words": ((2, tile, problem.rows_out.row_words), jnp.uint32),
        "x": ((tile, hidden), problem.row_dtype),
        "factors": ((3, tile, LANES), jnp.float32),
        "gate": ((depth, hidden, plan.inter_slice), problem.weight_dtype),
        "up": ((depth, hidden, plan.inter_slice), problem.weight_dtype),
        "down": ((depth, inter, plan.hidden_slice), problem.weight_dtype),
        "h": ((tile, inter), jnp.float32),
        "hq": ((tile, inter), problem.row_dtype),
        "h_scale": ((tile, LANES), jnp.float32),
        "y": ((tile, hidden), jnp.float32),
    }
    if plan.bulk:
        found["out"] = ((2, tile, hidden), problem.dtype)
    else:
        found["out"] = ((2, tile, problem.rows_back.row_words), jnp.uint32)
        found["io"] = ((4, ROWS, hidden), problem.dtype)
        found["tails"] = ((4, ROWS, LANES), jnp.int32)
    if gate_blocks:
        found["gate_scale"] = found["up_scale"] = (
            (depth, gate_blocks, plan.inter_slice),
            jnp.float32,
        )
        found["down_scale"] = ((depth, down_blocks, plan.hidden_slice), jnp.float32)
    if any(shape.biased for shape in problem.shapes):
        found["gate_bias"] = found["up_bias"] = ((depth, 1, plan.inter_slice), jnp.float32)
        found["down_bias"] = ((depth, 1, plan.hidden_slice), jnp.float32)
    return found


def vmem_bytes(problem: Problem, plan: Plan) -> int:
    """Bytes of VMEM that the kernel's buffers take."""
    return sum(padded(*buffer) for buffer in buffers(problem, plan).values())


def vmem_allowed(problem: Problem, plan: Plan) -> int:
    """Bytes of VMEM to ask the compiler for: the buffers, and room for values that are spilled."""
    return vmem_bytes(problem, plan) + 6 * 2**20


def scalars(problem: Problem, plan: Plan) -> int:
    """32-bit words of SMEM that the lists take."""
    layout, n = problem.layout, problem.num_devices
    if plan.bulk:
        return layout.head_rows * LANES + 2 * plan.visits(problem)
    lists = layout.own_words + n * (layout.head_rows + 2 * layout.window_rows) * LANES
    return lists + 2 * plan.visits(problem) + n * problem.num_tokens + 4 * plan.tile + 4 * n


def split(problem: Problem) -> tuple[Problem, int]:
    """The problem of one call of the kernel, and how many it takes for the lists to fit SMEM."""
    smallest = Plan(tile=2 * ROWS, inter_slice=LANES, hidden_slice=LANES)  # most tiles to list
    calls = 1
    while True:
        tokens = round_up(-(-problem.num_tokens // calls), ROWS)
        part = dataclasses.replace(problem, num_tokens=tokens)
        if scalars(part, smallest) <= SMEM_WORDS or tokens == ROWS:
            return part, calls
        calls += 1


def hbm_bytes(problem: Problem, plan: Plan) -> int:
    """Bytes of HBM that a device needs besides arguments and output, whatever the ids are."""
    if plan.bulk:  # rows there, back, and by entry
        entries = problem.num_tokens * problem.top_k
        width = problem.hidden * jnp.dtype(problem.dtype).itemsize
        there = 4 * problem.rows_out.row_words
        return problem.bulk_rows * (there + width) + problem.num_tokens * there + entries * width
    rows = problem.num_devices * problem.num_tokens
    received = rows * problem.rows_out.row_words
    returned = problem.slots * problem.num_tokens * problem.rows_back.row_words
    partials = min(plan.partials, rows) * problem.hidden
    layout = problem.layout
    lists = problem.num_devices * (layout.head_rows + layout.entry_rows) * LANES
    return 4 * (received + returned + partials + lists)


def divisors(width: int, most: int) -> list[int]:
    """Multiples of 128 that divide a width, from `most` down."""
    return [d for d in range(most - most % LANES, 0, -LANES) if width % d == 0]


def check_plan(problem: Problem, plan: Plan, chip: Chip) -> None:
    """Checks that a plan is legal for a problem.

    Raises:
      ArgumentError: a field does not suit the problem.
      UnsupportedError: it needs more memory than the chip has.
    """

    def refuse(field: str, expected: str) -> None:
        got = f"is {getattr(plan, field)}"
        raise ArgumentError(where="fused_moe", argument=f"plan.{field}", got=got, expected=expected)

    if plan.tile < 2 * ROWS or plan.tile % ROWS:
        refuse("tile", f"a multiple of {ROWS}, at least {2 * ROWS}")
    for field, widths in (
        ("inter_slice", [shape.inter for shape in problem.shapes]),
        ("hidden_slice", [problem.hidden]),
    ):
        size = getattr(plan, field)
        if size < LANES or size % LANES or any(width % size for width in widths):
            refuse(field, f"a multiple of {LANES} that divides {widths}")
    if plan.depth < 2 or plan.depth & (plan.depth - 1):
        refuse("depth", "a power of two, at least 2")
    if plan.partials < ROWS:
        refuse("partials", f"at least {ROWS}")
    if plan.bulk not in ((0, 1) if problem.num_devices == 1 else (0,)):
        refuse("bulk", "0, or 1 where there is one device")
    for what, needed, there in (
        ("VMEM", vmem_allowed(problem, plan), chip.vmem_bytes),
        ("SMEM", 4 * scalars(problem, plan), 4 * SMEM_WORDS),
    ):
        if needed > there:
            raise UnsupportedError(
                where="fused_moe",
                what=f"plan {plan} with {needed / 2**20:.1f} MiB of {what}",
                place=chip.name,
                why=f"a kernel gets {there / 2**20:.1f} MiB",
                advice="Use smaller tiles and slices, or fewer tokens per call.",
            )


def expected_partials(problem: Problem) -> int:
    """Partials for twice the tokens that have several experts on one device, if routing is even.

    At least as many as PARTIALS_BYTES hold: routers prefer groups of experts.
    """
    rows, k = problem.num_devices * problem.num_tokens, problem.top_k
    here = 1 / problem.num_devices
    several = 1 - (1 - here) ** k - k * here * (1 - here) ** (k - 1)
    cheap = PARTIALS_BYTES // (4 * problem.hidden)
    return min(rows, round_up(max(int(2 * rows * several) + 256, cheap), ROWS))


# Columns of gate and up, columns of down, buffers of each: the first that fits. Deep rings keep HBM
# busy while rows are being gathered and sent. Tiles of up to SMALL rows wait for their weights, for
# less time at either end if slices are short, so for them the first of these is left out.
SMALL = 2 * ROWS
SLICES = (
    (512, 1024, 4),
    (256, 1024, 4),
    (512, 1024, 2),
    (256, 1024, 2),
    (256, 512, 2),
    (128, 512, 2),
    (128, 256, 2),
)


def even_tile(rows: float) -> int:
    """Rows of a tile such that most experts need as many tiles as the mean one, of up to 288."""
    most = rows + 2.8 * math.sqrt(rows)  # of Poisson's distribution, all but 0.3 % are below
    return max(round_up(math.ceil(most / math.ceil(rows / 256)), ROWS), 2 * ROWS)


def model(problem: Problem, chip: Chip) -> Plan:
    """The cost model: tiles for an expert's expected rows, then the longest slices that fit.

    Raises:
      UnsupportedError: nothing fits.
    """
    rows = problem.num_devices * problem.num_tokens * problem.top_k / problem.num_experts
    tiles = sorted({min(even_tile(rows), most) for most in (512, 256, 128, 64)}, reverse=True)
    inter = functools.reduce(math.gcd, [shape.inter for shape in problem.shapes])
    for tile in tiles:
        for up, down, depth in SLICES[1:] if tile <= SMALL else SLICES:
            plan = Plan(
                tile=tile,
                inter_slice=divisors(inter, up)[0],
                hidden_slice=divisors(problem.hidden, down)[0],
                depth=depth,
                partials=expected_partials(problem),
            )
            if PLANS.fits(problem, plan, chip):
                return plan
    raise UnsupportedError(
        where="fused_moe",
        what=f"hidden {problem.hidden}, intermediate {inter}, {problem.num_tokens} tokens a device",
        place=chip.name,
        why="no tile and slices fit its VMEM and SMEM",
        advice="Use implementation='grouped'.",
    )


def key(problem: Problem) -> dict[str, tuning.Value]:
    """How the table knows a problem."""
    return {
        "weight_dtype": jnp.dtype(problem.weight_dtype).name,
        "row_dtype": jnp.dtype(problem.row_dtype).name,
        "hidden": problem.hidden,
        "inter": problem.routed.inter,
        "shared": problem.shared is not None,
        "num_experts": problem.num_experts,
        "top_k": problem.top_k,
        "num_devices": problem.num_devices,
        "num_tokens": problem.num_tokens,
    }


PLANS = planning.Planner(
    kernel="fused_moe",
    plan=Plan,
    check=check_plan,
    model=model,
    exact={
        "weight_dtype": str,
        "row_dtype": str,
        "hidden": int,
        "inter": int,
        "shared": bool,
        "num_experts": int,
        "top_k": int,
        "num_devices": int,
        "num_tokens": int,  # exact as well: partials are a number of tokens
    },
    bucketed=(),
    key=key,
    choices={
        "tile": (64, 96, 128, 160, 192, 256, 288),
        "inter_slice": (128, 256, 512),
        "hidden_slice": (256, 512, 1024),
        "depth": (2, 4),
    },
    path=Path(__file__).parent / "tuned.json",
)


def plan_for(problem: Problem, chip: Chip, plan: Plan | None = None) -> Explanation:
    """The plan of a call: the caller's, else the table's, else the cost model's.

    Raises:
      ArgumentError, UnsupportedError: the caller's plan is not legal, or none is.
    """
    plan, source, why = PLANS.choose(problem, chip, plan)
    return Explanation(
        problem,
        plan,
        source,
        why,
        vmem_bytes(problem, plan),
        chip.vmem_bytes,
        hbm_bytes(problem, plan),
        costs(problem, plan, chip),
    )
