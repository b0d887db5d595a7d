"""What a serving stack needs around the kernel: caches, layouts elsewhere, partial results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from ragged_attention.api import Attention, ragged_paged_attention
from ragged_attention.layout import (
    LANES,
    CacheLayout,
    KVCache,
    in_both,
    lane_halves,
    pack_pages,
    round_up,
    token_rows,
    word_bits,
)
from ragged_attention.problem import Call, check_cache, check_layout, problem_of, refuse
from ragged_attention.schedule import GROUP_ROWS
from reference import ragged_attention as reference
from tpukit import checks

_WHERE = "ragged_attention"
_NOT_SPREAD = {  # options that attention over a mesh axis cannot be given
    "sinks": "Every device would count them.",
    "query_starts": "They follow from the device's place.",
    "return_lse": "The logarithms are always returned.",
}


def allocate_kv_cache(
    num_pages: int,
    page_size: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    dtype: Any = jnp.bfloat16,
) -> KVCache:
    """An empty cache of a layer.

    Args:
      num_pages: pages of the pool.
      page_size: tokens of a page: 8, 16, 32, 64, 128 or 256.
      kv_heads: key/value heads (of this device).
      key_dim: width of a key.
      value_dim: width of a value, key_dim by default.
      dtype: of keys and values: bfloat16, float32, int8, float8_e4m3fn, float8_e5m2 or, on tpu7x
        (and wherever the reference runs), float4_e2m1fn.

    Raises:
      ArgumentError: one of them is not possible.
    """
    value_dim = key_dim if value_dim is None else value_dim
    layout = CacheLayout(kv_heads, key_dim, value_dim, _dtype_name(dtype), page_size)
    return _empty(num_pages, layout)


def allocate_mla_cache(
    num_pages: int, page_size: int, rank: int, rope_dim: int, dtype: Any = jnp.bfloat16
) -> KVCache:
    """An empty cache of latents, rank + rope_dim lanes of a token.

    Two of them take 2 * rank + 128 lanes if rank is a multiple of 128, rope_dim at most 64 and a
    page long enough (32 tokens of bfloat16, 16 of 4 bytes, 64 of 1), else each is padded to 128.

    Raises:
      ArgumentError: one of the numbers is not possible.
    """
    for name, value in (("rank", rank), ("rope_dim", rope_dim)):
        checks.check_type(_WHERE, name, value, int)
    layout = CacheLayout(1, rank + rope_dim, rank, _dtype_name(dtype), page_size, latent=True)
    return _empty(num_pages, layout)


def _dtype_name(dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return str(dtype)  # which no layout has


def _empty(num_pages: int, layout: CacheLayout) -> KVCache:
    check_layout(layout)
    checks.check_type(_WHERE, "num_pages", num_pages, int)
    checks.check_range(_WHERE, "num_pages", num_pages, low=0)
    words = jnp.zeros((num_pages * layout.page_rows, layout.width), jnp.int32)
    return KVCache(words, layout)


def update_kv_cache(
    k: jax.Array,
    v: jax.Array | None,
    cache: KVCache,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    page_indices: jax.Array,
    page_offsets: jax.Array | None = None,
    num_requests: jax.Array | int | None = None,
    *,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
) -> KVCache:
    """Writes new rows without attending; arguments as `ragged_paged_attention`. Plain JAX.

    Raises:
      ArgumentError: an argument does not suit the cache.
    """
    check_cache(cache)
    checks.check_array(_WHERE, "k", k)
    layout = cache.layout
    q = jax.ShapeDtypeStruct((k.shape[0], layout.kv_heads, layout.key_dim), jnp.bfloat16)
    call = Call(
        q, k, v, cache, kv_lens, cu_q_lens, page_indices, page_offsets, num_requests,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    problem_of(call)
    batch = call.batch()
    rows = token_rows(*call.quantised(), layout)
    place = reference.place_of(batch, len(rows), cache.num_pages, layout.page_size)
    pack = layout.pack
    shift = (place % pack) * (32 // pack)
    field = jnp.left_shift(jnp.int32(-1 if pack == 1 else (1 << (32 // pack)) - 1), shift)
    words, lanes = cache.words, lane_halves(layout)
    # Tokens that share a row add up: each first clears its field, then adds to it.
    word = place // pack
    row = word // (GROUP_ROWS * layout.words_per_row) * GROUP_ROWS + word % GROUP_ROWS
    half = word // GROUP_ROWS % layout.words_per_row

    def cleared(of: int) -> jax.Array:
        fields = jnp.where(half == of, field, 0)
        return jnp.zeros((len(words), 1), jnp.int32).at[row, 0].add(fields, mode="drop")

    added = in_both(jnp.left_shift(word_bits(rows), shift[:, None]), layout)
    added = jnp.where(lanes == half[:, None], added, 0)
    kept = words & ~jnp.where(lanes == 0, cleared(0), cleared(layout.words_per_row - 1))
    return KVCache(kept.at[row].add(added, mode="drop"), layout)


def merge_attention_states(o: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention over several sets of keys, from that over each.

    Args:
      o: [sets, tokens, heads, dim].
      lse: [sets, tokens, heads] f32; -inf where a token saw nothing. At most one of the sets may
        have had sinks.

    Returns:
      o [tokens, heads, dim] and lse [tokens, heads].

    Raises:
      ArgumentError: the shapes do not agree.
    """
    dims = checks.Dims("merge_attention_states")
    dims.bind("o", o, "sets tokens heads _")
    dims.bind("lse", lse, "sets tokens heads")
    checks.check_range("merge_attention_states", "sets", dims["sets"], low=1)
    return _merged(o, lse, jnp.max(lse, axis=0), lambda x: jnp.sum(x, axis=0))


