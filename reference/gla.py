"""Gated linear attention, specified: the token recurrence and its chunked form.

Per head, with state S [key_dim, value_dim] and decay a_t = e^(g_t):

    S_t = a_t S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

With a strength beta_t the delta rule writes what the key does not recall yet:

    S_t = a_t S_{t-1} + beta_t k_t^T (v_t - k_t (a_t S_{t-1}))

A batch is ragged: request n owns rows [cu_seqlens[n], cu_seqlens[n+1]) of q, k, v and slot
slot_ids[n] of a pool of states. `recurrent` is the definition. `chunked` is the same function,
rearranged into matrix products: fast and differentiable.

Sources: Lightning Attention-2 (arXiv 2401.04658), Gated Linear Attention (arXiv 2312.06635),
Mamba-2 (arXiv 2405.21060), Gated DeltaNet (arXiv 2412.06464), Kimi Linear (arXiv 2510.26692).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from reference.gla_chunk import delta_inverse, pairs, read, until_last

# e^-30 forgets everything in f32; sums of lower values would lose their digits
MIN_LOG_DECAY = -30.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadDecay:
    """One decay per head, the same for every token (Lightning attention, RetNet).

    Attributes:
      g: [heads] log decay per token, <= 0; the state is multiplied by e^g at every token.
    """

    g: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenDecay:
    """One decay per token and head (simple GLA, Mamba-2).

    Attributes:
      g: [tokens, heads] log decay, <= 0; in the batch form [batch, tokens, heads].
    """

    g: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChannelDecay:
    """One decay per token, head and key channel (GLA, KDA).

    Attributes:
      g: [tokens, heads, key_dim] log decay, <= 0, of the rows of the state; in the batch form
        [batch, tokens, heads, key_dim].
    """

    g: jax.Array


Decay = HeadDecay | TokenDecay | ChannelDecay


def clip_log_decay(g: jax.Array) -> jax.Array:
    """Log decays as they are used: within [MIN_LOG_DECAY, 0], so that no state can grow.

    The gradient is 1 between the bounds, and 0 on them and outside.
    """
    return lax.clamp(jnp.asarray(MIN_LOG_DECAY, g.dtype), g, jnp.zeros((), g.dtype))


class Requests(NamedTuple):
    """What each request reads, owns and writes; [N] each."""

    start: jax.Array  # first row
    length: jax.Array  # rows
    live: jax.Array  # has a slot of the pool
    load: jax.Array  # slot to read, where `resumes`
    resumes: jax.Array  # starts from its slot, else from zero
    store: jax.Array  # slot to write, or one past the pool


def requests(
    cu_seqlens: jax.Array,
    slot_ids: jax.Array,
    has_state: jax.Array,
    num_tokens: int,
    num_slots: int,
) -> Requests:
    """Applies the rules for unusual values: see `recurrent`."""
    bounds = lax.cummax(jnp.clip(cu_seqlens, 0, num_tokens))
    length = bounds[1:] - bounds[:-1]
    live = (slot_ids >= 0) & (slot_ids < num_slots)
    writes = live & (length > 0)
    index = jnp.arange(slot_ids.shape[0])
    shared = (slot_ids[None, :] == slot_ids[:, None]) & writes[None, :]
    superseded = jnp.any(shared & (index[None, :] > index[:, None]), axis=1)
    return Requests(
        start=bounds[:-1],
        length=length,
        live=live,
        load=jnp.clip(slot_ids, 0, max(num_slots - 1, 0)),
        resumes=live & has_state.astype(bool),
        store=jnp.where(writes & ~superseded, slot_ids, num_slots),
    )


def initial_states(state_pool: jax.Array, plan: Requests, dtype: DTypeLike) -> jax.Array:
    """[N, heads, key_dim, value_dim] state of each request before its first token."""
    states = state_pool.astype(dtype)[plan.load]
    return jnp.where(plan.resumes[:, None, None, None], states, 0)


def token_decays(decay: Decay, num_tokens: int, dtype: DTypeLike) -> jax.Array:
    """[tokens, heads, 1 or key_dim] clipped log decay of every token."""
    g = clip_log_decay(decay.g.astype(dtype))
    if isinstance(decay, HeadDecay):
        g = jnp.broadcast_to(g, (num_tokens, g.shape[0]))
    return g if isinstance(decay, ChannelDecay) else g[..., None]


def recurrent(
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
    reverse: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """The definition, token by token.

    Args:
      q, k: [tokens, qk_heads, key_dim]; value head h uses query/key head h * qk_heads // heads.
      v: [tokens, heads, value_dim].
      state_pool: [slots, heads, key_dim, value_dim].
      slot_ids: [N] slot of each request; outside [0, slots) the request is skipped, its output 0.
      cu_seqlens: [N + 1] row bounds, made monotone and clipped to [0, tokens]. Output rows that
        belong to no request are 0. A request without rows leaves its slot alone.
      has_state: [N] whether the request resumes from its slot, or starts from a zero state.
      decay: log decays, clipped to [MIN_LOG_DECAY, 0].
      beta: [tokens, heads] strengths of the delta rule; None for plain gated linear attention.
      scale: of the output, key_dim ** -0.5 by default.
      reverse: time runs from a request's last row to its first, S_t = a_t S_{t+1} + k_t^T v_t; the
        final state is that of the first row.
      dtype: of the arithmetic.

    Returns:
      o [tokens, heads, value_dim] and the new pool. Where requests share a slot, all start from the
      state before the call and the last one's state is kept.
    """
    num_tokens, heads = v.shape[:2]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    reqs = requests(cu_seqlens, slot_ids, has_state, num_tokens, state_pool.shape[0])
    group = heads // q.shape[1]
    q, k = (jnp.repeat(x.astype(dtype), group, axis=1) for x in (q, k))
    g = token_decays(decay, num_tokens, dtype)
    row = jnp.arange(num_tokens)[:, None]
    owns = (row >= reqs.start) & (row < reqs.start + reqs.length) & reqs.live  # [tokens, N]
    owner, owned = jnp.argmax(owns, axis=1), jnp.any(owns, axis=1)

    def step(states: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_t, k_t, v_t, g_t, beta_t, n, live = token
        state = jnp.exp(g_t)[..., None] * states[n]
        if beta_t is not None:
            recalled = jnp.einsum("hk,hkv->hv", k_t, state, precision=lax.Precision.HIGHEST)
            v_t = beta_t[:, None] * (v_t - recalled)
        state += k_t[:, :, None] * v_t[:, None, :]
        o_t = factor * jnp.einsum("hk,hkv->hv", q_t, state, precision=lax.Precision.HIGHEST)
        return states.at[n].set(jnp.where(live, state, states[n])), jnp.where(live, o_t, 0)

    states = initial_states(state_pool, reqs, dtype)
    if slot_ids.shape[0] and num_tokens:
        strength = None if beta is None else beta.astype(dtype)
        tokens: Any = (q, k, v.astype(dtype), g, strength, owner, owned)
        states, o = lax.scan(step, states, tokens, reverse=reverse)
    else:
        o = jnp.zeros(v.shape, dtype)
    pool = state_pool.at[reqs.store].set(states.astype(state_pool.dtype), mode="drop")
    return o.astype(v.dtype), pool


def chunked(
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
    reverse: bool = False,
    chunk: int = 64,
    operands: DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """`recurrent`, by chunks of at most `chunk` tokens of one request.

    With b_i the sum of a chunk's log decays up to and including token i, and S the state before it:

        o_i = scale * ( sum_{j <= i} e^(b_i - b_j) (q_i . k_j) v_j  +  e^(b_i) q_i S )
        S'  = e^(b_last) S  +  sum_j e^(b_last - b_j) k_j v_j

    The delta rule puts u for v, which solves, with A_ij = e^(b_i - b_j) (k_i . k_j) for j < i,

        u_i + beta_i sum_j A_ij u_j = beta_i (v_i - e^(b_i) k_i S)

    Args:
      chunk: tokens per chunk; a power of two if decays are per channel.
      operands: type to which the operands of every matrix product are rounded; sums are f32.

    Other arguments and returns as in `recurrent`.
    """
    num_tokens, heads = v.shape[:2]
    num_requests = slot_ids.shape[0]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if not num_tokens or not num_requests:
        return jnp.zeros_like(v), state_pool
    reqs = requests(cu_seqlens, slot_ids, has_state, num_tokens, state_pool.shape[0])

    # Chunk c is piece[c] of request owner[c]; its tokens are rows[c], where inside[c].
    pieces = -(-jnp.where(reqs.live, reqs.length, 0) // chunk)
    ends = jnp.cumsum(pieces)
    index = jnp.arange(num_tokens // chunk + num_requests)
    owner = jnp.minimum(jnp.searchsorted(ends, index, side="right"), num_requests - 1)
    offset = (index - (ends - pieces)[owner])[:, None] * chunk + jnp.arange(chunk)
    inside = (offset < reqs.length[owner][:, None]) & (index < ends[-1])[:, None]
    offset = reqs.length[owner][:, None] - 1 - offset if reverse else offset
    rows = jnp.where(inside, reqs.start[owner][:, None] + offset, num_tokens)

    def gather(x: jax.Array) -> jax.Array:  # [tokens, h, ...] -> [chunks, h, chunk, ...], f32
        taken = x.astype(jnp.float32).at[rows].get(mode="fill", fill_value=0)
        return jnp.moveaxis(taken, 1, 2)

    bits = jnp.finfo(operands)

    def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        # under jit XLA drops conversions there and back
        a, b = (lax.reduce_precision(x, int(bits.nexp), int(bits.nmant)) for x in (a, b))
        return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)

    group = heads // q.shape[1]
    q, k = (jnp.repeat(gather(x), group, axis=1) for x in (q, k))
    v_in = gather(v)
    g = gather(token_decays(decay, num_tokens, jnp.float32))  # [c, h, i, 1 or key_dim]
    b = jnp.cumsum(g, axis=2)
    decayed = k * until_last(g)
    update, delta = None, None
    if beta is None:
        update = product("chjk,chjv->chkv", decayed, v_in)
    else:
        strength = gather(beta)[..., None]
        delta = (k, b, v_in, strength, delta_inverse(k, g, strength, product), decayed)

    starts = initial_states(state_pool, reqs, jnp.float32)
    opens = index == (ends - pieces)[owner]

    def step(state: jax.Array, c: Any) -> tuple[jax.Array, Any]:
        opens_c, owner_c, whole, update_c, delta_c = c
        before = jnp.where(opens_c, starts[owner_c], state)
        u = None
        if delta_c is not None:
            k_c, b_c, v_c, strength_c, inverse_c, decayed_c = delta_c
            missing = strength_c * (v_c - read(k_c, b_c, before, product))
            u = product("hij,hjv->hiv", inverse_c, missing)
            update_c = product("hjk,hjv->hkv", decayed_c, u)
        after = jnp.exp(whole)[..., None] * before + update_c
        return after, (before, after, u)

    chunks: Any = (opens, owner, b[:, :, -1], update, delta)
    _, (before, after, u) = lax.scan(step, jnp.zeros_like(starts[0]), chunks)
    o = product("chij,chjv->chiv", pairs(q, k, g, product), v_in if u is None else u)
    o = factor * (o + read(q, b, before, product))
    o = jnp.zeros(v.shape, jnp.float32).at[rows].set(jnp.moveaxis(o, 2, 1), mode="drop")
    final = after[jnp.maximum(ends - 1, 0)]
    pool = state_pool.at[reqs.store].set(final.astype(state_pool.dtype), mode="drop")
    return o.astype(v.dtype), pool
