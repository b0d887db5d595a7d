"""Attention of published models on one of the devices that share its heads, by situation.

Heads are a device's share: Llama-3-70B, Qwen3-Coder-480B, gpt-oss-120b, DeepSeek-V3 and
Ling-2.6-1T over 8 devices, Qwen3-235B over 4; Ling-2.6-flash over 4 is the same as 1T over 8 (its
heads taken to be as many as those of its linear layers). Every other layer of gpt-oss sees a window
of 128, the others all; its sinks, a logit a head, are left out. DeepSeek-V4 chooses among keys that
are compressed, which no kernel here does.
"""

from __future__ import annotations

from typing import Any

_MLA: dict[str, Any] = {"kv_heads": 1, "key_dim": 576, "value_dim": 512, "latent": True}
_D64: dict[str, Any] = {"q_heads": 8, "kv_heads": 1, "key_dim": 64, "value_dim": 64}
MODELS: dict[str, dict[str, Any]] = {
    "ling-2.6": {"q_heads": 8, **_MLA},
    "deepseek-v3": {"q_heads": 16, **_MLA},
    "qwen3-235b": {"q_heads": 16, "kv_heads": 1},
    "qwen3-coder-480b": {"q_heads": 12, "kv_heads": 1},
    "gpt-oss-120b": {**_D64, "window": 128},
    "gpt-oss-120b-full": _D64,
    "llama-3-70b": {"q_heads": 8, "kv_heads": 1},
}
# (keys, query tokens) of each request, the decodes first
SITUATIONS: dict[str, tuple[tuple[int, int], ...]] = {
    "decode": ((4096, 1),) * 64,
    "chunked": ((16_384, 2048),),
    "mixed": ((4096, 1),) * 32 + ((6144, 2048),),
    "long": ((131_072, 1),) * 4,
    "speculative": ((4096, 4),) * 32,
}
