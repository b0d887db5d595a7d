"""Weighted sums of rows that indices choose, on the SparseCore: dense and ragged."""

from gather_reduce.api import (
    SUPPORTED_CHIPS,
    dense_gather_reduce,
    explain,
    ragged_gather_reduce,
    supports,
)
from gather_reduce.plan import Explanation, Plan
from reference.gather_reduce import (
    PackedRows,
    column_parts,
    pack_columns,
    pack_parts,
    unpack_columns,
)

__all__ = [
    "SUPPORTED_CHIPS",
    "Explanation",
    "PackedRows",
    "Plan",
    "column_parts",
    "dense_gather_reduce",
    "explain",
    "pack_columns",
    "pack_parts",
    "ragged_gather_reduce",
    "supports",
    "unpack_columns",
]
