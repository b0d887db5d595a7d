"""The gradient: three more passes of the kernel itself.

The operation is linear in q, in k and in v, so each cotangent is gated linear attention of the
other arrays. For the rows of one request and head, and with R_t the cotangent of S_t,

    o_t = scale * q_t S_t
    S_t = a_t S_{t-1} + k_t^T v_t
    R_t = a_{t+1} R_{t+1} + scale * q_t^T dO_t

    dq_t = scale * dO_t S_t^T     in the direction of time, of (dO, v, k) from the state transposed
    dv_t = k_t R_t                the late form backwards, of (k, q, dO) from the final cotangent
    dk_t = v_t R_t^T              likewise, of (v, dO, q) from that transposed

and the state that the late form ends with is a_1 R_1, the cotangent of the initial state. A log
decay's cotangent is W_t = a_t <R_t, S_{t-1}>. Since <R_t, S_t> is both W_t + k_t . dk_t and
W_{t+1} + q_t . dq_t, it is a sum from the far end of time:

    W_t = W_{t+1} + q_t . dq_t - k_t . dk_t,   W_{T+1} = <dS_T, S_T>

Errors add up along it: of a decay per token to about 1 % over thousands of tokens in bf16, to 1e-4
in f32. The sum over time that a decay per head needs would be mostly error, and is left to
differentiation of the reference, in f32 and as slow. So is, so far, everything of a decay per key
channel and of the delta rule: there only the forward pass is the kernel.

All exponents are those of the kernel, differences that are never positive. Nothing is saved but the
arguments and the requests' initial states. Clipped log decays have a gradient of 0.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from gla.fusions import Around
from gla.plan import Problem
from gla.schedule import Form
from reference import gla as reference
from reference.gla import Decay, Requests, TokenDecay
from reference.gla_drafts import Drafts, Snapshots
from tpukit.errors import UnsupportedError
from tpukit.manual import vary_together


class Arrays(NamedTuple):
    """What is differentiated besides the decay."""

    q: jax.Array  # [T, qk_heads, key_dim]
    k: jax.Array  # [T, qk_heads, key_dim]
    v: jax.Array  # [T, heads, value_dim]
    pool: jax.Array  # [slots, heads, key_dim, value_dim]
    beta: jax.Array | None = None  # [T, heads]


class Rows(NamedTuple):
    """The caller's description of the batch."""

    slot_ids: jax.Array  # [N]
    cu_seqlens: jax.Array  # [N + 1]
    has_state: jax.Array  # [N] bool
    drafts: Drafts | None = None
    snapshots: Snapshots | None = None
    around: Around = Around()  # arrays of the prologue and the epilogue


