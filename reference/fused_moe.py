"""A mixture-of-experts layer, specified: routed experts, shared expert, quantised or not.

A token x goes to the experts its router chose, with weights w, and to the shared expert if any:

    y = sum_j w_j expert_{id_j}(x) + shared(x)
    expert(x) = (gated(x W_gate + b_gate, x W_up + b_up)) W_down + b_down

Weights may be quantised, with one scale per output channel or per block of inputs and channel.
Activations may be quantised as well, each token row with a scale of its own, before both products.

Sources: GShard (arXiv 2006.16668), DeepSeek-V3 (arXiv 2412.19437), gpt-oss (arXiv 2508.10925).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

Activation = Literal["silu", "gelu", "swigluoai"]
ACTIVATIONS = get_args(Activation)
_BLOCK = 32  # rows of one expert that are computed together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of all experts, E of them; of a shared expert without the leading dimension.

    Scales divide the input dimension into B equal blocks: B is 1 for scales per output channel.

    Attributes:
      gate, up: [E, hidden, inter].
      down: [E, inter, hidden].
      gate_scale, up_scale: [E, B, inter] float32, or None.
      down_scale: [E, B, hidden] float32, or None.
      gate_bias, up_bias: [E, inter] float32, or None.
      down_bias: [E, hidden] float32, or None.
      shared: the expert that every token goes to, or None.
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    gate_scale: jax.Array | None = None
    up_scale: jax.Array | None = None
    down_scale: jax.Array | None = None
    gate_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None
    shared: Weights | None = None


def quantise(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Rows of x [..., width] in a narrow float type, and the scale [..., 1] of each row.

    The largest element of a row becomes the largest number of the type; x is about q * scale. A row
    of zeros has scale 1. A row with a NaN or an infinity gives NaN.
    """
    largest = float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(amax == 0, 1.0, amax * (1 / largest))
    return jnp.clip(x * (1 / scale), -largest, largest).astype(dtype), scale


def gated(gate: jax.Array, up: jax.Array, activation: Activation, limit: float | None) -> jax.Array:
    """The activation of an expert, element by element, in float32.

    Args:
      gate, up: the two projections.
      activation: "silu" and "gelu" (tanh form) of the gate times up; "swigluoai" is
        gate * sigmoid(1.702 * gate) * (up + 1).
      limit: gate is clipped to at most this, up to within plus or minus this; None does not clip.
    """
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    if activation == "silu":
        return gate * jax.nn.sigmoid(gate) * up
    if activation == "gelu":
        return jax.nn.gelu(gate, approximate=True) * up
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


def scaled_product(x: jax.Array, w: jax.Array, scale: jax.Array | None) -> jax.Array:
    """X [rows, K] times w [K, N], whose blocks of inputs are scaled by scale [B, N]; float32."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    if scale is not None:
        w = w * jnp.repeat(scale, w.shape[0] // scale.shape[0], axis=0)
    return jnp.dot(x, w, precision=lax.Precision.HIGHEST)


def expert(
    x: jax.Array,
    weights: Weights,
    activation: Activation,
    limit: float | None,
    activation_dtype: DTypeLike | None,
) -> jax.Array:
    """One expert, weights without the leading dimension, for x [rows, hidden]; float32."""

    def product(x: jax.Array, name: str) -> jax.Array:
        scale, bias = getattr(weights, f"{name}_scale"), getattr(weights, f"{name}_bias")
        if activation_dtype is None:
            y = scaled_product(x, getattr(weights, name), scale)
        else:
            q, row_scale = quantise(x, activation_dtype)
            y = scaled_product(q, getattr(weights, name), scale) * row_scale
        return y if bias is None else y + bias

    return product(gated(product(x, "gate"), product(x, "up"), activation, limit), "down")


def chosen(expert_ids: jax.Array, num_experts: int) -> jax.Array:
    """Which slots of [T, top_k] name an expert; ids outside [0, num_experts) are skipped."""
    return (expert_ids >= 0) & (expert_ids < num_experts)


def fused_moe(
    tokens: jax.Array,
    weights: Weights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    activation: Activation = "silu",
    limit: float | None = None,
    activation_dtype: DTypeLike | None = None,
) -> jax.Array:
    """The layer on one device.

    Tokens are sorted by expert and every expert's are padded to whole blocks of rows; blocks are
    computed one after another, each with the weights of its expert.

    Args:
      tokens: [T, hidden].
      weights: of all experts.
      expert_ids: [T, top_k] int32. An id outside [0, E), such as -1, is skipped. An expert that is
        named twice counts with the sum of its weights.
      expert_weights: [T, top_k] float32.
      activation, limit: see `gated`; of routed and shared experts alike.
      activation_dtype: quantise the rows of both products' left sides to this type, or None.

    Returns:
      [T, hidden] in the dtype of tokens.
    """
    num_tokens, top_k = expert_ids.shape
    num_experts = weights.gate.shape[0]
    routed = dataclasses.replace(weights, shared=None)
    experts = jnp.where(chosen(expert_ids, num_experts), expert_ids, num_experts).ravel()
    order = jnp.argsort(experts, stable=True)
    counts = jnp.bincount(experts, length=num_experts + 1)[:num_experts]
    blocks = -(-counts // _BLOCK)
    block_ends, starts = jnp.cumsum(blocks), jnp.cumsum(counts) - counts

    def block(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        e = jnp.minimum(jnp.searchsorted(block_ends, b, side="right"), num_experts - 1)
        row = (b - block_ends[e] + blocks[e]) * _BLOCK + jnp.arange(_BLOCK)
        exists = (b < block_ends[-1]) & (row < counts[e])
        entry = order[jnp.where(exists, starts[e] + row, 0)]
        x = tokens[entry // top_k]
        here = jax.tree.map(lambda w: w[e], routed)
        y = expert(x, here, activation, limit, activation_dtype)
        return jnp.where(exists, entry, num_tokens * top_k), y

    most = num_tokens * top_k // _BLOCK + num_experts
    entries, y = lax.map(block, jnp.arange(most))
    per_entry = jnp.zeros((num_tokens * top_k, tokens.shape[1]), jnp.float32)
    per_entry = per_entry.at[entries.ravel()].set(y.reshape(-1, y.shape[-1]), mode="drop")
    per_entry = per_entry.reshape(num_tokens, top_k, -1) * expert_weights[..., None]
    out = jnp.where(chosen(expert_ids, num_experts)[..., None], per_entry, 0.0).sum(1)
    if weights.shared is not None:
        out += expert(tokens, weights.shared, activation, limit, activation_dtype)
    return out.astype(tokens.dtype)
