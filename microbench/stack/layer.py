"""One layer of Ling 2.5 and 2.6 as a device runs it: attention of either kind, then experts.

Devices form a mesh of "data" and "tensor". Requests are spread over data, heads over tensor, and
experts over both. Between layers each device holds the rows of some of its data rank's tokens;
attention gathers those of the rank and scatters its sums again. Everything happens inside
`jax.shard_map`. Matrices are float8 with a scale per output channel, rows are quantised per token.

Two choices keep copies away from the kernels. Projections that the model's checkpoint holds as one
matrix are separate, so that no product has to be cut apart. And a query's rotated lanes pass
through the product that lifts the other lanes to the latents' rank, as an identity among its
weights, which saves putting both together afterwards.

Sources: the modelling code of BailingMoeV2_5; DeepSeek-V2 (arXiv 2405.04434) for absorbed weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import fused_moe
import gla
import ragged_attention

FLOAT8 = jnp.float8_e4m3fn
TENSOR = "tensor"
DEVICES = ("data", TENSOR)
Kind = Literal["mla", "lightning"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model, and how its devices share it; heads and experts are those of all devices.

    Attributes:
      hidden, heads, inter, experts: as they are called.
      layers: of the model, for the decays.
      top_k, groups, top_groups, scale: of the router.
      q_rank, kv_rank, nope, rope, value_dim: of latent attention.
      dim, rotary: of linear attention: a head, and the part of it that is rotated.
      norm_groups: groups of heads that linear attention norms its output over.
      page_size: of the cache of latents.
      data, tensor: devices along each axis of the mesh.
      attention: implementation of the attention kernels.
      moe: of the experts.
      rows: what experts round rows to; None leaves them as they come, of any type, for the grouped
        experts.
    """

    hidden: int
    heads: int
    inter: int
    layers: int
    experts: int = 256
    top_k: int = 8
    groups: int = 8
    top_groups: int = 4
    scale: float = 2.5
    q_rank: int = 1536
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    value_dim: int = 128
    dim: int = 128
    rotary: int = 64
    norm_groups: int = 8
    page_size: int = 128
    data: int = 1
    tensor: int = 1
    attention: Literal["pallas", "interpret", "reference"] = "pallas"
    moe: Literal["pallas", "interpret", "grouped"] = "pallas"
    rows: Any = FLOAT8


class Linear(NamedTuple):
    """A matrix."""

    weight: Any  # [inputs, outputs] float8, or f32 of the same values
    scale: Any  # [1, outputs] f32


class Mla(NamedTuple):
    """Weights of latent attention; h heads of this device, matrices are `Linear`."""

    q_down: Any  # [hidden, q_rank]
    kv_down: Any  # [hidden, kv_rank]
    k_rope: Any  # [hidden, rope]
    q_norm: Any  # [q_rank] f32
    kv_norm: Any  # [kv_rank] f32
    q_nope: Any  # [q_rank, h * nope]
    q_rope: Any  # [q_rank, h * rope]
    k_up: Any  # [h, nope + rope, kv_rank + rope] bf16, see `absorbed`
    v_up: Any  # [h, kv_rank, value_dim] bf16
    out: Any  # [h * value_dim, hidden]


class Lightning(NamedTuple):
    """Weights of linear attention; h heads of this device, matrices are `Linear`."""

    q: Any  # [hidden, h * dim]
    k: Any
    v: Any
    gate: Any
    q_norm: Any  # [dim] f32
    k_norm: Any
    o_norm: Any  # [h, dim] f32
    decay: Any  # [h] f32
    out: Any  # [h * dim, hidden]


class Layer(NamedTuple):
    """Weights of a layer."""

    first_norm: Any  # [hidden] f32, before attention
    second_norm: Any  # before the experts
    attention: Any  # Mla or Lightning
    router: Any  # [hidden, experts] bf16
    bias: Any  # [experts] f32
    experts: Any  # fused_moe.Weights of those of this device
    shared: Any  # of the expert that all tokens see


