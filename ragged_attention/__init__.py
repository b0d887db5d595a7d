"""Paged attention over ragged batches: GQA, MQA and MLA, decode to prefill, in one kernel."""

from ragged_attention.api import (
    SUPPORTED_CHIPS,
    Attention,
    explain,
    mla_ragged_paged_attention,
    ragged_paged_attention,
    supports,
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
    "explain",
    "mla_ragged_paged_attention",
    "pack_pages",
    "ragged_paged_attention",
    "supports",
]
