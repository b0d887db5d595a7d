"""The layer without a kernel of its own: sort by expert, grouped products, weighted sum.

Differentiable, and at home on every backend. Across devices either every device holds some of the
experts (tokens are gathered, partial results are summed and scattered), or a part of every expert.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from reference.fused_moe import Activation, Weights, chosen, gated, quantise

AxisNames = tuple[str, ...]


def grouped_product(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    experts: jax.Array,
    counts: jax.Array,
) -> jax.Array:
    """Row r of x times the weights of its expert, in float32.

    Args:
      x: [R, K], rows of the same expert together.
      weight, scale, bias: [E, K, N], [E, B, N], [E, N].
      experts: [R] expert of each row; E for rows behind those of all experts.
      counts: [E] rows of each expert.
    """
    kind = jnp.dtype(jnp.float32 if x.dtype == jnp.float32 else jnp.bfloat16)  # exact for narrow x
    if scale is not None and scale.shape[1] > 1:
        repeats = weight.shape[1] // scale.shape[1]
        weight = weight.astype(jnp.float32) * jnp.repeat(scale, repeats, axis=1)
        kind, scale = jnp.dtype(jnp.float32), None
    y = lax.ragged_dot(
        x.astype(kind), weight.astype(kind), counts, preferred_element_type=jnp.float32
    )
    here = jnp.minimum(experts, weight.shape[0] - 1)
    if scale is not None:
        y *= scale[here, 0]
    return y if bias is None else y + bias[here]


def local_layer(
    tokens: jax.Array,
    weights: Weights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    activation: Activation,
    limit: float | None,
    activation_dtype: DTypeLike | None,
    tensor_axes: AxisNames = (),
) -> jax.Array:
    """What the experts in `weights` contribute, float32.

    Args:
      tokens, expert_ids, expert_weights: as `reference.fused_moe.fused_moe`.
      weights: routed experts, and a shared one or None.
      activation, limit, activation_dtype: likewise.
      tensor_axes: mesh axes over which the intermediate dimension is split; the result is then
        this device's part of a sum.
    """
    num_tokens, top_k = expert_ids.shape
    num_experts = weights.gate.shape[0]
    options = (activation, limit, activation_dtype, tensor_axes)
    known = chosen(expert_ids, num_experts)
    ids = jnp.where(known, expert_ids, num_experts).ravel()
    order = jnp.argsort(ids, stable=True)
    counts = jnp.bincount(ids, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    y = experts_of(tokens[order // top_k], weights, ids[order], counts, *options)
    y = jnp.zeros_like(y).at[order].set(y).reshape(num_tokens, top_k, -1)
    out = jnp.where(known[..., None], y * expert_weights[..., None], 0.0).sum(axis=1)
    if weights.shared is not None:
        shared = jax.tree.map(lambda w: w[None], weights.shared)
        zeros = jnp.zeros(num_tokens, jnp.int32)
        out += experts_of(tokens, shared, zeros, jnp.full(1, num_tokens, jnp.int32), *options)
    return out


def experts_of(
    x: jax.Array,
    weights: Weights,
    experts: jax.Array,
    counts: jax.Array,
    activation: Activation,
    limit: float | None,
    activation_dtype: DTypeLike | None,
    tensor_axes: AxisNames,
) -> jax.Array:
    """Both products for rows sorted by expert; see `grouped_product`."""

    def product(x: jax.Array, name: str, biased: bool = True) -> jax.Array:
        weight, scale, bias = (getattr(weights, name + part) for part in ("", "_scale", "_bias"))
        return grouped_product(x, weight, scale, bias if biased else None, experts, counts)

    row_scale = jnp.float32(1)
    if activation_dtype is not None:
        x, row_scale = quantise(x, activation_dtype)
    h = []
    for name in ("gate", "up"):
        bias = getattr(weights, f"{name}_bias")
        y = product(x, name, biased=False) * row_scale
        here = jnp.minimum(experts, weights.gate.shape[0] - 1)
        h.append(y if bias is None else y + bias[here])
    h = gated(h[0], h[1], activation, limit)
    scale = jnp.float32(1)
    if activation_dtype is None:
        h = h.astype(x.dtype)
    else:
        h, scale = quantise_over(h, activation_dtype, tensor_axes)
    y = product(h, "down", biased=False) * scale
    bias = weights.down_bias
    if bias is None:
        return y
    first = lax.axis_index(tensor_axes) == 0 if tensor_axes else True
    return y + jnp.where(first, bias[jnp.minimum(experts, bias.shape[0] - 1)], 0.0)


def quantise_over(h: jax.Array, dtype: DTypeLike, axes: AxisNames) -> tuple[jax.Array, jax.Array]:
    """`quantise` for rows that are split over mesh axes: one scale per whole row."""
    if not axes:
        return quantise(h, dtype)
    amax = lax.pmax(jnp.max(jnp.abs(h), axis=-1, keepdims=True), axes)
    with_amax = jnp.concatenate([h, amax], axis=-1)
    q, scale = quantise(with_amax, dtype)
    return q[:, :-1], scale


def expert_parallel(
    tokens: jax.Array,
    weights: Weights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    axes: AxisNames,
    **options: Any,
) -> jax.Array:
    """`local_layer` with tokens and experts split over mesh axes, inside `shard_map`."""
    if not axes:
        return local_layer(tokens, weights, expert_ids, expert_weights, **options).astype(
            tokens.dtype
        )

    def everywhere(x: jax.Array) -> jax.Array:
        return lax.all_gather(x, axes, tiled=True)

    here = weights.gate.shape[0]
    ids = everywhere(expert_ids)
    known = chosen(ids, here * lax.axis_size(axes))
    ids = jnp.where(known, ids - lax.axis_index(axes) * here, -1)
    routed = dataclasses.replace(weights, shared=None)
    out = local_layer(everywhere(tokens), routed, ids, everywhere(expert_weights), **options)
    out = lax.psum_scatter(out, axes, tiled=True)
    if weights.shared is not None:
        shared = jax.tree.map(lambda w: w[None], weights.shared)
        nobody = jnp.zeros((tokens.shape[0], 1), jnp.int32)
        ones = jnp.ones((tokens.shape[0], 1), jnp.float32)
        out += local_layer(tokens, shared, nobody, ones, **options)
    return out.astype(tokens.dtype)


def tensor_parallel(
    tokens: jax.Array,
    weights: Weights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    axes: AxisNames,
    **options: Any,
) -> jax.Array:
    """`local_layer` with the intermediate dimension split over mesh axes; tokens are whole."""
    out = local_layer(
        tokens,
        weights,
        expert_ids,
        expert_weights,
        tensor_axes=axes,
        **options,
    )
    return lax.psum(out, axes).astype(tokens.dtype)
