"""Short causal convolution over a ragged batch, as delta-rule layers put before their attention.

    y_t = act( sum_i weight[i] x_{t - (K - 1) + i} )        per channel, K = kernel size

Plain JAX, in front of the kernel and not in it: a token that decodes needs K - 1 rows from a pool
of its own, which no transfer of whole groups of rows moves, and a window of the kernel would have
to know the rows before it. As it is, XLA passes over the rows and touches K - 1 rows per request.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from reference.gla import requests
from tpukit import checks

Activation = Literal["silu", "none"]


def short_conv(
    x: jax.Array,
    weight: jax.Array,
    conv_pool: jax.Array,
    slot_ids: jax.Array,
    cu_seqlens: jax.Array,
    has_state: jax.Array,
    *,
    activation: Activation = "silu",
) -> tuple[jax.Array, jax.Array]:
    """Convolves every channel of every request with its last inputs.

    Args:
      x: [tokens, channels] float32 or bfloat16.
      weight: [kernel_size, channels] float32, the newest input's last; kernel_size is at least 2.
      conv_pool: [slots, kernel_size - 1, channels] in the type of x: the last inputs of each
        request, oldest first, zero before the first.
      slot_ids, cu_seqlens, has_state: as in `gla.gla`, and what they say of unusual values holds.
      activation: of the output.

    Returns:
      y [tokens, channels] in the type of x, summed in float32, and the new pool. Differentiable in
      x, weight and conv_pool.

    Raises:
      ArgumentError: an argument that can never work.

    Source: the short convolution of Mamba (arXiv 2312.00752) and Kimi Delta Attention (2510.26692).
    """
    check(x, weight, conv_pool, slot_ids, cu_seqlens, has_state, activation)
    tokens, before = x.shape[0], weight.shape[0] - 1
    count = slot_ids.shape[0]
    if not tokens or not count or not conv_pool.shape[0]:
        return jnp.zeros_like(x), conv_pool
    reqs = requests(cu_seqlens, slot_ids, has_state, tokens, conv_pool.shape[0])
    row = jnp.arange(tokens)
    owner = jnp.clip(jnp.searchsorted(reqs.start + reqs.length, row, side="right"), 0, count - 1)
    offset = row - reqs.start[owner]
    owned = (offset >= 0) & (offset < reqs.length[owner]) & reqs.live[owner]

    wide = x.astype(jnp.float32)
    y = wide * weight[before]
    for ago in range(1, before + 1):
        earlier = jnp.pad(wide, ((ago, 0), (0, 0)))[:tokens]
        y += jnp.where((offset >= ago)[:, None], earlier, 0.0) * weight[before - ago]

    resumes = reqs.resumes[:, None, None]
    state = jnp.where(resumes, conv_pool.astype(jnp.float32)[reqs.load], 0.0)  # [N, before, C]
    place = jnp.arange(before)
    for m in range(before):  # the row m of a request sees `before - m` inputs of the state
        old = jnp.einsum("nic,ic->nc", state[:, m:], weight[: before - m], precision="highest")
        inside = m < reqs.length
        y = y.at[jnp.where(inside, reqs.start + m, tokens)].add(old, mode="drop")
    y = jax.nn.silu(y) if activation == "silu" else y
    y = jnp.where(owned[:, None], y, 0.0).astype(x.dtype)

    taken = reqs.length[:, None] - before + place  # of the request's inputs, below 0 of the state's
    new = x[jnp.clip(reqs.start[:, None] + taken, 0, tokens - 1)]
    kept = jnp.take_along_axis(state, jnp.clip(taken + before, 0, before - 1)[..., None], axis=1)
    after = jnp.where((taken >= 0)[..., None], new, kept.astype(x.dtype))
    return y, conv_pool.at[reqs.store].set(after, mode="drop")


def check(
    x: jax.Array,
    weight: jax.Array,
    conv_pool: jax.Array,
    slot_ids: jax.Array,
    cu_seqlens: jax.Array,
    has_state: jax.Array,
    activation: str,
) -> None:
    """Raises `ArgumentError` for shapes and types that cannot work."""
    where = "short_conv"
    dims = checks.Dims(where)
    dims.bind("x", x, "tokens channels")
    dims.bind("conv_pool", conv_pool, "slots inputs channels")
    dims.bind("weight", weight, "inputs+1 channels")
    dims.bind("slot_ids", slot_ids, "requests")
    dims.bind("cu_seqlens", cu_seqlens, "requests+1")
    dims.bind("has_state", has_state, "requests")
    checks.check_range(where, "kernel_size", weight.shape[0], low=2)
    checks.check_dtype(where, "x", x, (jnp.bfloat16, jnp.float32))
    checks.check_dtype(where, "weight", weight, (jnp.float32,))
    checks.check_dtype(where, "conv_pool", conv_pool, (x.dtype,))
    checks.check_dtype(where, "slot_ids", slot_ids, (jnp.int32,))
    checks.check_dtype(where, "cu_seqlens", cu_seqlens, (jnp.int32,))
    checks.check_dtype(where, "has_state", has_state, (jnp.bool_,))
    checks.check_choice(where, "activation", activation, get_args(Activation))
