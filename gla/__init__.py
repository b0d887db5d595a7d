"""Gated linear attention: prefill, decode and ragged mixes of both, in one kernel."""

from gla.api import SUPPORTED_CHIPS, explain, gla, gla_batch, supports
from gla.decay import fla_decay, ling_decay
from gla.plan import Explanation, Plan
from reference.gla import ChannelDecay, HeadDecay, TokenDecay

__all__ = [
    "SUPPORTED_CHIPS",
    "ChannelDecay",
    "Explanation",
    "HeadDecay",
    "Plan",
    "TokenDecay",
    "explain",
    "fla_decay",
    "gla",
    "gla_batch",
    "ling_decay",
    "supports",
]
