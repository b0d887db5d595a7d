"""The public functions: check, plan, dispatch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from gla import fusions
from gla.fallback import by_reference
from gla.gradient import Arrays, Rows, differentiable
from gla.kernel import gla_kernel
from gla.plan import DIMS, DTYPES, PLANS, Explanation, Plan, Problem, plan_for
from gla.plumbing import Operands
from gla.schedule import DRAFTS, RESUMES, ROWS, Batch
from gla.tables import LANES
from gla.values import all_rules, check_scale, form_of
from reference.gla import ChannelDecay, Decay, HeadDecay, TokenDecay
from reference.gla_drafts import Drafts, Snapshots
from reference.gla_norm import NormGate, NormRope
from tpukit import checks
from tpukit.chips import Chip
from tpukit.chips import chip as chip_named
from tpukit.errors import ArgumentError, UnsupportedError
from tpukit.planning import Implementation, choose_implementation

DECAY_SHAPES = {
    HeadDecay: "heads",
    TokenDecay: "tokens heads",
    ChannelDecay: "tokens heads key_dim",
}
SUPPORTED_CHIPS = ("v5e", "v5p", "v6e", "tpu7x")


def gla(  # noqa: PLR0913  (each by its name)
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state_pool: jax.Array,
    slot_ids: jax.Array,
    cu_seqlens: jax.Array,
    has_state: jax.Array,
    *,
    decay: Decay,
    beta: jax.Array | None = None,
    scale: float | None = None,
    drafts: Drafts | None = None,
    snapshots: Snapshots | None = None,
    prologue: NormRope | None = None,
    epilogue: NormGate | None = None,
    reverse: bool = False,
    batch_invariant: bool = False,
    implementation: Implementation = "auto",
    plan: Plan | None = None,
    validate: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Gated linear attention over a ragged batch of prefill, decode and drafts in any order.

    Per head, with state S [key_dim, value_dim]: S_t = e^(g_t) S_{t-1} + k_t^T v_t and
    o_t = scale * q_t S_t; with a decay per key channel, e^(g_t) scales the rows of S. The delta
    rule puts beta_t (v_t - k_t e^(g_t) S_{t-1}) for v_t: Gated DeltaNet, and KDA with decays per
    channel. One kernel; states are read and written in place in the pool (donate it).

    Args:
      q, k: [tokens, qk_heads, key_dim] bfloat16 or float32. A reshape of the flat projection
        [tokens, qk_heads * key_dim] under the same jit costs nothing; an array that was laid out as
        three dimensions is copied once.
      v: [tokens, heads, value_dim] of the same dtype; heads is a multiple of qk_heads, and value
        head h uses query/key head h * qk_heads // heads. Dims are 64, 128 or 256.
      state_pool: [slots, heads, key_dim, value_dim] float32 or bfloat16.
      slot_ids: [requests] int32 slot of each request. A slot outside [0, slots), such as -1, makes
        the request null: its output is 0 and nothing is moved for it. Where requests share a slot,
        all start from the state before the call and the last one's state is kept.
      cu_seqlens: [requests + 1] int32 row bounds; request n owns rows [cu[n], cu[n + 1]), any
        number of them, none included. Made monotone and clipped to [0, tokens]. Rows of no request
        give 0.
      has_state: [requests] bool, whether a request resumes from its slot or starts from zero.
      decay: `HeadDecay(g [heads])`, `TokenDecay(g [tokens, heads])` or `ChannelDecay(g [tokens,
        heads, key_dim])`, log decays per token, clipped to [-30, 0].
      beta: [tokens, heads] float32 strengths of the delta rule, stable if 0 <= beta_t |k_t|^2 <= 2.
        Not yet with drafts, snapshots, a prologue or an epilogue.
      scale: of the output, a Python number; key_dim ** -0.5 by default.
      drafts: `Drafts(requests, ancestors)`: requests whose rows are drafts, chains or trees of at
        most 64. They see the request's state, their ancestors and themselves; the state stays as it
        is, until `commit`. More than 64 rows of drafts are a chain.
      snapshots: `Snapshots(rows, slots)`: the state after row rows[s] also goes to slot slots[s].
        Ignored: a slot outside the pool, a row of no request, of a null one or of a tree, and one
        not above those before it; a slot that a request with rows has, except that a chain of
        drafts may leave a state in its own slot, which accepts drafts while verifying more; of
        snapshots of one slot all but the last.
      prologue: q and k are normed and turned on their way in, as `gla.norm_rope` would do before
        the call, rounding included; key_dim 128. `commit` takes the k that it makes.
      epilogue: the output is normed and gated on its way out, as `gla.norm_gate` would do after
        the call, rounding included.
      reverse: time runs from a request's last row to its first, whose state is kept.
      batch_invariant: no bit of a request's result may depend on the rest of the batch. Otherwise
        rounding also depends on the request's first row modulo 16. Costs an eighth of prefill.
        Chunks end at snapshots, so a request's snapshots round its result; then each is, to the
        bit, the state of a request that ends there, and what follows that of one that resumes
        there (of more than one row).
      implementation: "pallas" (a TPU), "interpret" (the kernel on a CPU, slow), "reference"
        (`reference.gla.chunked`), or "auto": the kernel on a TPU that supports it, else the
        reference.
      plan: block sizes instead of the tuned ones.
      validate: check values as well (eager calls only): slots, duplicates, bounds, decays.

    Returns:
      o [tokens, heads, value_dim] in the dtype of v, and the new pool; gradients: `gla.gradient`.

    Raises:
      ArgumentError: an argument that can never work: what it was, what it needs.
      UnsupportedError: valid, but not on this machine or chip.
    Source: Lightning Attention-2 (arXiv 2401.04658), GLA (arXiv 2312.06635), Mamba-2 (2405.21060),
      Gated DeltaNet (2412.06464), Kimi Linear (2510.26692).
    """
    batch, more = (slot_ids, cu_seqlens, has_state), {"drafts": drafts, "snapshots": snapshots}
    fused = {"beta": beta, "prologue": prologue, "epilogue": epilogue}
    problem = problem_of(q, k, v, state_pool, *batch, decay, batch_invariant, **more, **fused)
    problem = dataclasses.replace(problem, form=form_of(reverse, drafts, snapshots))
    checks.check_choice("gla", "implementation", implementation, get_args(Implementation))
    scale = check_scale(scale, problem.key_dim)
    if validate:
        rules = all_rules(batch, decay, beta, drafts, snapshots, state_pool.shape[0], v.shape[0])
        checks.raise_if_bad("gla", rules + fusions.value_rules(prologue, epilogue))
    chosen, target = choose(implementation, problem, plan)
    if chosen == "reference":
        options = {"decay": decay, "beta": beta, "scale": scale, "reverse": bool(reverse)} | more
        return by_reference(prologue, epilogue, q, k, v, state_pool, *batch, **options)
    plan_for(problem, target, plan)
    if not problem.any_work:
        return jnp.zeros_like(v), state_pool
    around = fusions.operands(prologue, epilogue, problem.num_tokens)
    arrays, rows = Arrays(q, k, v, state_pool, beta), Rows(*batch, drafts, snapshots, around)
    return differentiable(Kernel(target, plan, scale, chosen), problem, arrays, rows, decay)