def _merged(
    o: jax.Array, lse: jax.Array, top: jax.Array, add_up: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Weighs each set by its share of the softmax's denominator; `top` is the largest `lse`."""
    base = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.exp(lse - base)
    total = add_up(weight)
    # A set without keys counts for nothing, whatever its rows hold; NaN stays.
    parts = jnp.where((weight == 0)[..., None], 0, weight[..., None] * o.astype(jnp.float32))
    merged = add_up(parts) / jnp.where(total == 0, 1, total)[..., None]
    return merged.astype(o.dtype), base + jnp.log(total)


def context_parallel_attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    cache: KVCache,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    page_indices: jax.Array,
    page_offsets: jax.Array,
    num_requests: jax.Array | int | None = None,
    *,
    axis_name: str,
    keys_per_device: int,
    **options: Any,
) -> Attention:
    """Attention whose keys are spread over a mesh axis, inside `shard_map`.

    Device d of the axis holds keys [d * keys_per_device, (d + 1) * keys_per_device) of every
    request, in its own cache and pages; queries, new rows and lengths are the same on all.

    Args:
      q, k, v, cu_q_lens, num_requests: as `ragged_paged_attention`, replicated.
      cache, page_indices, page_offsets: this device's.
      kv_lens: [requests] int32 tokens of each request on all devices together.
      axis_name: the mesh axis.
      keys_per_device: how many keys of a request a device holds.
      **options: as `ragged_paged_attention`, but for sinks, query_starts and return_lse.

    Returns:
      An `Attention` with lse; o and lse are replicated, the cache is this device's.

    Raises:
      ArgumentError, UnsupportedError: as there.
    """
    checks.check_type(_WHERE, "keys_per_device", keys_per_device, int)
    checks.check_range(_WHERE, "keys_per_device", keys_per_device, low=1)
    for name, why in _NOT_SPREAD.items():
        if options.get(name) is not None:
            refuse(name, "is given", "nothing", why)
    dims = checks.Dims(_WHERE)
    dims.bind("q", q, "tokens _ _")
    dims.bind("kv_lens", kv_lens, "requests")
    dims.bind("cu_q_lens", cu_q_lens, "requests+1")
    bounds = lax.cummax(jnp.clip(cu_q_lens, 0, q.shape[0]))
    before = lax.axis_index(axis_name) * keys_per_device
    starts = kv_lens - (bounds[1:] - bounds[:-1]) - before
    here = ragged_paged_attention(
        q, k, v, cache, jnp.clip(kv_lens - before, 0, keys_per_device), cu_q_lens, page_indices,
        page_offsets, num_requests, query_starts=starts, **options,
        return_lse=True,
    )  # fmt: skip
    lse = cast(jax.Array, here.lse)
    o, lse = _merged(here.o, lse, lax.pmax(lse, axis_name), lambda x: lax.psum(x, axis_name))
    return Attention(o, here.cache, lse)


def from_interleaved(pages: jax.Array, kv_heads: int, key_dim: int) -> KVCache:
    """A cache from the layout of tpu-inference's RPA v3 and SGLang-JAX's.

    Args:
      pages: [pages, page_size, 2 * kv_heads / packing rounded up, packing, dim rounded up to 128]:
        keys and values of a head one after another, packed into the words of the type.
      kv_heads: heads there are.
      key_dim: width of keys and of values.

    Raises:
      ArgumentError: the pages are not of such heads.
    """
    checks.check_type(_WHERE, "kv_heads", kv_heads, int)
    checks.check_type(_WHERE, "key_dim", key_dim, int)
    dims = checks.Dims("from_interleaved")
    dims.bind("pages", pages, "_ page_size _ _ _")
    dtype = jnp.dtype(pages.dtype).name
    layout = CacheLayout(kv_heads, key_dim, key_dim, dtype, dims["page_size"])
    check_layout(layout)
    num_pages, page_size, rows, packing, width = pages.shape
    wanted = (-(-2 * kv_heads // layout.pack), layout.pack, round_up(key_dim, LANES))
    if (rows, packing, width) != wanted:
        refuse(
            "pages",
            f"has shape {pages.shape}",
            f"{wanted} behind its pages for {kv_heads} heads of {key_dim} {dtype}",
        )
    flat = pages.reshape(num_pages, page_size, rows * packing, width)
    flat = flat[:, :, : 2 * kv_heads, :key_dim]
    return pack_pages(flat[:, :, 0::2], flat[:, :, 1::2], layout)


def to_interleaved(cache: KVCache) -> jax.Array:
    """The inverse of `from_interleaved`; padding is 0.

    Raises:
      ArgumentError: keys and values are not as wide as each other, or are the same lanes.
    """
    check_cache(cache)
    layout = cache.layout
    if layout.latent or layout.key_dim != layout.value_dim:
        refuse("cache", f"has layout {layout}", "keys and values of one width beside each other")
    keys, values = cache.unpack()
    both = jnp.stack([keys, values], axis=3)
    both = both.reshape(*keys.shape[:2], 2 * layout.kv_heads, layout.key_dim)
    heads = -2 * layout.kv_heads % layout.pack
    lanes = round_up(layout.key_dim, LANES) - layout.key_dim
    both = jnp.pad(both, ((0, 0), (0, 0), (0, heads), (0, lanes)))
    return both.reshape(*both.shape[:2], -1, layout.pack, both.shape[-1])
