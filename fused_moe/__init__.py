"""Mixture-of-experts layers, their experts spread over devices, in one kernel."""

from fused_moe.api import (
    SUPPORTED_CHIPS,
    explain,
    fused_moe,
    grouped_moe,
    received_tokens,
    supports,
)
from fused_moe.plan import Explanation
from fused_moe.routing import route, to_physical
from fused_moe.spec import Plan
from fused_moe.weights import expand_block_scales, pad, quantise
from reference.fused_moe import Weights

__all__ = [
    "SUPPORTED_CHIPS",
    "Explanation",
    "Plan",
    "Weights",
    "expand_block_scales",
    "explain",
    "fused_moe",
    "grouped_moe",
    "pad",
    "quantise",
    "received_tokens",
    "route",
    "supports",
    "to_physical",
]