def gla_batch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    decay: Decay,
    beta: jax.Array | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    reverse: bool = False,
    batch_invariant: bool = False,
    implementation: Implementation = "auto",
    plan: Plan | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gated linear attention over sequences of equal length; see `gla` for what is not said here.

    Args:
      q, k: [batch, time, qk_heads, key_dim].
      v: [batch, time, heads, value_dim].
      decay: `HeadDecay(g [heads])`, `TokenDecay(g [batch, time, heads])` or `ChannelDecay(g [batch,
        time, heads, key_dim])`.
      beta: [batch, time, heads].
      scale: of the output, key_dim ** -0.5 by default.
      initial_state: [batch, heads, key_dim, value_dim], zero by default.
      reverse, batch_invariant, implementation, plan: as in `gla`.

    Returns:
      o [batch, time, heads, value_dim] and the final state [batch, heads, key_dim, value_dim] in
      the dtype of the initial state, float32 by default.

    Raises:
      ArgumentError, UnsupportedError: as `gla`.
    """
    dims = checks.Dims("gla_batch")
    dims.bind("q", q, "batch time qk_heads key_dim")
    dims.bind("k", k, "batch time qk_heads key_dim")
    dims.bind("v", v, "batch time heads value_dim")
    batch, time = q.shape[:2]
    shape = (batch, v.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None:
        dims.bind("initial_state", initial_state, "batch heads key_dim value_dim")
    state = jnp.zeros(shape, jnp.float32) if initial_state is None else initial_state
    if not isinstance(decay, HeadDecay):
        more = " key_dim" if isinstance(decay, ChannelDecay) else ""
        dims.bind("decay.g", decay.g, "batch time heads" + more)
        decay = type(decay)(decay.g.reshape(batch * time, *decay.g.shape[2:]))
    if beta is not None:
        dims.bind("beta", beta, "batch time heads")
        beta = beta.reshape(batch * time, -1)
    q, k, rows = (x.reshape(batch * time, *x.shape[2:]) for x in (q, k, v))
    o, state = gla(
        q,
        k,
        rows,
        state,
        jnp.arange(batch, dtype=jnp.int32),
        jnp.arange(batch + 1, dtype=jnp.int32) * time,
        jnp.full(batch, initial_state is not None),
        decay=decay,
        beta=beta,
        scale=scale,
        reverse=reverse,
        batch_invariant=batch_invariant,
        implementation=implementation,
        plan=plan,
    )
    return o.reshape(v.shape), state


def explain(  # noqa: PLR0913  (as `gla`)
    q: Any,
    k: Any,
    v: Any,
    state_pool: Any,
    slot_ids: Any,
    cu_seqlens: Any,
    has_state: Any,
    *,
    decay: Decay,
    beta: Any = None,
    chip: str,
    drafts: Drafts | None = None,
    snapshots: Snapshots | None = None,
    prologue: NormRope | None = None,
    epilogue: NormGate | None = None,
    batch_invariant: bool = False,
    plan: Plan | None = None,
) -> Explanation:
    """The plan that `gla` would use for these arrays or shapes on a chip that need not be present.

    Raises:
      ArgumentError, UnsupportedError: what `gla` would raise there.
    """
    problem = problem_of(
        q, k, v, state_pool, slot_ids, cu_seqlens, has_state, decay, batch_invariant, drafts,
        snapshots, beta=beta, prologue=prologue, epilogue=epilogue,
    )  # fmt: skip
    return plan_for(problem, chip_named(chip), plan)


def supports(*args: Any, **kwargs: Any) -> bool:
    """Whether `gla` runs its kernel for these shapes on a chip; arguments as `explain`."""
    try:
        explain(*args, **kwargs)
    except (ArgumentError, UnsupportedError):
        return False
    return True


def problem_of(  # noqa: PLR0913  (as `gla`)
    q: Any,
    k: Any,
    v: Any,
    state_pool: Any,
    slot_ids: Any,
    cu_seqlens: Any,
    has_state: Any,
    decay: Decay,
    batch_invariant: bool,
    drafts: Drafts | None = None,
    snapshots: Snapshots | None = None,
    *,
    prologue: NormRope | None = None,
    epilogue: NormGate | None = None,
    beta: Any = None,
    where: str = "gla",
) -> Problem:
    """Checks shapes and dtypes.

    Raises:
      ArgumentError: one of them is wrong.
    """
    dims = checks.Dims(where)
    if q is not None:
        dims.bind("q", q, "tokens qk_heads key_dim")
    dims.bind("k", k, "tokens qk_heads key_dim")
    dims.bind("v", v, "tokens heads value_dim")
    dims.bind("state_pool", state_pool, "slots heads key_dim value_dim")
    dims.bind("slot_ids", slot_ids, "requests")
    dims.bind("cu_seqlens", cu_seqlens, "requests+1")
    dims.bind("has_state", has_state, "requests")
    if type(decay) not in DECAY_SHAPES:
        raise ArgumentError(
            where=where,
            argument="decay",
            got=f"is a {type(decay).__name__}",
            expected="HeadDecay(g), TokenDecay(g) or ChannelDecay(g)",
        )
    dims.bind("decay.g", decay.g, DECAY_SHAPES[type(decay)])
    if q is not None:
        checks.check_dtype(where, "q", q, DTYPES)
    checks.check_dtype(where, "k", k, DTYPES if q is None else (q.dtype,))
    checks.check_dtype(where, "v", v, (k.dtype,))
    checks.check_dtype(where, "state_pool", state_pool, (jnp.float32, jnp.bfloat16))
    checks.check_dtype(where, "slot_ids", slot_ids, (jnp.int32,))
    checks.check_dtype(where, "cu_seqlens", cu_seqlens, (jnp.int32,))
    checks.check_dtype(where, "has_state", has_state, (jnp.bool_,))
    checks.check_dtype(where, "decay.g", decay.g, (jnp.float32,))
    check_options(dims, drafts, snapshots)
    if beta is not None:
        dims.bind("beta", beta, "tokens heads")
        checks.check_dtype(where, "beta", beta, (jnp.float32,))
        if any(x is not None for x in (drafts, snapshots, prologue, epilogue)):
            raise ArgumentError(
                where=where,
                argument="beta",
                got="is given together with drafts, snapshots, a prologue or an epilogue",
                expected="to come alone",
            )
    checks.check_range(where, "qk_heads", dims["qk_heads"], low=1)
    checks.check_multiple(
        where, "heads of v", dims["heads"], dims["qk_heads"], "Every query/key head needs as many."
    )
    checks.check_range(where, "heads of v", dims["heads"], low=1)
    for dim in ("key_dim", "value_dim"):
        checks.check_choice(where, dim, dims[dim], DIMS)
    return Problem(
        num_tokens=-(-dims["tokens"] // ROWS) * ROWS,
        num_requests=dims["requests"],
        num_slots=dims["slots"],
        qk_heads=dims["qk_heads"],
        heads=dims["heads"],
        key_dim=dims["key_dim"],
        value_dim=dims["value_dim"],
        dtype=jnp.dtype(k.dtype),
        state_dtype=jnp.dtype(state_pool.dtype),
        per_token=not isinstance(decay, HeadDecay),
        batch_invariant=bool(batch_invariant),
        per_channel=isinstance(decay, ChannelDecay),
        delta=beta is not None,
        outputs=q is not None,
        drafts=drafts is not None,
        tree=drafts is not None and drafts.ancestors is not None,
        num_snapshots=0 if snapshots is None else dims["snapshots"],
        prologue=fusions.check_prologue(prologue, dims),
        epilogue=fusions.check_epilogue(epilogue, dims, v.dtype),
    )


def check_options(dims: checks.Dims, drafts: Drafts | None, snapshots: Snapshots | None) -> None:
    """Checks shapes and dtypes of what may be absent.

    Raises:
      ArgumentError: one of them is wrong.
    """
    for name, value, kind in (("drafts", drafts, Drafts), ("snapshots", snapshots, Snapshots)):
        if value is not None and not isinstance(value, kind):
            raise ArgumentError(
                where="gla",
                argument=name,
                got=f"is a {type(value).__name__}",
                expected=f"{kind.__name__} or None",
            )
    if drafts is not None:
        dims.bind("drafts.requests", drafts.requests, "requests")
        checks.check_dtype("gla", "drafts.requests", drafts.requests, (jnp.bool_,))
        check_words("gla", dims, "drafts.ancestors", drafts.ancestors, "tokens")
    if snapshots is not None:
        dims.bind("snapshots.rows", snapshots.rows, "snapshots")
        dims.bind("snapshots.slots", snapshots.slots, "snapshots")
        checks.check_dtype("gla", "snapshots.rows", snapshots.rows, (jnp.int32,))
        checks.check_dtype("gla", "snapshots.slots", snapshots.slots, (jnp.int32,))


def check_words(
    where: str, dims: checks.Dims, argument: str, words: jax.Array | None, rows: str
) -> None:
    """Checks words with a bit for each draft, if there are any.

    Raises:
      ArgumentError: their shape or dtype is wrong.
    """
    if words is not None:
        dims.bind(argument, words, f"{rows} _")
        checks.check_dtype(where, argument, words, (jnp.uint32,))
        checks.check_choice(where, f"words of {argument}", words.shape[1], (1, 2))


def choose(
    implementation: Implementation, problem: Problem, plan: Plan | None
) -> tuple[Implementation, Chip]:
    """What runs, and the chip to plan for."""
    planned = functools.partial(plan_for, problem, plan=plan)
    return choose_implementation("gla", implementation, SUPPORTED_CHIPS, planned)


class Call(NamedTuple):
    """The arrays of a call, as the caller has them."""

    arrays: tuple[Any, jax.Array, jax.Array, jax.Array]  # q or None, k, v, state_pool
    batch: tuple[jax.Array, jax.Array, jax.Array]  # slot_ids, cu_seqlens, has_state
    decay: Decay
    drafts: Drafts | None = None
    snapshots: Snapshots | None = None
    around: fusions.Around = fusions.Around()
    beta: jax.Array | None = None

    def scalars(self, num_tokens: int) -> Batch:
        """What steers the kernel."""
        slot_ids, cu_seqlens, has_state = self.batch
        flags = has_state.astype(jnp.int32) * RESUMES
        if self.drafts is not None:
            flags += self.drafts.requests.astype(jnp.int32) * DRAFTS
        rows, slots = None, None
        if self.snapshots is not None and self.snapshots.rows.shape[0]:
            rows, slots = self.snapshots.rows, self.snapshots.slots
        if num_tokens % ROWS:  # rows of padding belong to nobody
            cu_seqlens = jnp.minimum(cu_seqlens, num_tokens)
            rows = None if rows is None else jnp.where(rows < num_tokens, rows, -1)
        return Batch(slot_ids, cu_seqlens, flags, rows, slots)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel with everything that does not depend on the problem.

    Attributes:
      chip: to plan for.
      plan: block sizes for every problem for which they are legal; the tuned ones for others.
      scale: of the output.
      chosen: "pallas" or "interpret".
    """

    chip: Chip
    plan: Plan | None
    scale: float
    chosen: Implementation

    def __call__(
        self, problem: Problem, arrays: Arrays, rows: Rows, decay: Decay
    ) -> tuple[jax.Array, jax.Array]:
        """O and the new pool."""
        mine = self.plan is not None and PLANS.fits(problem, self.plan, self.chip)
        plan = plan_for(problem, self.chip, self.plan if mine else None).plan
        batch = (rows.slot_ids, rows.cu_seqlens, rows.has_state)
        more = (rows.drafts, rows.snapshots, rows.around, arrays.beta)
        call = Call(arrays[:4], batch, decay, *more)
        return launch(call, problem, plan, self.scale, self.chosen)