# Keys, normed and turned, and values [T, h, dim] of linear attention, if there are drafts.
Drafted = tuple[jax.Array, jax.Array] | None


class Batch(NamedTuple):
    """A step's requests, those of this data rank; T tokens, N requests."""

    positions: Any  # [T] i32
    cu_q_lens: Any  # [N + 1] i32
    kv_lens: Any  # [N] i32
    page_indices: Any
    page_offsets: Any  # [N + 1] i32
    slot_ids: Any  # [N] i32
    has_state: Any  # [N] bool
    drafts: Any = None  # gla.Drafts with words of ancestors, for both kinds of attention
    snapshots: Any = None  # gla.Snapshots
    forced: Any = None  # bool: whether `expert_ids` are those of the step's tokens
    expert_ids: Any = None  # [tokens of this device, top_k] i32


def absorbed(k_up: jax.Array, rope: int) -> jax.Array:
    """`Mla.k_up` from [h, nope, kv_rank]: rotated lanes pass unchanged, in lanes of their own."""
    heads = k_up.shape[0]
    one = jnp.broadcast_to(jnp.eye(rope, dtype=k_up.dtype), (heads, rope, rope))
    above = jnp.pad(k_up, ((0, 0), (0, 0), (0, rope)))
    below = jnp.pad(one, ((0, 0), (0, 0), (k_up.shape[2], 0)))
    return jnp.concatenate([above, below], axis=1)


def layer(
    config: Config, x: Any, weights: Layer, store: Any, batch: Batch
) -> tuple[jax.Array, Any, Drafted]:
    """A layer on a device.

    Args:
      config: sizes.
      x: [tokens of this device, hidden] bf16.
      weights: of the layer; their kind says which attention it is.
      store: cache of latents, or states [slots, h, dim, dim]; written in place.
      batch: of the data rank.

    Returns:
      The rows behind the layer, the store, and what `gla.commit` takes of drafts.
    """
    attend: Any = mla if isinstance(weights.attention, Mla) else lightning
    with jax.named_scope("norm"):
        y = rms_norm(x, weights.first_norm)
    y = lax.all_gather(y, TENSOR, axis=0, tiled=True)
    y, store, drafted = attend(config, y, weights.attention, store, batch)
    x += lax.psum_scatter(y, TENSOR, scatter_dimension=0, tiled=True)
    with jax.named_scope("norm"):
        y = rms_norm(x, weights.second_norm)
    return x + experts(config, y, weights, batch), store, drafted


def mla(
    config: Config, x: jax.Array, w: Mla, cache: Any, batch: Batch
) -> tuple[jax.Array, Any, Drafted]:
    """Latent attention with absorbed projections; this device's part of the sum."""
    tokens, heads = len(x), config.heads // config.tensor
    cos, sin = rotation(batch.positions, config.rope)
    with jax.named_scope("project"):
        q, latent, k_rope = (project(x, m) for m in (w.q_down, w.kv_down, w.k_rope))
        q, latent = rms_norm(q, w.q_norm), rms_norm(latent, w.kv_norm)
        nope, rope = (project(q, m).reshape(tokens, heads, -1) for m in (w.q_nope, w.q_rope))
        q = jnp.concatenate([nope, rotate(rope, cos, sin)], axis=2)
        q = jnp.einsum("thd,hdr->thr", q, w.k_up)
        k = jnp.concatenate([latent, rotate(k_rope[:, None], cos, sin)[:, 0]], axis=1)
    o, cache, _ = ragged_attention.ragged_paged_attention(
        q,
        k[:, None],
        None,
        cache,
        batch.kv_lens,
        batch.cu_q_lens,
        batch.page_indices,
        batch.page_offsets,
        ancestors=None if batch.drafts is None else batch.drafts.ancestors,
        sm_scale=(config.nope + config.rope) ** -0.5,
        implementation=config.attention,
    )
    with jax.named_scope("project"):
        o = jnp.einsum("thr,hrd->thd", o, w.v_up)
        return project(o.reshape(tokens, -1), w.out), cache, None


