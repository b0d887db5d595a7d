"""Decay constants of known models."""

from __future__ import annotations

import math

import jax.numpy as jnp

from reference.gla import HeadDecay


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes 2^(-8 (h + 1) / num_heads), interleaved where num_heads is no power of two."""
    whole = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / whole) for h in range(whole)]
    if whole < num_heads:
        slopes += alibi_slopes(2 * whole)[0::2][: num_heads - whole]
    return slopes


def ling_decay(num_heads: int, layer: int, num_layers: int) -> HeadDecay:
    """Decay of a Ling 2.5 / 2.6 linear-attention layer (BailingMoeV2_5).

    Args:
      num_heads: heads of the whole layer, before sharding.
      layer: index of the layer among all `num_layers`, from 0.
      num_layers: layers of the model, 80 for Ling-2.6-1T.

    Returns:
      g [num_heads] = -slope_h * (1 - (layer - 1) / (num_layers - 1) + 1e-5).
    """
    depth = 1 - (layer - 1) / (num_layers - 1) + 1e-5
    return HeadDecay(-jnp.asarray(alibi_slopes(num_heads), jnp.float32) * depth)


def fla_decay(num_heads: int, layer: int, num_layers: int) -> HeadDecay:
    """Decay of flash-linear-attention's `chunk_lightning_attn`.

    Returns:
      g [num_heads] = -(8 h / num_heads) (1 - layer / num_layers) for head h.
    """
    depth = 8 / num_heads * (1 - layer / num_layers)
    return HeadDecay(-depth * jnp.arange(num_heads, dtype=jnp.float32))
