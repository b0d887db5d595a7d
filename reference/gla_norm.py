"""What a model does around gated linear attention, specified: norm and rope before, norm after.

    q, k  ->  rms_norm per head  ->  rope on the first rotary_dim of key_dim     (`norm_rope`)
    o     ->  rms_norm per group of heads  ->  * sigmoid(gate)                   (`norm_gate`)

Both take and return the type of the model, as a layer outside of the kernel would, and are float32
inside. Sources: RMSNorm (arXiv 1910.07467), RoPE (arXiv 2104.09864) with the halves of GPT-NeoX,
and the linear-attention block of BailingMoeV2_5 (Ling 2.5 and 2.6).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormRope:
    """Root-mean-square norm of every head of q and of k, and then a partial rotary embedding.

    Attributes:
      q_weight, k_weight: [key_dim] float32.
      cos, sin: [tokens, rotary_dim / 2] float32 of each token's position; dim i turns with dim
        i + rotary_dim / 2, dims from rotary_dim on do not turn.
      eps: is added to the mean square.
    """

    q_weight: jax.Array
    k_weight: jax.Array
    cos: jax.Array
    sin: jax.Array
    eps: float = dataclasses.field(default=1e-6, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormGate:
    """Root-mean-square norm of the output over groups of heads, times the sigmoid of a gate.

    A row of zeros stays zero, whatever its gate holds.

    Attributes:
      weight: [heads, value_dim] float32.
      gate: [tokens, heads, value_dim] in the type of v.
      heads_per_group: neighbouring heads that are normed together; divides heads.
      eps: is added to the mean square.
    """

    weight: jax.Array
    gate: jax.Array
    heads_per_group: int = dataclasses.field(metadata={"static": True})
    eps: float = dataclasses.field(default=1e-6, metadata={"static": True})


def norm_rope(
    q: jax.Array, k: jax.Array, prologue: NormRope, dtype: DTypeLike = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Q and k [tokens, heads, key_dim] as gated linear attention uses them, in their own type."""
    cos, sin = (x.astype(dtype)[:, None, :] for x in (prologue.cos, prologue.sin))
    half = cos.shape[-1]

    def prepare(x: jax.Array, weight: jax.Array) -> jax.Array:
        wide = x.astype(dtype)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * lax.rsqrt(square + prologue.eps) * weight.astype(dtype)
        a, b, rest = jnp.split(normed, [half, 2 * half], axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
        return turned.astype(x.dtype)

    return prepare(q, prologue.q_weight), prepare(k, prologue.k_weight)


def norm_gate(o: jax.Array, epilogue: NormGate, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The output [tokens, heads, value_dim] as a layer hands it on, in its own type."""
    tokens, heads, width = o.shape
    groups = (tokens, heads // epilogue.heads_per_group, epilogue.heads_per_group * width)
    wide = o.astype(dtype).reshape(groups)
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = (wide * lax.rsqrt(square + epilogue.eps)).reshape(o.shape)
    gated = normed * epilogue.weight.astype(dtype) * jax.nn.sigmoid(epilogue.gate.astype(dtype))
    zero = jnp.broadcast_to(square == 0, groups).reshape(o.shape)
    return jnp.where(zero, 0, gated).astype(o.dtype)
