"""The kernels of sgl-project/sglang-jax, by their names and arguments.

Signatures, layouts and meanings are those of commit cddbf6f1cc33cbdd453bd8f36ff7051cf46ca176.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import gla
from adapters.refusals import refuse, refuse_given
from tpukit import checks

__all__ = ["decode_simple_gla_fused", "simple_gla_fwd"]


def simple_gla_fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    g: jax.Array | None = None,
    g_gamma: jax.Array | None = None,
    scale: float | None = None,
    h0: jax.Array | None = None,
    use_ht: bool = False,
    cu_seqlens_cpu: jax.Array | None = None,
    cu_seqlens_dev: jax.Array | None = None,
    chunk_size: int = 64,
    mode: Any = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`kernels.simple_gla.simple_gla.simple_gla_fwd`, as `gla.gla`.

    Args:
      q, k: [1, tokens, heads, key_dim] bfloat16 or float32.
      v: [1, tokens, heads, value_dim].
      g: [1, tokens, heads] log decay of each token, which the stack's kernel refuses; or None.
      g_gamma: [heads] log decay of each head; or None.
      scale: of the output, key_dim ** -0.5 by default.
      h0: [requests, heads, key_dim, value_dim] initial states, or None for zeros.
      use_ht: whether to return the final states.
      cu_seqlens_cpu: None.
      cu_seqlens_dev: [requests + 1] int32 bounds of the requests' tokens.
      chunk_size, mode: ignored; chunks are chosen for the chip.

    Returns:
      o [1, tokens, heads, value_dim], 0 for tokens of no request, and the final states
      [requests, heads, key_dim, value_dim] float32, or None. States are copied in and out:
      `gla.gla` reads and writes them in the pool.

    Raises:
      ArgumentError, UnsupportedError: as `gla.gla`, and where neither or both of the decays are
        given, or the bounds are not.
    """
    del chunk_size, mode
    where = "simple_gla_fwd"
    refuse_given(where, "Use cu_seqlens_dev.", cu_seqlens_cpu=cu_seqlens_cpu)
    if cu_seqlens_dev is None:
        refuse(where, "cu_seqlens_dev", "is None", "bounds [requests + 1]", "Or use gla.gla_batch.")
    if (g is None) == (g_gamma is None):
        got = "is None, as g is" if g is None else "is given, as g is"
        refuse(where, "g_gamma", got, "one of both", "A decay is per head or per token.")
    dims = checks.Dims(where)
    dims.bind("q", q, "1 tokens heads key_dim")
    dims.bind("k", k, "1 tokens heads key_dim")
    dims.bind("v", v, "1 tokens heads value_dim")
    dims.bind("cu_seqlens_dev", cu_seqlens_dev, "requests+1")
    if g is not None:
        dims.bind("g", g, "1 tokens heads")
        decay = gla.TokenDecay(g[0].astype(jnp.float32))
    else:
        decay = gla.HeadDecay(jnp.asarray(g_gamma, jnp.float32))
    requests = dims["requests"]
    shape = (requests, dims["heads"], dims["key_dim"], dims["value_dim"])
    if h0 is not None:
        dims.bind("h0", h0, "requests heads key_dim value_dim")
    states = jnp.zeros(shape, jnp.float32) if h0 is None else h0.astype(jnp.float32)
    slots = jnp.arange(requests, dtype=jnp.int32)
    resumes = jnp.full(requests, h0 is not None)
    o, final = gla.gla(
        q[0], k[0], v[0], states, slots, cu_seqlens_dev, resumes, decay=decay, scale=scale
    )
    return o[None], final if use_ht else None


def decode_simple_gla_fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    recurrent_buffer: jax.Array,
    recurrent_indices: jax.Array,
    has_initial_state: jax.Array,
    *,
    g_gamma: jax.Array,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels.simple_gla.decode_simple_gla_fused`, as `gla.gla` of requests of one token.

    Args:
      q, k: [requests, heads, key_dim] bfloat16 or float32.
      v: [requests, heads, value_dim].
      recurrent_buffer: [slots, heads, key_dim, value_dim] float32 or bfloat16; donate it.
      recurrent_indices: [requests] int32 slots. Slot 0 is the stack's dummy: it is neither read nor
        written, and the output is 0, where the stack gives that of an empty state. So is an index
        outside the buffer, which the stack must not be given.
      has_initial_state: [requests] whether a request resumes from its slot.
      g_gamma: [heads] log decays.
      scale: of the output, key_dim ** -0.5 by default.

    Returns:
      o [requests, heads, value_dim] and the buffer.

    Raises:
      ArgumentError, UnsupportedError: as `gla.gla`.
    """
    dims = checks.Dims("decode_simple_gla_fused")
    dims.bind("q", q, "requests heads key_dim")
    dims.bind("k", k, "requests heads key_dim")
    dims.bind("recurrent_indices", recurrent_indices, "requests")
    dims.bind("has_initial_state", has_initial_state, "requests")
    slots = jnp.where(recurrent_indices == 0, -1, recurrent_indices)
    bounds = jnp.arange(dims["requests"] + 1, dtype=jnp.int32)
    decay = gla.HeadDecay(jnp.asarray(g_gamma, jnp.float32))
    return gla.gla(
        q, k, v, recurrent_buffer, slots, bounds, has_initial_state.astype(bool), decay=decay,
        scale=scale,
    )  # fmt: skip
