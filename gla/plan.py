"""The static problem, the block sizes, and the memory they take."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp

from gla.schedule import FORWARD, MAX_DRAFTS, ROWS, Form, Limits, Schedule
from tpukit import planning, tuning
from tpukit.buffers import padded
from tpukit.chips import Chip
from tpukit.errors import ArgumentError, UnsupportedError

DIMS = (64, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float32)
MAX_SCALARS = 3 * 2**16  # 32-bit words of SMEM for the schedule, of the 2**18 that every chip has
LANES = 128
OUTPUTS = 4  # buffers of outputs, a power of two: a short item takes less than a transfer's latency


@dataclasses.dataclass(frozen=True)
class Prologue:
    """Static facts of a `NormRope`."""

    rotary_dim: int
    eps: float


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """Static facts of a `NormGate`."""

    heads_per_group: int
    eps: float


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything about a call that is known when it is traced.

    Attributes:
      num_tokens: rows of the batch, a multiple of ROWS.
      num_requests: requests, empty ones included.
      num_slots: slots of the state pool.
      qk_heads, heads: query/key heads and value heads.
      key_dim, value_dim: width of a head of q and k, and of v.
      dtype: of q, k, v and the output.
      state_dtype: of the state pool.
      per_token: decays differ from token to token; they are not constants of the heads.
      per_channel: and from key channel to key channel.
      delta: values are written by the delta rule.
      batch_invariant: no bit of a request's result may depend on the rest of the batch.
      outputs: there is a q, and an output; else only states advance.
      drafts, tree: requests may be drafts; and have words of ancestors.
      num_snapshots: states wanted in other slots.
      prologue, epilogue: what is done to q and k before and to o after.
      form: the direction of time, and where decays apply.
      out_dtype: of the output, if not that of v.
    """

    num_tokens: int
    num_requests: int
    num_slots: int
    qk_heads: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: jnp.dtype
    state_dtype: jnp.dtype
    per_token: bool
    batch_invariant: bool
    per_channel: bool = False
    delta: bool = False
    outputs: bool = True
    drafts: bool = False
    tree: bool = False
    num_snapshots: int = 0
    prologue: Prologue | None = None
    epilogue: Epilogue | None = None
    form: Form = FORWARD
    out_dtype: jnp.dtype | None = None

    def limits(self, plan: Plan) -> Limits:
        """What the schedule depends on."""
        return Limits(
            self.num_tokens,
            self.num_slots,
            plan.window,
            self.batch_invariant,
            self.outputs and self.form == FORWARD,
            self.drafts,
            self.tree,
            self.num_snapshots,
            self.form.reverse,
        )

    @property
    def any_work(self) -> bool:
        """Whether there is anything for the kernel to do."""
        return min(self.num_tokens, self.num_requests, self.num_slots) > 0

    @property
    def o_dtype(self) -> jnp.dtype:
        """Type of the output."""
        return self.out_dtype or self.dtype

    @property
    def shifted(self) -> bool:
        """Whether chunks are moved to the start of their windows, lest rounding depend on it."""
        return self.batch_invariant and (self.per_channel or self.delta)

    @property
    def group(self) -> int:
        """Value heads that share one query/key head."""
        return self.heads // self.qk_heads


