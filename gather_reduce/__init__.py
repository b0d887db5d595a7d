"""Weighted sums of rows that indices choose, on the SparseCore: dense and ragged."""

from gather_reduce.api import (
    SUPPORTED_CHIPS,
    dense_gather_reduce,
    explain,
    ragged_gather_reduce,
    supports,
)
from gather_reduce.plan import Explanation, Plan
from reference.gather_reduce import PackedRows, pack_columns, unpack_columns

__all__ = [
    "SUPPORTED_CHIPS",
    "Explanation",
    "PackedRows",
    "Plan",
    "dense_gather_reduce",
    "explain",
    "pack_columns",
    "ragged_gather_reduce",
    "supports",
    "unpack_columns",
]
