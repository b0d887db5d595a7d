"""Sequences spread over devices: a piece of every sequence on each.

A piece of a sequence turns the state before it into e^(b) S + D, with b the sum of its log decays
and D the state it reaches from zero. Those two are all that devices tell each other. D is one
product of decayed keys with values; the kernel then runs once, from the right state. Running it
from zero and adding what the earlier pieces contribute would read q and o, write o and round it
once more.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gla.api import gla_batch
from reference.gla import Decay, HeadDecay, TokenDecay, clip_log_decay
from tpukit import checks
from tpukit.errors import ArgumentError
from tpukit.manual import vary_together

WHERE = "context_parallel_gla"


def context_parallel_gla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    decay: Decay,
    initial_state: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """`gla_batch` of sequences whose time is spread over a mesh axis, inside `jax.shard_map`.

    Device d of the axis holds the d-th of equally long, consecutive pieces of every sequence. One
    all-gather of a state and a decay per sequence and head; differentiable as `gla_batch` is.

    Args:
      q, k: [batch, time, qk_heads, key_dim], this device's piece.
      v: [batch, time, heads, value_dim], this device's piece.
      axis_name: the mesh axis.
      decay: `HeadDecay(g [heads])`, the same on all devices, or this device's piece
        `TokenDecay(g [batch, time, heads])`.
      initial_state: [batch, heads, key_dim, value_dim] before the first piece, the same on all
        devices, zero by default.
      **options: scale, batch_invariant, implementation and plan, as `gla_batch`.

    Returns:
      o [batch, time, heads, value_dim], this device's piece, and the state after the last piece
      [batch, heads, key_dim, value_dim], the same on all devices, in the dtype of the initial
      state, float32 by default.

    Raises:
      ArgumentError, UnsupportedError: as `gla_batch`.
    """
    checks.check_choice(WHERE, "reverse", options.pop("reverse", False), (False,))
    check(k, v, decay, initial_state)
    mine = vary_together(piece(k, v, decay))
    wholes, states = lax.all_gather(mine, axis_name, to="invarying")
    if initial_state is not None:
        first = initial_state.astype(jnp.float32)
        wholes = jnp.concatenate([jnp.zeros_like(wholes[:1]), wholes])
        states = jnp.concatenate([first[None], states])
    index = lax.axis_index(axis_name) + len(states) - lax.axis_size(axis_name)
    before = after_pieces(wholes, states, index)
    dtype = jnp.float32 if initial_state is None else initial_state.dtype
    o, _ = gla_batch(q, k, v, decay=decay, initial_state=before, **options)
    return o, after_pieces(wholes, states, len(states)).astype(dtype)


def check(k: Any, v: Any, decay: Any, initial_state: Any) -> None:
    """Checks what is used before `gla_batch` checks the rest.

    Raises:
      ArgumentError: a shape or type is wrong.
    """
    dims = checks.Dims(WHERE)
    dims.bind("k", k, "batch time qk_heads key_dim")
    dims.bind("v", v, "batch time heads value_dim")
    checks.check_multiple(
        WHERE, "heads of v", dims["heads"], dims["qk_heads"], "Every query/key head needs as many."
    )
    if not isinstance(decay, HeadDecay | TokenDecay):
        raise ArgumentError(
            where=WHERE,
            argument="decay",
            got=f"is a {type(decay).__name__}",
            expected="HeadDecay(g) or TokenDecay(g)",
        )
    per_token = isinstance(decay, TokenDecay)
    dims.bind("decay.g", decay.g, "batch time heads" if per_token else "heads")
    if initial_state is not None:
        dims.bind("initial_state", initial_state, "batch heads key_dim value_dim")


def piece(k: jax.Array, v: jax.Array, decay: Decay) -> tuple[jax.Array, jax.Array]:
    """Sum of a piece's log decays [batch, heads] and the state it reaches from zero, both f32."""
    time, heads = v.shape[1:3]
    g = clip_log_decay(decay.g)
    if isinstance(decay, TokenDecay):
        # Summed from the end, so that what counts is small.
        later = lax.cumsum(g, axis=1, reverse=True) - g
        whole = jnp.sum(g, axis=1)
    else:
        later = g * (time - 1 - jnp.arange(time, dtype=jnp.float32))[None, :, None]
        whole = jnp.broadcast_to(g * time, (k.shape[0], heads))
    k = jnp.repeat(k, heads // k.shape[2], axis=2) if heads != k.shape[2] else k
    decayed = (k * jnp.exp(later)[..., None]).astype(k.dtype)
    precision = lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
    product = jnp.einsum(
        "bthk,bthv->bhkv", decayed, v, precision=precision, preferred_element_type=jnp.float32
    )
    return whole, product


def after_pieces(wholes: jax.Array, states: jax.Array, count: jax.Array | int) -> jax.Array:
    """The state after the first `count` pieces [P, ...], [batch, heads, key_dim, value_dim]."""
    index = jnp.arange(len(states))
    inside = (index < count)[:, None, None]
    next_whole = jnp.concatenate([wholes[1:], jnp.zeros_like(wholes[:1])])
    followed = (index + 1 < count)[:, None, None]
    later = lax.cumsum(jnp.where(followed, next_whole, 0.0), axis=0, reverse=True)
    found = jnp.exp(later)[..., None, None] * states
    return jnp.sum(jnp.where(inside[..., None, None], found, 0.0), axis=0)
