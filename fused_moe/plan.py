"""The static problem, the block sizes, and the memory they take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from fused_moe.cost import Costs, costs, fused_us
from fused_moe.dispatch import LANES, round_up
from fused_moe.sizes import bulk_candidates, candidates
from fused_moe.spec import ROWS, Plan, Problem
from tpukit import planning, tuning
from tpukit.buffers import padded
from tpukit.chips import Chip
from tpukit.errors import ArgumentError, UnsupportedError

SMEM_WORDS = 2**17  # that the lists may take, of the 2**18 of every chip: scalars are spilled there


@dataclasses.dataclass(frozen=True)
class Explanation(planning.Explanation[Problem, Plan]):
    """Which plan a call gets, and why; whether the kernel is the cheaper way.

    Attributes:
      hbm_bytes: what a device needs besides arguments and output.
      costs: of the kernel with this plan, of the same with rows moved the other way, and of the
        grouped layer.
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
    if plan.bulk and problem.bulk_bits > 32:
        raise UnsupportedError(
            where="fused_moe",
            what=f"{problem.num_tokens} tokens to {problem.num_experts} experts in bulk",
            place=chip.name,
            why="an expert and the number of a row do not fit 32 bits",
            advice="Use a plan with bulk=0, or fewer tokens per call.",
        )
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


def model(problem: Problem, chip: Chip) -> Plan:
    """The cost model: of the best plan of each form, if it fits, the one that costs less.

    Raises:
      UnsupportedError: nothing fits.
    """
    forms = (candidates(problem), bulk_candidates(problem) if problem.num_devices == 1 else ())
    firsts = [next((p for p in plans if PLANS.fits(problem, p, chip)), None) for plans in forms]
    found = [plan for plan in firsts if plan is not None]
    if found:
        return min(found, key=lambda plan: fused_us(problem, plan, chip))
    raise UnsupportedError(
        where="fused_moe",
        what=f"hidden {problem.hidden}, intermediate {problem.routed.inter}, "
        f"{problem.num_tokens} tokens a device",
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
        "inter_slice": (128, 256, 512, 768, 1024),
        "hidden_slice": (256, 512, 1024, 2048),
        "depth": (2, 4),
        "bulk": (0, 1),
    },
    path=Path(__file__).parent / "tuned.json",
)


def schedule(problem: Problem, chip: Chip, plan: Plan | None = None) -> tuple[Explanation, int]:
    """The plan of each call of the kernel, and how many it takes.

    Raises:
      ArgumentError, UnsupportedError: as `plan_for`.
    """
    part, calls = split(problem)
    if calls > 1 and problem.num_devices == 1 and (plan is None or plan.bulk):
        try:
            whole = plan_for(problem, chip, plan)
            if whole.plan.bulk:  # which has no lists that could be too long
                return whole, 1
        except UnsupportedError:
            pass
    return plan_for(part, chip, plan), calls


def plan_for(problem: Problem, chip: Chip, plan: Plan | None = None) -> Explanation:
    """The plan of one call of the kernel: the caller's, else the table's, else the cost model's.

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