class Run(Protocol):
    """The kernel for any problem: o and the new pool. Hashable, equal where it does the same."""

    @property
    def scale(self) -> float:
        """Of the output."""
        ...

    def __call__(
        self, problem: Problem, arrays: Arrays, rows: Rows, decay: Decay
    ) -> tuple[jax.Array, jax.Array]:
        """Runs it."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Saved:
    """What the backward pass needs.

    Attributes:
      arrays: of the call, the pool replaced by the states of the requests, [N, ...].
      rows, decay: of the call.
      learns_decay: a gradient with regard to the decay is wanted.
    """

    arrays: Arrays
    rows: Rows
    decay: Decay
    learns_decay: bool = dataclasses.field(metadata={"static": True})


def differentiable(
    run: Run, problem: Problem, arrays: Arrays, rows: Rows, decay: Decay
) -> tuple[jax.Array, jax.Array]:
    """`run(problem, arrays, rows, decay)` with a gradient."""
    arrays, decay = vary_together((arrays, decay), *jax.tree.leaves(rows))
    return _call(run, problem, arrays, rows, decay)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _call(
    run: Run, problem: Problem, arrays: Arrays, rows: Rows, decay: Decay
) -> tuple[jax.Array, jax.Array]:
    return run(problem, arrays, rows, decay)


def _forward(
    run: Run, problem: Problem, arrays: Any, rows: Any, decay: Any
) -> tuple[tuple[jax.Array, jax.Array], Saved]:
    more = (rows.drafts, rows.snapshots, problem.prologue, problem.epilogue)
    if any(x is not None for x in more):
        raise UnsupportedError(
            where="gla",
            what="a gradient with drafts, snapshots, a prologue or an epilogue",
            place="the kernel",
            why="it is not implemented",
            advice="Use gla.norm_rope and gla.norm_gate around the call.",
        )
    learns_decay = decay.g.perturbed
    arrays, rows, decay = custom_vjp_primal_tree_values((arrays, rows, decay))
    load = requests_of(rows, arrays).load
    saved = Saved(arrays._replace(pool=arrays.pool[load]), rows, decay, learns_decay)
    return run(problem, arrays, rows, decay), saved


def _backward(run: Run, problem: Problem, saved: Saved, cotangents: tuple[Any, Any]) -> Any:
    (q, k, v, states, beta), rows, decay = saved.arrays, saved.rows, saved.decay
    d_o, d_pool = cotangents
    if isinstance(d_o, SymbolicZero):
        d_o = jnp.zeros(v.shape, v.dtype)
    requests = requests_of(rows, saved.arrays, problem.num_slots)
    index = jnp.arange(len(rows.slot_ids), dtype=jnp.int32)
    index = jnp.where(requests.live, index, -1)
    initial = kept(requests.resumes, states)
    stored = requests.store < problem.num_slots
    if isinstance(d_pool, SymbolicZero):
        final = jnp.zeros(states.shape, jnp.float32)
    else:
        final = kept(stored, d_pool.at[requests.store].get(mode="clip"))
    d_o, final = vary_together((d_o, final), v)

    def plain(arrays: Arrays, decay: Decay) -> tuple[jax.Array, jax.Array]:
        options = {"decay": decay, "scale": run.scale, "reverse": problem.form.reverse}
        batch = (index, rows.cu_seqlens, requests.resumes)
        return reference.chunked(*arrays[:4], *batch, beta=arrays.beta, **options)

    if problem.per_channel or problem.delta:
        arrays, d_decay = jax.vjp(plain, Arrays(q, k, v, initial, beta), decay)[1]((d_o, final))
        d_initial = kept(requests.resumes, arrays.pool)
        d_pool = pool_gradient(d_pool, d_initial, requests, problem)
        return arrays._replace(pool=d_pool), None, d_decay
    sums = saved.learns_decay and problem.per_token
    wide = sums or problem.group > 1

    def pass_of(
        form: Form, arrays: Arrays, known: jax.Array, wide: bool
    ) -> tuple[jax.Array, jax.Array]:
        these = problem_of_pass(problem, form, arrays, wide)
        return run(these, arrays, Rows(index, rows.cu_seqlens, known), decay)

    def per_head(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, problem.group, axis=1) if problem.group > 1 else x

    transposed = functools.partial(jnp.swapaxes, axis1=2, axis2=3)
    form, adjoint = problem.form, problem.form.adjoint
    q_wide, k_wide = per_head(q), per_head(k)
    inward = Arrays(d_o, v, k_wide, transposed(initial))
    dq, last = pass_of(form, inward, requests.resumes, wide)
    dv, d_initial = pass_of(adjoint, Arrays(k, q, d_o, final), stored, False)
    dk, _ = pass_of(adjoint, Arrays(v, d_o, q_wide, transposed(final)), stored, wide)
    d_decay = None
    if sums:
        change = jnp.sum(q_wide * dq - k_wide * dk, axis=-1)  # f32, as dq and dk are
        end = jnp.where(stored[:, None], jnp.sum(final * transposed(last), axis=(2, 3)), 0.0)
        d_decay = TokenDecay(token_decay_gradient(decay.g, change, end, requests, form.reverse))
    elif saved.learns_decay:
        of_decay = functools.partial(plain, Arrays(q, k, v, initial))
        (d_decay,) = jax.vjp(of_decay, decay)[1]((d_o, final))
    return (
        Arrays(
            over_group(dq, q), over_group(dk, k), dv,
            pool_gradient(d_pool, kept(requests.resumes, d_initial), requests, problem),
        ),
        None,
        d_decay,
    )  # fmt: skip


_call.defvjp(_forward, _backward, symbolic_zeros=True)


def requests_of(rows: Rows, arrays: Arrays, num_slots: int | None = None) -> Requests:
    """What each request reads, owns and writes."""
    slots = arrays.pool.shape[0] if num_slots is None else num_slots
    return reference.requests(
        rows.cu_seqlens, rows.slot_ids, rows.has_state, arrays.q.shape[0], slots
    )


def problem_of_pass(problem: Problem, form: Form, arrays: Arrays, wide: bool) -> Problem:
    """`problem` with other arrays, a state per request, and a form; `wide` if its output is f32."""
    return dataclasses.replace(
        problem,
        num_slots=arrays.pool.shape[0],
        qk_heads=arrays.q.shape[1],
        heads=arrays.v.shape[1],
        key_dim=arrays.q.shape[2],
        value_dim=arrays.v.shape[2],
        state_dtype=jnp.dtype(jnp.float32),
        form=form,
        out_dtype=jnp.dtype(jnp.float32) if wide else None,
    )


def kept(requests: jax.Array, states: jax.Array) -> jax.Array:
    """States [N, ...] in f32, zero where a request has none."""
    return jnp.where(requests[:, None, None, None], states.astype(jnp.float32), 0.0)


def over_group(dx: jax.Array, x: jax.Array) -> jax.Array:
    """[T, heads, key_dim] summed over the value heads that share a head of x, in its type."""
    if dx.shape != x.shape:
        dx = jnp.sum(dx.reshape(*x.shape[:2], -1, x.shape[2]), axis=2)
    return dx.astype(x.dtype)


def pool_gradient(
    d_pool: jax.Array | SymbolicZero, d_initial: jax.Array, requests: Requests, problem: Problem
) -> jax.Array:
    """Slots that a request wrote lose their cotangent; those it resumed from get its own."""
    shape = (problem.num_slots, *d_initial.shape[1:])
    if isinstance(d_pool, SymbolicZero):
        passed = jnp.zeros(shape, jnp.float32)
    else:
        passed = d_pool.astype(jnp.float32).at[requests.store].set(0.0, mode="drop")
    return passed.at[requests.load].add(d_initial).astype(problem.state_dtype)


def token_decay_gradient(
    g: jax.Array, change: jax.Array, end: jax.Array, requests: Requests, reverse: bool
) -> jax.Array:
    """Cotangent of log decays g [T, heads].

    Args:
      g: log decays of the call.
      change: [T, heads] f32, q . dq - k . dk.
      end: [N, heads] <dS, S> of the final state.
      requests: of the call.
      reverse: time runs from the last row to the first.
    """
    row = jnp.arange(change.shape[0])
    ends = requests.start + requests.length
    owner = jnp.minimum(jnp.searchsorted(ends, row, side="right"), ends.shape[0] - 1)
    inside = requests.live[owner] & (row >= requests.start[owner]) & (row < ends[owner])
    change = jnp.where(inside[:, None], change, 0.0)
    coming = row - requests.start[owner] if reverse else ends[owner] - 1 - row
    last = requests.start if reverse else ends - 1
    target = jnp.where(requests.live & (requests.length > 0), last, change.shape[0])
    change = change.at[target].add(end, mode="drop")
    found = sum_to_end(change.T, jnp.where(inside, coming, 0), reverse).T
    clipped = (g >= 0) | (g <= reference.MIN_LOG_DECAY)
    return jnp.where(clipped, 0.0, found)


def sum_to_end(x: jax.Array, coming: jax.Array, reverse: bool) -> jax.Array:
    """Sums of x [heads, T] over each row and the `coming` [T] rows behind it in time."""
    length, step = x.shape[1], 1
    while step < length:
        rest = jnp.zeros((x.shape[0], step), x.dtype)
        ahead = [rest, x[:, :-step]] if reverse else [x[:, step:], rest]
        x += jnp.where(coming >= step, jnp.concatenate(ahead, axis=1), 0.0)
        step *= 2
    return x
