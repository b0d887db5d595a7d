"""The kernels of vllm-project/tpu-inference, by their names and arguments.

Signatures, layouts and meanings are those of commit b8692ff01fa191343836996c27a39dc95f008b88.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import gather_reduce
from adapters import paged
from adapters.paged import new_kv_cache, new_mla_cache
from adapters.refusals import refuse, refuse_modes
from ragged_attention import KVCache
from tpukit import checks

__all__ = [
    "dense_gather_reduce",
    "mla_ragged_paged_attention",
    "new_kv_cache",
    "new_mla_cache",
    "ragged_gather_reduce",
    "ragged_paged_attention",
]


def dense_gather_reduce(
    x: jax.Array,
    indices: jax.Array,
    topk_weights: jax.Array,
    reduce_group_size: int,
    topk_wgt_zero_nan: bool = False,
) -> jax.Array:
    """`kernels.sparse_core.dense_gather_reduce`, as `gather_reduce.dense_gather_reduce`.

    Args:
      x: [rows, hidden_size] bfloat16 or float32.
      indices: [tokens * reduce_group_size] int32; one outside [0, rows) chooses no row.
      topk_weights: [tokens, reduce_group_size], or flat.
      reduce_group_size: rows of a token.
      topk_wgt_zero_nan: ignored: a weight of 0 always chooses no row, so that what the row holds,
        NaN included, does not matter. False means NaN there for such rows in the stack.

    Returns:
      [tokens, hidden_size] in the dtype of x.

    Raises:
      ArgumentError, UnsupportedError: as `gather_reduce.dense_gather_reduce`.
    """
    del topk_wgt_zero_nan
    grouped = _grouped("dense_gather_reduce", reduce_group_size, indices, topk_weights=topk_weights)
    return gather_reduce.dense_gather_reduce(x, *grouped)


def ragged_gather_reduce(
    x: jax.Array,
    indices: jax.Array,
    topk_weights: jax.Array,
    valid_rows_mask: jax.Array,
    reduce_group_size: int,
) -> jax.Array:
    """`kernels.sparse_core.ragged_gather_reduce_v2`, as `gather_reduce.ragged_gather_reduce`.

    Args:
      x: [rows, hidden_size] bfloat16 or float32.
      indices: [tokens * reduce_group_size] int32.
      topk_weights: [tokens * reduce_group_size].
      valid_rows_mask: [tokens * reduce_group_size] bool; other rows are never read.
      reduce_group_size: rows of a token.

    Returns:
      [tokens, hidden_size] in the dtype of x, as the stack's kernel has it; what the stack does
      where its kernel is not used is bfloat16 always.

    Raises:
      ArgumentError, UnsupportedError: as `gather_reduce.ragged_gather_reduce`.
    """
    grouped = _grouped(
        "ragged_gather_reduce",
        reduce_group_size,
        indices,
        topk_weights=topk_weights,
        valid_rows_mask=valid_rows_mask,
    )
    return gather_reduce.ragged_gather_reduce(x, *grouped)


def _grouped(
    where: str, group: int, indices: jax.Array, **others: jax.Array
) -> tuple[jax.Array, ...]:
    """Arrays of one element per row as [tokens, group]."""
    checks.check_type(where, "reduce_group_size", group, int)
    checks.check_range(where, "reduce_group_size", group, low=1)
    for name, array in {"indices": indices, **others}.items():
        checks.check_array(where, name, array)
        if array.size != indices.size:
            refuse(where, name, f"has {array.size} elements", f"{indices.size}, one per index")
    checks.check_multiple(where, "indices", indices.size, group, "Every token has as many.")
    return tuple(array.reshape(-1, group) for array in (indices, *others.values()))


def ragged_paged_attention(  # noqa: PLR0913  (the stack's)
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_cache: KVCache | jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    use_causal_mask: bool = True,
    update_kv_cache: bool = True,
    skip_kv_mask: bool = False,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    out_dtype: Any = None,
    mask_value: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    chunk_prefill_size: int | None = None,
    d_block_sizes: tuple[int, int, int, int] | None = None,
    p_block_sizes: tuple[int, int, int, int] | None = None,
    m_block_sizes: tuple[int, int, int, int] | None = None,
    vmem_limit_bytes: int | None = None,
    debug_mode: bool = False,
    disable_bounds_checks: bool = True,
    disable_semaphore_checks: bool = True,
) -> tuple[jax.Array, Any]:
    """`kernels.ragged_paged_attention.v3`, as `ragged_attention.ragged_paged_attention`.

    Args:
      queries: [tokens, q_heads, dim].
      keys, values: [tokens, kv_heads, dim] in the cache's type, divided by their scales.
      kv_cache: of `new_kv_cache`, or the stack's [pages, page_size, 2 * kv_heads / packing,
        packing, dim up to 128s], keys and values of a head side by side, which is converted, see
        `adapters.paged`. Donate it.
      kv_lens: [requests] int32.
      page_indices: [requests * pages_per_seq] int32, a rectangular table.
      cu_q_lens: [requests + 1] int32.
      distribution: [3] int32; the last is the number of requests. Requests need no order.
      use_causal_mask, sm_scale, sliding_window, soft_cap, out_dtype: as there.
      update_kv_cache: False: the cache has the new keys and values already; both are ignored.
      q_scale: queries are divided by it, rounded to the cache's type and multiplied by it.
      k_scale, v_scale: of what the cache holds.
      disable_bounds_checks: leaves out the compiler's checks of addresses.
      skip_kv_mask, mask_value, chunk_prefill_size, d_block_sizes, p_block_sizes, m_block_sizes,
        vmem_limit_bytes, disable_semaphore_checks: ignored.
      debug_mode: False.

    Returns:
      [tokens, q_heads, dim], 0 for tokens of no request and queries that see nothing, and the
      cache, of the kind that was given.

    Raises:
      ArgumentError, UnsupportedError: as there.
    """
    where = "ragged_paged_attention"
    del mask_value, chunk_prefill_size, d_block_sizes, p_block_sizes, m_block_sizes
    del vmem_limit_bytes, disable_semaphore_checks
    refuse_modes(where, debug_mode, skip_kv_mask=skip_kv_mask, causal=use_causal_mask)
    return paged.attend(
        where,
        queries,
        keys,
        values,
        kv_cache,
        paged.Requests(kv_lens, cu_q_lens, page_indices, distribution),
        update=update_kv_cache,
        causal=use_causal_mask,
        window=sliding_window,
        soft_cap=soft_cap,
        sm_scale=sm_scale,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        out_dtype=out_dtype,
        bounds_checks=not disable_bounds_checks,
    )


def mla_ragged_paged_attention(  # noqa: PLR0913  (the stack's)
    ql_nope: jax.Array,
    q_pe: jax.Array,
    new_kv_c: jax.Array,
    new_k_pe: jax.Array,
    cache_kv: KVCache | jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    chunk_prefill_size: int | None = None,
    num_kv_pages_per_block: tuple[int, int, int] | int | None = None,
    num_queries_per_block: tuple[int, int, int] | int | None = None,
    vmem_limit_bytes: int | None = None,
    decode_batch_size: int = 1,
    mixed_q_split: int = 1,
    s_dtype: Any = jnp.bfloat16,
    transpose_kv_cache: bool = False,
    two_step_flash_attention: bool = True,
    p_same_dtype_as_v: bool = True,
    debug_mode: bool = False,
) -> tuple[jax.Array, Any]:
    """`kernels.mla.v2`, as `ragged_attention.mla_ragged_paged_attention`.

    Args:
      ql_nope: [heads, tokens, rank], heads first as the stack's kernel demands; transposed here.
      q_pe: [tokens, heads, rope_dim].
      new_kv_c, new_k_pe: [tokens, rank] and [tokens, rope_dim] in the cache's type, divided by
        their scale.
      cache_kv: of `new_mla_cache`, or the stack's [pages, page_size / packing, packing, 640] or,
        with transpose_kv_cache, [pages, 640, page_size], which is converted, see `adapters.paged`.
        Donate it.
      kv_lens: [requests] int32.
      page_indices: [requests * pages_per_seq] int32, a rectangular table.
      cu_q_lens: [requests + 1] int32.
      distribution: [3] int32; the last is the number of requests. Requests need no order.
      sm_scale, sliding_window, soft_cap: as there.
      q_scale, k_scale: logits are multiplied by both.
      v_scale: the result is multiplied by it.
      transpose_kv_cache: how a cache of the stack lies; ignored for one of ours.
      mask_value, chunk_prefill_size, num_kv_pages_per_block, num_queries_per_block,
        vmem_limit_bytes, decode_batch_size, mixed_q_split, two_step_flash_attention: ignored.
      s_dtype, p_same_dtype_as_v: ignored: logits are float32, probabilities bfloat16 or, where
        queries or cache are, float32.
      debug_mode: False.

    Returns:
      [heads, tokens, rank] in the dtype of ql_nope, and the cache, of the kind that was given.

    Raises:
      ArgumentError, UnsupportedError: as there.
    """
    where = "mla_ragged_paged_attention"
    del mask_value, chunk_prefill_size, num_kv_pages_per_block, num_queries_per_block
    del vmem_limit_bytes, decode_batch_size, mixed_q_split, s_dtype
    del two_step_flash_attention, p_same_dtype_as_v
    refuse_modes(where, debug_mode)
    dims = checks.Dims(where)
    dims.bind("ql_nope", ql_nope, "heads tokens rank")
    dims.bind("q_pe", q_pe, "tokens heads rope_dim")
    out, cache = paged.attend_latent(
        where,
        ql_nope.swapaxes(0, 1),
        q_pe,
        new_kv_c,
        new_k_pe,
        cache_kv,
        paged.Requests(kv_lens, cu_q_lens, page_indices, distribution),
        transposed=transpose_kv_cache,
        sm_scale=sm_scale,
        window=sliding_window,
        soft_cap=soft_cap,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return out.swapaxes(0, 1), cache
