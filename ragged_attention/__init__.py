"""Paged attention over ragged batches: GQA, MQA and MLA, decode to prefill, in one kernel."""

from ragged_attention.api import (
    SUPPORTED_CHIPS,
    Attention,
    explain,
    mla_ragged_paged_attention,
    ragged_paged_attention,
    supports,
)
from ragged_attention.cache import (
    allocate_kv_cache,
    allocate_mla_cache,
    context_parallel_attention,
    from_interleaved,
    merge_attention_states,
    to_interleaved,
    update_kv_cache,
)
from ragged_attention.layout import CacheLayout, KVCache, pack_pages
from ragged_attention.plan import Explanation, Plan

__all__ = [
    "SUPPORTED_CHIPS",
    "Attention",
    "CacheLayout",
    "Explanation",
    "KVCache",
    "Plan",
    "allocate_kv_cache",
    "allocate_mla_cache",
    "context_parallel_attention",
    "explain",
    "from_interleaved",
    "merge_attention_states",
    "mla_ragged_paged_attention",
    "pack_pages",
    "ragged_paged_attention",
    "supports",
    "to_interleaved",
    "update_kv_cache",
]