def launch(
    call: Call, problem: Problem, plan: Plan, scale: float, chosen: Implementation
) -> tuple[Any, jax.Array]:
    """Brings the arguments into the kernel's layout and runs it."""
    q, k, v, pool = call.arrays
    num_tokens = v.shape[0]
    padding = problem.num_tokens - num_tokens

    def rows(x: jax.Array) -> jax.Array:
        flat = x.reshape(num_tokens, -1)
        return jnp.pad(flat, ((0, padding), (0, 0))) if padding else flat

    def by_block(x: jax.Array) -> jax.Array:  # [tokens, heads] -> [heads / h, tokens, h]
        return rows(x).reshape(problem.num_tokens, -1, plan.heads).swapaxes(0, 1)

    g = call.decay.g
    if problem.per_channel:
        g = rows(g)
    elif problem.per_token:
        g = by_block(g)
    words = call.drafts.ancestors if call.drafts is not None else None
    if words is not None:
        words = jnp.pad(rows(words), ((0, 0), (0, LANES - words.shape[1])))
        words = jax.lax.bitcast_convert_type(words, jnp.int32)
    beta = None if call.beta is None else by_block(call.beta)
    flat = Operands(
        None if q is None else rows(q), rows(k), rows(v), g, words, beta, call.around, pool
    )
    interpret = pltpu.InterpretParams() if chosen == "interpret" else False
    o, pool = gla_kernel(
        call.scalars(num_tokens),
        flat,
        problem=problem,
        plan=plan,
        scale=scale,
        interpret=interpret,
    )
    return None if o is None else o[:num_tokens].reshape(v.shape), pool
