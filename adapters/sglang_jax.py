"""The kernels of sgl-project/sglang-jax, by their names and arguments.

Signatures, layouts and meanings are those of commit cddbf6f1cc33cbdd453bd8f36ff7051cf46ca176.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import fused_moe
import gla
from adapters import experts, paged
from adapters.paged import new_kv_cache, new_mla_cache
from adapters.refusals import refuse, refuse_given, refuse_modes
from ragged_attention import KVCache
from reference.fused_moe import Activation
from tpukit import checks

__all__ = [
    "decode_simple_gla_fused",
    "fused_ep_moe_v2",
    "mla_ragged_paged_attention",
    "new_kv_cache",
    "new_mla_cache",
    "ragged_paged_attention",
    "simple_gla_fwd",
]

_MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)  # the stack's default; ignored


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


def ragged_paged_attention(  # noqa: PLR0913  (the stack's)
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_cache_fused: KVCache | jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    cu_kv_lens: jax.Array,
    distribution: jax.Array,
    custom_mask: jax.Array | None,
    attention_sink: jax.Array | float | None = None,
    *,
    causal: int = 1,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = _MASK_VALUE,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    xai_temperature_len: float | None = None,
    softmax_dtype: Any = None,
    chunk_prefill_size: int | None = None,
    d_block_sizes: tuple[int, int, int, int] | None = None,
    p_block_sizes: tuple[int, int, int, int] | None = None,
    m_block_sizes: tuple[int, int, int, int] | None = None,
    vmem_limit_bytes: int | None = None,
    out_dtype: Any = None,
    skip_kv_mask: bool = False,
    disable_semaphore_checks: bool = True,
    debug_mode: bool = False,
    mask_aligned_to_cu_kv: bool = False,
) -> tuple[jax.Array, Any]:
    """`kernels.ragged_paged_attention.ragged_paged_attention_v3`, as `ragged_attention`'s.

    Args:
      queries: [tokens, q_heads, dim].
      keys, values: [tokens, kv_heads, dim] in the cache's type, divided by their scales.
      kv_cache_fused: of `new_kv_cache`, or the stack's [pages, page_size, 2 * kv_heads / packing,
        packing, dim up to 128s], keys and values of a head side by side, which is converted, see
        `adapters.paged`. Donate it.
      kv_lens, cu_q_lens, distribution, page_indices, cu_kv_lens: see `paged.Requests`.
      custom_mask: flat mask of drafts, int32 or bool, 1 where a key is seen: a row of kv_len keys
        for each query token. Read where causal is 0. Keys before the query tokens have to be seen,
        later query tokens not; of more than 64 query tokens, all earlier ones. A token whose row is
        something else gets NaN.
      attention_sink: [q_heads], or one number.
      causal: 1: causal; 0: as custom_mask says, or everything where there is none.
      sm_scale, sliding_window, soft_cap, out_dtype: as there.
      q_scale: queries are divided by it, rounded to the cache's type and multiplied by it.
      k_scale, v_scale: of what the cache holds.
      xai_temperature_len: a whole number: logits of a query at a later position p are multiplied by
        log(p) / log(xai_temperature_len), before the soft cap, as in the stack's kernel.
      mask_aligned_to_cu_kv: rows of the mask are as long as cu_kv_lens says.
      mask_value, softmax_dtype, chunk_prefill_size, d_block_sizes, p_block_sizes, m_block_sizes,
        vmem_limit_bytes, skip_kv_mask, disable_semaphore_checks: ignored; the softmax is float32.
      debug_mode: False.

    Returns:
      [tokens, q_heads, dim], 0 for tokens of no request and queries that see nothing, and the
      cache, of the kind that was given.

    Raises:
      ArgumentError, UnsupportedError: as there.
    """
    where = "ragged_paged_attention"
    del mask_value, softmax_dtype, chunk_prefill_size, d_block_sizes, p_block_sizes, m_block_sizes
    del vmem_limit_bytes, disable_semaphore_checks
    refuse_modes(where, debug_mode, skip_kv_mask=skip_kv_mask, causal=bool(causal))
    checks.check_choice(where, "causal", causal, (0, 1))
    if xai_temperature_len is not None:
        if xai_temperature_len != int(xai_temperature_len):
            refuse(where, "xai_temperature_len", f"is {xai_temperature_len}", "a whole number")
        xai_temperature_len = int(xai_temperature_len)
    requests = paged.Requests(kv_lens, cu_q_lens, page_indices, distribution, cu_kv_lens)
    words = drafts = None
    if custom_mask is not None and not causal:
        widths = cu_kv_lens[1:] - cu_kv_lens[:-1] if mask_aligned_to_cu_kv else kv_lens
        words, drafts = paged.ancestors_of(custom_mask, requests, widths, queries.shape[0])
    out, cache = paged.attend(
        where,
        queries,
        keys,
        values,
        kv_cache_fused,
        requests,
        causal=bool(causal) or words is not None,
        ancestors=words,
        window=sliding_window,
        sinks=attention_sink,
        soft_cap=soft_cap,
        sm_scale=sm_scale,
        temperature_len=xai_temperature_len,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        out_dtype=out_dtype,
    )
    return out if drafts is None else jnp.where(drafts[:, None, None], out, jnp.nan), cache


def mla_ragged_paged_attention(  # noqa: PLR0913  (the stack's)
    ql_nope: jax.Array,
    q_pe: jax.Array,
    new_kv_c: jax.Array,
    new_k_pe: jax.Array,
    cache_kv: KVCache | jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    cu_kv_lens: jax.Array,
    distribution: jax.Array,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = _MASK_VALUE,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    chunk_prefill_size: int | None = None,
    num_kv_pages_per_block: tuple[int, int, int] | int | None = None,
    num_queries_per_block: tuple[int, int, int] | int | None = None,
    vmem_limit_bytes: int | None = None,
    decode_batch_size: int = 1,
    debug_mode: bool = False,
) -> tuple[jax.Array, Any]:
    """`kernels.mla.v2.kernel`, as `ragged_attention.mla_ragged_paged_attention`.

    Args:
      ql_nope: [tokens, heads, rank].
      q_pe: [tokens, heads, rope_dim].
      new_kv_c, new_k_pe: [tokens, rank] and [tokens, rope_dim] in the cache's type, divided by
        their scale.
      cache_kv: of `new_mla_cache`, or the stack's [pages, page_size / packing, packing, 640], which
        is converted, see `adapters.paged`. Donate it.
      kv_lens, cu_q_lens, distribution, page_indices, cu_kv_lens: see `paged.Requests`.
      sm_scale, sliding_window, soft_cap: as there.
      q_scale, k_scale: logits are multiplied by both.
      v_scale: the result is multiplied by it.
      mask_value, chunk_prefill_size, num_kv_pages_per_block, num_queries_per_block,
        vmem_limit_bytes, decode_batch_size: ignored.
      debug_mode: False.

    Returns:
      [tokens, heads, rank] in the dtype of ql_nope, and the cache, of the kind that was given.

    Raises:
      ArgumentError, UnsupportedError: as there.
    """
    where = "mla_ragged_paged_attention"
    del mask_value, chunk_prefill_size, num_kv_pages_per_block, num_queries_per_block
    del vmem_limit_bytes, decode_batch_size
    refuse_modes(where, debug_mode)
    dims = checks.Dims(where)
    dims.bind("ql_nope", ql_nope, "tokens heads rank")
    dims.bind("q_pe", q_pe, "tokens heads rope_dim")
    return paged.attend_latent(
        where,
        ql_nope,
        q_pe,
        new_kv_c,
        new_k_pe,
        cache_kv,
        paged.Requests(kv_lens, cu_q_lens, page_indices, distribution, cu_kv_lens),
        sm_scale=sm_scale,
        window=sliding_window,
        soft_cap=soft_cap,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def fused_ep_moe_v2(  # noqa: PLR0913  (the stack's)
    mesh: Mesh,
    tokens: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    w3: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    top_k: int,
    *,
    act_fn: Activation = "silu",
    swiglu_limit: float | None = None,
    shared_swiglu_limit: float | None = None,
    enable_bt_scatter_overlap: bool = True,
    w1_shared: jax.Array | None = None,
    w2_shared: jax.Array | None = None,
    w3_shared: jax.Array | None = None,
    w1_shared_scale: jax.Array | None = None,
    w2_shared_scale: jax.Array | None = None,
    w3_shared_scale: jax.Array | None = None,
    quant_block_k: int | None = None,
    w1_scale: jax.Array | None = None,
    w2_scale: jax.Array | None = None,
    w3_scale: jax.Array | None = None,
    block_config: Any = None,
    direct_scaled_dot: bool = False,
    cross_expert_prefetch_mode: str = "full",
    interleave_bt: bool = True,
    enable_act_quant: bool = False,
    kernel_ablation_mode: str = "full",
    dp_axis_name: str = "data",
    tp_axis_name: str = "tensor",
) -> jax.Array:
    """`kernels.fused_moe.v2.kernel`, as `fused_moe.fused_moe`, from outside `shard_map`.

    Args:
      mesh: its axes dp_axis_name and tp_axis_name together split tokens and experts.
      tokens: [T, hidden] bfloat16, any number of them.
      w1, w3: [E, hidden, inter] gate and up projections.
      w2: [E, inter, hidden] down projections.
      topk_weights, topk_ids: [T, top_k]; an id outside [0, E), such as -1, is skipped.
      top_k: as topk_ids has columns.
      act_fn: "silu", "gelu" or "swigluoai", which clips at 7.
      swiglu_limit, shared_swiglu_limit: None, but ignored, as there, for "swigluoai".
      w1_shared, w3_shared, w2_shared: those of the shared expert, without E, or None.
      w1_shared_scale, w3_shared_scale, w2_shared_scale: [1, outputs], or None.
      quant_block_k: inputs that share a scale; all of them by default.
      w1_scale, w3_scale: [E, hidden / quant_block_k, 1, inter], or None.
      w2_scale: [E, inter / quant_block_k, 1, hidden], or None.
      enable_act_quant: float8 tokens, quantised again between the two products, where the stack
        keeps bfloat16.
      enable_bt_scatter_overlap, block_config, direct_scaled_dot, cross_expert_prefetch_mode,
        interleave_bt: ignored.
      kernel_ablation_mode: "full".
      dp_axis_name, tp_axis_name: axes of the mesh.

    Returns:
      [T, hidden] bfloat16.

    Raises:
      ArgumentError, UnsupportedError: as `fused_moe.fused_moe`.
    """
    where = "fused_ep_moe_v2"
    del enable_bt_scatter_overlap, block_config, direct_scaled_dot, cross_expert_prefetch_mode
    del interleave_bt
    checks.check_choice(where, "kernel_ablation_mode", kernel_ablation_mode, ("full",))
    checks.check_array(where, "topk_ids", topk_ids)
    if topk_ids.shape[1:] != (top_k,):
        refuse(where, "top_k", f"is {top_k}", f"the columns of topk_ids {tuple(topk_ids.shape)}")
    routed = experts.Projections(w1, w3, w2, w1_scale, w3_scale, w2_scale)
    weights = experts.routed_weights(where, routed, quant_block_k)
    if w1_shared is not None:
        scales = w1_shared_scale, w3_shared_scale, w2_shared_scale
        shared = experts.Projections(w1_shared, w3_shared, w2_shared, *scales)
        weights = dataclasses.replace(weights, shared=experts.shared_weights(where, shared))
    else:
        shared_swiglu_limit = None
    limits = {"swiglu_limit": swiglu_limit, "shared_swiglu_limit": shared_swiglu_limit}
    return fused_moe.fused_moe(
        tokens,
        weights,
        topk_ids,
        topk_weights.astype(jnp.float32),
        mesh=mesh,
        axis_name=(dp_axis_name, tp_axis_name),
        activation=act_fn,
        limit=experts.limit_of(where, act_fn, **limits),
        activation_dtype="float8_e4m3fn" if enable_act_quant else None,
    )