@dataclasses.dataclass(frozen=True)
class Plan:
    """Block sizes of the kernel.

    Attributes:
      heads: value heads of one grid step, unrolled in the kernel's body.
      interleave: heads whose stages are interleaved to keep the matrix units fed.
      window: most rows that are computed at once.
      inputs: buffers of q, k, v windows, a power of two; all but one are being fetched ahead.
      states: buffers of states, a power of two.
      lookahead: states fetched ahead; the other buffers but one are being written back.
    """

    heads: int
    interleave: int = 4
    window: int = 128
    inputs: int = 4
    states: int = 8
    lookahead: int = 4

    @property
    def windows(self) -> tuple[int, ...]:
        """Window sizes that the kernel is specialised for, ascending."""
        sizes = [self.window]
        while sizes[0] > 32:
            sizes.insert(0, sizes[0] // 2)
        return tuple(sizes)

    @property
    def draft_windows(self) -> tuple[int, ...]:
        """Those of them that drafts need, wherever in a group they begin."""
        return tuple(size for size in self.windows if size < 2 * (MAX_DRAFTS + ROWS - 1))


def vmem_bytes(problem: Problem, plan: Plan) -> int:
    """Bytes of VMEM that the kernel's buffers take."""
    h, w = plan.heads, plan.window
    qk = h // problem.group * problem.key_dim
    vo = h * problem.value_dim
    state = (problem.key_dim, problem.value_dim)
    rows = padded((w, qk), problem.dtype) + padded((w, vo), problem.dtype)
    if problem.outputs:
        rows += padded((w, qk), problem.dtype)
        total = OUTPUTS * padded((w, vo), problem.o_dtype)
        total += padded((h // problem.group, problem.key_dim, LANES), jnp.float32)
        total += 2 * padded((h, ROWS, problem.value_dim), jnp.float32)
    else:
        total = 0
    total += plan.inputs * rows
    total += plan.states * padded((h, *state), problem.state_dtype)
    if problem.state_dtype != jnp.float32:
        total += padded((h, *state), jnp.float32)
    if problem.num_snapshots:
        total += 2 * padded((h, *state), problem.state_dtype)
    if problem.tree:
        total += tree_bytes(plan)
    if problem.prologue is not None:
        total += padded((plan.inputs, w, LANES), jnp.float32)
    if problem.epilogue is not None:
        total += padded((plan.inputs, w, vo), problem.dtype)
    if problem.delta:
        total += plan.inputs * padded((w, h), jnp.float32)
    if problem.per_channel:
        if problem.outputs:
            total += padded((h, problem.key_dim, LANES), jnp.float32)
        terms = 1 if problem.dtype == jnp.float32 else 2
        total += sum(padded((4 * size, terms * size), problem.dtype) for size in plan.windows)
        return total + plan.inputs * padded((w, h * problem.key_dim), jnp.float32)
    if problem.per_token:
        total += plan.inputs * padded((w, h), jnp.float32) + padded((w + 8, h), jnp.float32)
        return total + padded((h, w), jnp.float32)
    return (
        total + padded((h, w, w), jnp.float32) + padded((h, 3 * w + 2 * ROWS, LANES), jnp.float32)
    )


def tree_bytes(plan: Plan) -> int:
    """Bytes of VMEM of words of ancestors and what is made of them, see `gla.tree`."""
    widest = plan.draft_windows[-1]
    words = plan.inputs * padded((widest, LANES), jnp.int32)
    sums = padded((widest, plan.heads), jnp.float32) + padded((plan.heads, widest), jnp.float32)
    return words + padded((widest, widest), jnp.float32) + sums


def vmem_allowed(problem: Problem, plan: Plan) -> int:
    """Bytes of VMEM to ask the compiler for: the buffers, and room for values that are spilled."""
    values = 8 if problem.per_channel or problem.delta else 4
    if problem.per_channel:
        values *= max(1, problem.key_dim // LANES)
    return vmem_bytes(problem, plan) * 9 // 8 + values * 2**20


def scalars(problem: Problem, plan: Plan) -> int:
    """32-bit words of SMEM that the schedule and the description of the batch take."""
    return (
        sum(Schedule.sizes(problem.limits(plan), problem.num_requests))
        + 3 * (problem.num_requests + 1)
        + 2 * problem.num_snapshots
        + problem.heads
    )


def check_plan(problem: Problem, plan: Plan, chip: Chip) -> None:
    """Checks that a plan is legal for a problem.

    Raises:
      ArgumentError: a field does not suit the problem.
      UnsupportedError: it needs more memory than the chip has.
    """

    def refuse(field: str, expected: str) -> None:
        got = f"is {getattr(plan, field)}"
        raise ArgumentError(where="gla", argument=f"plan.{field}", got=got, expected=expected)

    lanes = (plan.heads // problem.group * problem.key_dim, plan.heads * problem.value_dim)
    if plan.heads < 1 or problem.heads % plan.heads or plan.heads % problem.group:
        refuse("heads", f"a divisor of {problem.heads} and a multiple of {problem.group}")
    if plan.heads != problem.heads and any(width % LANES for width in lanes):
        refuse("heads", f"all heads, or a number whose widths {lanes} are multiples of {LANES}")
    group = 1 if problem.epilogue is None else problem.epilogue.heads_per_group
    if plan.heads % group:
        refuse("heads", f"a multiple of epilogue.heads_per_group, {group}")
    if plan.interleave < 1 or plan.heads % plan.interleave:
        refuse("interleave", f"a divisor of plan.heads = {plan.heads}")
    windows = (32, 64, 128) if problem.per_channel or problem.delta else (32, 64, 128, 256)
    if plan.window not in windows:
        refuse("window", f"one of {windows}")
    if problem.tree and plan.window < MAX_DRAFTS + ROWS:
        refuse("window", f"128 or 256 for trees of {MAX_DRAFTS} drafts")
    for field in ("inputs", "states"):
        value = getattr(plan, field)
        if value < 2 or value & (value - 1):
            refuse(field, "a power of two, at least 2")
    if not 1 <= plan.lookahead < plan.states:
        refuse("lookahead", f"1 to {plan.states - 1}, below plan.states")
    needed = vmem_allowed(problem, plan)
    if needed > chip.vmem_bytes:
        raise UnsupportedError(
            where="gla",
            what=f"plan {plan} with {needed / 2**20:.1f} MiB of VMEM",
            place=chip.name,
            why=f"a core has {chip.vmem_bytes / 2**20:.0f} MiB",
            advice="Use fewer heads, states or inputs per step.",
        )


def model(problem: Problem, chip: Chip) -> Plan:
    """The cost model: the most heads per grid step that fit, for long DMAs and few passes.

    Raises:
      UnsupportedError: nothing fits.
    """
    # f32 products take six passes of the matrix unit, and as much more code. Decays per channel
    # multiply a window's rows with each other in many pieces, for which units of 128 are too slow.
    short = problem.dtype == jnp.float32 or (problem.per_channel and chip.mxu_side == 128)
    window = 64 if short and not problem.tree else 128
    for heads in range(min(problem.heads, max(16, problem.group)), 0, -1):
        interleave = math.gcd(heads, 2 if problem.dtype == jnp.float32 or problem.delta else 4)
        for states, lookahead in ((8, 4), (4, 2)):
            plan = Plan(heads, interleave, window, 4, states, lookahead)
            if PLANS.fits(problem, plan, chip):
                return plan
    raise UnsupportedError(
        where="gla",
        what=f"{problem}",
        place=chip.name,
        why="no number of heads per step both divides the lanes and fits VMEM",
        advice="Shard the heads, or use implementation='reference'.",
    )


def key(problem: Problem) -> dict[str, tuning.Value]:
    """How the table knows a problem."""
    return {
        "dtype": jnp.dtype(problem.dtype).name,
        "state_dtype": jnp.dtype(problem.state_dtype).name,
        "key_dim": problem.key_dim,
        "value_dim": problem.value_dim,
        "group": problem.group,
        "per_token": problem.per_token,
        "per_channel": problem.per_channel,
        "delta": problem.delta,
        "heads": problem.heads,
    }


PLANS = planning.Planner(
    kernel="gla",
    plan=Plan,
    check=check_plan,
    model=model,
    exact={
        "dtype": str,
        "state_dtype": str,
        "key_dim": int,
        "value_dim": int,
        "group": int,
        "per_token": bool,
        "per_channel": bool,
        "delta": bool,
    },
    bucketed=("heads",),
    key=key,
    choices={
        "window": (64, 128, 256),
        "heads": (4, 8, 16),
        "interleave": (1, 2, 4, 8),
        "inputs": (2, 4, 8),
        "states": (4, 8, 16),
        "lookahead": (2, 4, 6, 8, 12),
    },
    path=Path(__file__).parent / "tuned.json",
)
Explanation = planning.Explanation[Problem, Plan]


def plan_for(problem: Problem, chip: Chip, plan: Plan | None = None) -> Explanation:
    """The plan of a call: the caller's, else the table's, else the cost model's.

    Raises:
      ArgumentError, UnsupportedError: the caller's plan is not legal, or none is.
    """
    if problem.tree and problem.per_channel:
        raise UnsupportedError(
            where="gla",
            what="a tree of drafts with a decay per key channel",
            place=chip.name,
            why="decays between drafts are computed for a scalar per token only",
            advice="Verify chains, or use implementation='reference'.",
        )
    if problem.prologue is not None and problem.key_dim != LANES:
        raise UnsupportedError(
            where="gla",
            what=f"a prologue with key_dim {problem.key_dim}",
            place=chip.name,
            why=f"the kernel turns lanes within one register of {LANES}",
            advice="Apply gla.norm_rope before the call.",
        )
    if (problem.per_channel or problem.delta) and problem.form != FORWARD:
        raise UnsupportedError(
            where="gla",
            what="reverse=True with a ChannelDecay or beta",
            place=chip.name,
            why="the kernel takes those forward in time only",
            advice="Flip the arrays, or use implementation='reference'.",
        )
    words = scalars(problem, plan or Plan(problem.heads))
    if words > MAX_SCALARS:
        raise UnsupportedError(
            where="gla",
            what=f"a pool of {problem.num_slots} slots with {problem.num_requests} requests",
            place=chip.name,
            why=f"its schedule takes {words} scalars, and {MAX_SCALARS} fit",
            advice="Use a smaller pool, or split the batch.",
        )
    plan, source, why = PLANS.choose(problem, chip, plan)
    used = vmem_bytes(problem, plan)
    return Explanation(problem, plan, source, why, used, chip.vmem_bytes)
