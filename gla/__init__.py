"""Gated linear attention: prefill, decode and ragged mixes of both, in one kernel."""

from gla.api import SUPPORTED_CHIPS, explain, gla, gla_batch, supports
from gla.decay import fla_decay, ling_decay
from gla.parallel import context_parallel_gla
from gla.plan import Explanation, Plan
from gla.short_conv import short_conv
from gla.states import commit, copy_slots
from reference.gla import ChannelDecay, HeadDecay, TokenDecay
from reference.gla_drafts import Drafts, Snapshots
from reference.gla_norm import NormGate, NormRope, norm_gate, norm_rope

__all__ = [
    "SUPPORTED_CHIPS",
    "ChannelDecay",
    "Drafts",
    "Explanation",
    "HeadDecay",
    "NormGate",
    "NormRope",
    "Plan",
    "Snapshots",
    "TokenDecay",
    "commit",
    "context_parallel_gla",
    "copy_slots",
    "explain",
    "fla_decay",
    "gla",
    "gla_batch",
    "ling_decay",
    "norm_gate",
    "norm_rope",
    "short_conv",
    "supports",
]