def lightning(
    config: Config, x: jax.Array, w: Lightning, states: Any, batch: Batch
) -> tuple[jax.Array, Any, Drafted]:
    """Linear attention; this device's part of the sum."""
    shape = len(x), config.heads // config.tensor, config.dim
    with jax.named_scope("project"):
        q, k, v, gate = (project(x, m).reshape(shape) for m in (w.q, w.k, w.v, w.gate))
    cos, sin = rotation(batch.positions, config.rotary)
    prologue = gla.NormRope(w.q_norm, w.k_norm, cos, sin)
    o, states = gla.gla(
        q,
        k,
        v,
        states,
        batch.slot_ids,
        batch.cu_q_lens,
        batch.has_state,
        decay=gla.HeadDecay(w.decay),
        drafts=batch.drafts,
        snapshots=batch.snapshots,
        prologue=prologue,
        epilogue=gla.NormGate(w.o_norm, gate, config.heads // config.norm_groups),
        implementation=config.attention,
    )
    drafted = None if batch.drafts is None else (gla.norm_rope(q, k, prologue)[1], v)
    with jax.named_scope("project"):
        return project(o.reshape(len(x), -1), w.out), states, drafted


def experts(config: Config, x: jax.Array, weights: Layer, batch: Batch) -> jax.Array:
    """Router and experts, over all devices."""
    with jax.named_scope("route"):
        logits = jnp.dot(x, weights.router, preferred_element_type=jnp.float32)
        ids, expert_weights = fused_moe.route(
            logits,
            top_k=config.top_k,
            scoring="sigmoid",
            bias=weights.bias,
            num_groups=config.groups,
            top_groups=config.top_groups,
            scale=config.scale,
        )
        if batch.forced is not None:
            ids = lax.cond(batch.forced, lambda: batch.expert_ids, lambda: ids)
    held = dataclasses.replace(weights.experts, shared=weights.shared)
    routed = held, ids, expert_weights
    with jax.named_scope("moe"):
        if config.rows is None:
            return fused_moe.grouped_moe(x, *routed, axis_name=DEVICES)
        found = fused_moe.fused_moe(
            rounded(x).astype(jnp.bfloat16),
            *routed,
            axis_name=DEVICES,
            activation_dtype=config.rows,
            implementation=config.moe,
        )
        return rounded(found.astype(x.dtype))


def rounded(x: jax.Array) -> jax.Array:
    """X with values of bfloat16; XLA leaves out a mere change of type that the next one undoes."""
    return x if x.dtype == jnp.bfloat16 else lax.reduce_precision(x, 8, 7)


def project(x: jax.Array, matrix: Linear) -> jax.Array:
    """X [T, inputs] times a matrix, in the type of x; rows are quantised if it is float8."""
    wide = x.astype(jnp.float32)
    if matrix.weight.dtype != FLOAT8:
        return (jnp.dot(wide, matrix.weight) * matrix.scale).astype(x.dtype)
    largest = jnp.max(jnp.abs(wide), axis=1, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / float(jnp.finfo(FLOAT8).max))
    narrow = (wide / scale).astype(FLOAT8)
    product = jnp.dot(narrow, matrix.weight, preferred_element_type=jnp.float32)
    return (product * scale * matrix.scale).astype(x.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Rows over their root mean square, times a weight."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(wide * wide, axis=1, keepdims=True)
    return (wide * lax.rsqrt(square + eps) * weight).astype(x.dtype)


def rotation(positions: jax.Array, dim: int, base: float = 6e6) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [T, dim / 2] of a rotary embedding."""
    rates = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles = positions.astype(jnp.float32)[:, None] * rates
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """X [T, heads, dim], whose first half turns with its second."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=2)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2).astype(x.dtype)
