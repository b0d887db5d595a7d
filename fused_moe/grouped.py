"""The layer without a kernel of its own: sort by expert, grouped products, `gather_reduce`.

Differentiable, and at home on every backend. Across devices either every device holds some of the
experts (tokens are gathered, partial results are summed and scattered), or a part of every expert.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from gather_reduce import pack_parts, ragged_gather_reduce
from reference.fused_moe import Activation, Weights, chosen, gated, quantise

AxisNames = tuple[str, ...]


def grouped_product(
    x: jax.Array, weight: jax.Array, scale: jax.Array | None, counts: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Row r of x times the weights of its expert, in float32, and the scales that it still lacks.

    Args:
      x: [R, K], rows of the same expert together.
      weight, scale: [E, K, N], [E, B, N].
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
    return y, None if scale is None else scale[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product:
    """Rows times weights of their experts, and what each element of that still needs.

    Attributes:
      y: [R, N] float32 products.
      experts: [R] expert of each row; E for rows behind those of all experts.
      row_scale: that rows are multiplied by, or None.
      scale, bias: [E, N] that are multiplied and added, or None.
    """

    y: jax.Array
    experts: jax.Array
    row_scale: jax.Array | None
    scale: jax.Array | None
    bias: jax.Array | None

    @property
    def finished(self) -> bool:
        """Whether nothing is missing, so that no pass over the rows is either."""
        return self.row_scale is None and self.scale is None and self.bias is None

    def columns(self, some: slice = slice(None)) -> jax.Array:
        """Some columns, with all that they need."""

        def of_rows(array: jax.Array) -> jax.Array:
            return array[:, some][in_range(self.experts, array)]

        y = self.y[:, some]
        y = y if self.scale is None else y * of_rows(self.scale)
        y = y if self.row_scale is None else y * self.row_scale
        return y if self.bias is None else y + of_rows(self.bias)


def in_range(experts: jax.Array, of: jax.Array) -> jax.Array:
    """Indices for the rows behind those of all experts, too."""
    return jnp.minimum(experts, of.shape[0] - 1)


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
    product = experts_of(tokens[order // top_k], weights, ids[order], counts, *options)
    places = jnp.zeros_like(ids).at[order].set(jnp.arange(ids.size, dtype=ids.dtype))
    places = places.reshape(num_tokens, top_k)
    slots = (expert_weights, places, known)
    out = cheapest_sums(product, *slots, order, exact=tokens.dtype != jnp.bfloat16)
    if weights.shared is not None:
        out += shared_expert(tokens, weights.shared, *options)
    return out


def sums(
    product: Product, expert_weights: jax.Array, places: jax.Array, known: jax.Array
) -> jax.Array:
    """[T, N] float32 sums of each token's rows.

    Args:
      product: of rows in the order of their experts.
      expert_weights, places, known: [T, top_k] weight, row and validity of each slot.
    """
    return ragged_gather_reduce(product.columns(), places, expert_weights, known)


def cheapest_sums(product: Product, *slots: jax.Array, exact: bool) -> jax.Array:
    """`packed_sums` where they save bytes and need not be exact, else `sums`; slots as there."""
    if exact or product.finished or product.y.shape[1] % 256:
        return sums(product, *slots[:3])
    return packed_sums(product, *slots)


@jax.custom_vjp
def packed_sums(
    product: Product,
    expert_weights: jax.Array,
    places: jax.Array,
    known: jax.Array,
    order: jax.Array,
) -> jax.Array:
    """`sums` of rows that the pass which they need anyhow weights and packs, as bfloat16.

    That saves a third of the bytes of this pass and of the sums; where products are finished the
    pass would cost more than it saves. The gradient is that of `sums`; order: [R] each row's slot.
    """
    half = product.y.shape[1] // 2
    weights = expert_weights.astype(jnp.float32).ravel()[order, None]
    halves = [product.columns(slice(n * half, (n + 1) * half)) * weights for n in range(2)]
    packed = pack_parts([part.astype(jnp.bfloat16) for part in halves], 2 * half)
    known &= expert_weights != 0  # rows of other slots may be anything
    return ragged_gather_reduce(packed, places, None, known, out_dtype=jnp.float32)


def _packed_forward(product: Product, expert_weights: jax.Array, *rest: jax.Array) -> Any:
    return packed_sums(product, expert_weights, *rest), (product, expert_weights, *rest)


def _packed_backward(saved: Any, d_out: jax.Array) -> Any:
    product, expert_weights, places, known, _ = saved
    run = functools.partial(sums, places=places, known=known)
    return *jax.vjp(run, product, expert_weights)[1](d_out), None, None, None


packed_sums.defvjp(_packed_forward, _packed_backward)


def shared_expert(x: jax.Array, weights: Weights, *options: Any) -> jax.Array:
    """The expert that every row goes to, float32; options as `experts_of`."""
    only = jax.tree.map(lambda w: w[None], weights)
    count = x.shape[0]
    ids, counts = jnp.zeros(count, jnp.int32), jnp.full(1, count, jnp.int32)
    return experts_of(x, only, ids, counts, *options).columns()


def experts_of(
    x: jax.Array,
    weights: Weights,
    experts: jax.Array,
    counts: jax.Array,
    activation: Activation,
    limit: float | None,
    activation_dtype: DTypeLike | None,
    tensor_axes: AxisNames,
) -> Product:
    """Both products for rows sorted by expert; see `grouped_product`."""

    def product(x: jax.Array, name: str, row_scale: jax.Array | None) -> Product:
        weight, scale, bias = (getattr(weights, name + part) for part in ("", "_scale", "_bias"))
        y, scale = grouped_product(x, weight, scale, counts)
        if bias is not None and name == "down" and tensor_axes:  # of a sum over devices
            bias = jnp.where(lax.axis_index(tensor_axes) == 0, bias, 0.0)  # one of them adds it
        return Product(y, experts, row_scale, scale, bias)

    scale = h_scale = None
    if activation_dtype is not None:
        x, scale = quantise(x, activation_dtype)
    gate, up = (product(x, name, scale).columns() for name in ("gate", "up"))
    h = gated(gate, up, activation, limit)
    if activation_dtype is None:
        h = h.astype(x.dtype)
    else:
        h, h_scale = quantise_over(h, activation_dtype, tensor_axes)
    return product(h, "down", h_scale)


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
        how = (options[name] for name in ("activation", "limit", "activation_dtype"))
        out += shared_expert(tokens, weights.shared, *how, ())
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
