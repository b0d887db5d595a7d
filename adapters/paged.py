"""Paged attention as both stacks call it: their caches, scales and masks in this library's terms.

A cache is this library's own (`new_kv_cache`, `new_mla_cache`), or an array as a stack has it. An
array is converted before the call and back after it: all pages are read and written twice, which is
for trying things out, not for serving.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import ragged_attention
from adapters.refusals import refuse
from ragged_attention import CacheLayout, KVCache
from ragged_attention.layout import LANES, round_up
from tpukit import checks

TREE_TOKENS = 64


def new_kv_cache(
    total_num_pages: int,
    page_size: int,
    actual_num_kv_heads: int,
    actual_head_dim: int,
    kv_dtype: Any,
) -> KVCache:
    """An empty cache of keys and values, instead of zeros of the stack's `get_kv_cache_shape`.

    Raises:
      ArgumentError: as `ragged_attention.allocate_kv_cache`.
    """
    return ragged_attention.allocate_kv_cache(
        total_num_pages, page_size, actual_num_kv_heads, actual_head_dim, dtype=kv_dtype
    )


def new_mla_cache(
    total_num_pages: int, page_size: int, lkv_dim: int, r_dim: int, kv_dtype: Any
) -> KVCache:
    """An empty cache of latents, instead of zeros of the stack's `get_kv_cache_shape`.

    Args:
      total_num_pages: pages of the pool.
      page_size: tokens of a page.
      lkv_dim: width of a latent, such as 512.
      r_dim: width of the rotated key, such as 64.
      kv_dtype: of both.

    Raises:
      ArgumentError: as `ragged_attention.allocate_mla_cache`.
    """
    return ragged_attention.allocate_mla_cache(
        total_num_pages, page_size, lkv_dim, r_dim, dtype=kv_dtype
    )


@dataclasses.dataclass(frozen=True)
class Requests:
    """A ragged batch, as both stacks describe it.

    Attributes:
      kv_lens: [requests] int32 tokens of each request, the new ones included.
      cu_q_lens: [requests + 1] int32 bounds of query tokens.
      pages: `page_indices`, int32, flat. tpu-inference: [requests * pages_per_seq], a rectangular
        table. SGLang-JAX: pages of all requests, one after another, tight.
      distribution: [3] int32, of which only the last, the number of requests, is needed here:
        requests that decode and that prefill come in any order.
      starts: SGLang-JAX's `cu_kv_lens`, [requests + 1] int32 sums of kv_lens, each rounded up to
        whole pages.
    """

    kv_lens: jax.Array
    cu_q_lens: jax.Array
    pages: jax.Array
    distribution: jax.Array
    starts: jax.Array | None = None

    def arguments(self, where: str, page_size: int) -> dict[str, Any]:
        """What `ragged_attention` wants to know.

        Raises:
          ArgumentError: the shapes do not agree.
        """
        dims = checks.Dims(where)
        dims.bind("kv_lens", self.kv_lens, "requests")
        dims.bind("cu_q_lens", self.cu_q_lens, "requests+1")
        dims.bind("page_indices", self.pages, "_")
        dims.bind("distribution", self.distribution, "3")
        found = {"kv_lens": self.kv_lens, "cu_q_lens": self.cu_q_lens}
        found["num_requests"] = self.distribution[2]
        if self.starts is not None:
            dims.bind("cu_kv_lens", self.starts, "requests+1")
            return found | {
                "page_indices": self.pages,
                "page_offsets": (self.starts + page_size - 1) // page_size,
            }
        requests = dims["requests"]
        advice = "The page table is rectangular."
        checks.check_multiple(where, "page_indices", self.pages.size, max(requests, 1), advice)
        return found | {"page_indices": self.pages.reshape(requests, -1 if requests else 0)}


def attend(
    where: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache | jax.Array,
    requests: Requests,
    *,
    update: bool = True,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    out_dtype: Any = None,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """Grouped-query attention. New keys and values are in the cache's type, divided by the scales.

    Args:
      where: the public function, for errors.
      q: [tokens, q_heads, dim].
      k, v: [tokens, kv_heads, dim].
      cache: ours, or [pages, page_size, 2 * kv_heads / packing, packing, dim up to 128s].
      requests: the batch.
      update: whether k and v are written; else the cache has them.
      q_scale: queries are divided by it, rounded to the cache's type and multiplied by it.
      k_scale, v_scale: of what the cache holds.
      out_dtype: of the result; float32 where q is, else bfloat16, by default.
      **options: of `ragged_attention.ragged_paged_attention`.

    Returns:
      [tokens, q_heads, dim] and the cache, as it was given.

    Raises:
      ArgumentError, UnsupportedError: as there.
    """
    dims = checks.Dims(where)
    dims.bind("queries", q, "tokens _ dim")
    dims.bind("keys", k, "tokens kv_heads dim")
    dims.bind("values", v, "tokens kv_heads dim")
    if isinstance(cache, KVCache):
        pool = cache
    else:
        checks.check_array(where, "kv_cache", cache)
        pool = ragged_attention.from_interleaved(cache, dims["kv_heads"], dims["dim"])
    check_new_rows(where, pool.layout, keys=k, values=v)
    if q_scale is not None:
        top = float(jnp.finfo(pool.layout.dtype).max)
        q = jnp.clip(q / q_scale, -top, top).astype(pool.layout.dtype).astype(q.dtype)
    if (sinks := options.get("sinks")) is not None:
        options["sinks"] = jnp.broadcast_to(jnp.asarray(sinks, jnp.float32), q.shape[1:2])
    if v_scale is not None:  # divided by again, exactly, as it is written
        v = v.astype(jnp.float32) * v_scale
    found = ragged_attention.ragged_paged_attention(
        q,
        k if update else None,
        v if update else None,
        pool,
        **requests.arguments(where, pool.layout.page_size),
        q_scale=product(q_scale, k_scale),
        v_scale=v_scale,
        **options,
    )
    out_dtype = out_dtype or (jnp.float32 if q.dtype == jnp.float32 else jnp.bfloat16)
    after = found.cache
    if not isinstance(cache, KVCache):
        after = ragged_attention.to_interleaved(after) if update else cache
    return found.o.astype(out_dtype), after


def attend_latent(
    where: str,
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    rope: jax.Array,
    cache: KVCache | jax.Array,
    requests: Requests,
    *,
    transposed: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """Multi-head latent attention. New rows are in the cache's type, divided by their scale.

    Args:
      where: the public function, for errors.
      q_latent: [tokens, heads, rank].
      q_rope: [tokens, heads, rope_dim].
      latent: [tokens, rank].
      rope: [tokens, rope_dim].
      cache: ours, or as `latents_of`.
      requests: the batch.
      transposed: of a cache that is not ours, tokens of a page are its last dimension.
      q_scale, k_scale: of the logits.
      v_scale: of the result.
      **options: of `ragged_attention.mla_ragged_paged_attention`.

    Returns:
      [tokens, heads, rank] in the dtype of q_latent and the cache, as it was given.

    Raises:
      ArgumentError, UnsupportedError: as there.
    """
    dims = checks.Dims(where)
    dims.bind("new_kv_c", latent, "tokens rank")
    dims.bind("new_k_pe", rope, "tokens rope_dim")
    widths = dims["rank"], dims["rope_dim"]
    pool = cache if isinstance(cache, KVCache) else latents_of(where, cache, *widths, transposed)
    check_new_rows(where, pool.layout, new_kv_c=latent, new_k_pe=rope)
    wide = q_latent.dtype if q_latent.dtype == jnp.float32 else jnp.bfloat16
    found = ragged_attention.mla_ragged_paged_attention(
        q_latent.astype(wide),
        q_rope.astype(wide),
        latent,
        rope,
        pool,
        **requests.arguments(where, pool.layout.page_size),
        q_scale=product(q_scale, k_scale),
        v_scale=v_scale,
        **options,
    )
    after = found.cache
    if not isinstance(cache, KVCache):
        after = pages_of(after, cache.shape, transposed)
    return found.o.astype(q_latent.dtype), after


def check_new_rows(where: str, layout: CacheLayout, **rows: jax.Array) -> None:
    """Raises an `ArgumentError` unless new rows have the type of the cache, as the stacks demand.

    Raises:
      ArgumentError: they have not.
    """
    for name, x in rows.items():
        if x.dtype.name != layout.dtype:
            advice = "Divide by the scale and cast before the call."
            refuse(where, name, f"has dtype {x.dtype.name}", f"{layout.dtype}, the cache's", advice)


def product(*scales: float | None) -> float | None:
    """Of the scales that are given, None where none is."""
    found = None
    for scale in scales:
        if scale is not None:
            found = scale if found is None else found * scale
    return found


def latents_of(where: str, pages: jax.Array, rank: int, rope_dim: int, transposed: bool) -> KVCache:
    """A cache of ours from a stack's cache of latents.

    Args:
      where: the public function, for errors.
      pages: [pages, page_size / packing, packing, lanes], or, transposed, [pages, lanes,
        page_size]. A token has its latent in the first lanes and its rotated key in those that
        begin at the next multiple of 128: 512 + 64 of 640.
      rank: width of a latent.
      rope_dim: width of a rotated key.
      transposed: whether lanes are the middle dimension.

    Raises:
      ArgumentError: they are not of such latents.
    """
    dims = checks.Dims(where)
    dims.bind("cache_kv", pages, "pages lanes page_size" if transposed else "pages _ _ lanes")
    flat = (pages.shape[0], -1, dims["lanes"])
    rows = pages.swapaxes(1, 2) if transposed else pages.reshape(flat)
    begin = round_up(rank, LANES)
    if round_up(dims["lanes"], LANES) != begin + round_up(rope_dim, LANES):
        lanes = f"{begin + round_up(rope_dim, LANES)} lanes for {rank} and {rope_dim}"
        refuse(where, "cache_kv", f"has {dims['lanes']} lanes", lanes)
    dtype, size = pages.dtype.name, rows.shape[1]
    layout = CacheLayout(1, rank + rope_dim, rank, dtype, size, latent=True)
    keys = jnp.concatenate([rows[..., :rank], rows[..., begin : begin + rope_dim]], axis=-1)
    return ragged_attention.pack_pages(keys[:, :, None], None, layout)


def pages_of(cache: KVCache, shape: tuple[int, ...], transposed: bool) -> jax.Array:
    """The inverse of `latents_of`; padding is 0."""
    keys, rank = cache.unpack()[0][:, :, 0], cache.layout.value_dim
    lanes, begin = shape[1] if transposed else shape[-1], round_up(rank, LANES)
    rows = jnp.zeros((*keys.shape[:2], lanes), keys.dtype)
    rows = rows.at[..., :rank].set(keys[..., :rank])
    rows = rows.at[..., begin : begin + keys.shape[-1] - rank].set(keys[..., rank:])
    return rows.swapaxes(1, 2) if transposed else rows.reshape(shape)


def ancestors_of(
    mask: jax.Array, requests: Requests, widths: jax.Array, tokens: int
) -> tuple[jax.Array, jax.Array]:
    """The words of a flat mask of drafts, and for which tokens it is one.

    A mask of drafts lets a token see all keys before the query tokens of its request and, of those
    up to itself, any; of more than 64 query tokens, all.

    Args:
      mask: flat, 1 or True where a key is seen: a row of `widths` keys for every query token, of
        one request after another.
      requests: the batch.
      widths: [requests] int32.
      tokens: query tokens.

    Returns:
      [tokens, 2] uint32 and [tokens] bool; the latter is True for tokens of no request.
    """
    count = widths.shape[0]
    q_lens = requests.cu_q_lens[1:] - requests.cu_q_lens[:-1]
    blocks = q_lens * widths
    starts = jnp.cumsum(blocks) - blocks
    token = jnp.arange(tokens)
    owner = jnp.searchsorted(requests.cu_q_lens, token, side="right") - 1
    owned = (owner >= 0) & (owner < jnp.minimum(count, requests.distribution[2]))
    owner = jnp.clip(owner, 0, count - 1)
    row, q_len, kv_len = token - requests.cu_q_lens[owner], q_lens[owner], requests.kv_lens[owner]
    begin, before = starts[owner] + row * widths[owner], kv_len - q_len
    seen = (mask == 1).astype(jnp.int32)
    ones = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(seen)])

    def ones_among(first: jax.Array, length: jax.Array) -> jax.Array:
        bound = jnp.minimum(first + length, seen.shape[0])
        return ones[bound] - ones[jnp.minimum(first, seen.shape[0])]

    draft = jnp.arange(TREE_TOKENS)
    place = jnp.where(draft < q_len[:, None], (begin + before)[:, None] + draft, seen.shape[0])
    bits = seen.at[place].get(mode="fill", fill_value=0).astype(jnp.uint32)
    words = bits.reshape(tokens, 2, 32) << jnp.arange(32, dtype=jnp.uint32)
    words = lax.reduce_or(words, axes=(2,))
    behind = ones_among(begin + before + row + 1, q_len - row - 1)
    whole = ones_among(begin, before) == before
    causal = ones_among(begin, before + row + 1) == before + row + 1
    is_one = (behind == 0) & jnp.where(q_len <= TREE_TOKENS, whole, causal)
    return words, is_one | ~owned
