"""Paged attention over a ragged batch, specified: what is written, who sees whom, what comes out.

A batch holds requests. Request r owns the query tokens [cu_q_lens[r], cu_q_lens[r + 1]), which are
the last of its kv_lens[r] tokens: query i has position kv_len - q_len + i, unless query_starts says
otherwise. Key j of the request is
in page page_indices[page_offsets[r] + j // page_size], row j % page_size. New keys and values are
written to their pages first; then, per query head,

    s_j = logit_scale * (q . k_j)             soft cap: s_j = cap * tanh(s_j / cap)
    w_j = exp(s_j - max s) over visible j     rounded to bf16, unless q or the cache are f32
    o   = value_scale * sum_j w_j v_j / (sum_j w_j + exp(sink - max s))

Sources: PagedAttention (arXiv 2309.06180), Ragged Paged Attention (arXiv 2604.15464),
FlashAttention (arXiv 2205.14135), attention sinks (arXiv 2309.17453), multi-head latent attention
(arXiv 2405.04434).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MAX_KV_LEN = 2**30  # longer requests are cut
TREE_TOKENS = 64  # a request of at most so many query tokens may have a tree mask
QUERIES, KEYS = 16, 256  # query tokens and keys that are computed together


class Batch(NamedTuple):
    """A ragged batch; R requests, T tokens.

    Attributes:
      kv_lens: [R] int32 tokens of each request, the new ones included.
      cu_q_lens: [R + 1] int32 bounds of the requests' query tokens.
      page_indices: [N] int32 pages of all requests, one after another.
      page_offsets: [R + 1] int32 where each request's pages begin.
      num_requests: [] int32 how many of the R count.
      query_starts: [R] int32 position of each request's first query token, or None. Where keys are
        spread over devices, positions count from the first key of this one: query tokens may be
        before its keys (negative positions) or behind them. Keys behind the last one do not count.
    """

    kv_lens: jax.Array
    cu_q_lens: jax.Array
    page_indices: jax.Array
    page_offsets: jax.Array
    num_requests: jax.Array
    query_starts: jax.Array | None = None


class Masks(NamedTuple):
    """Who sees whom, beyond position < kv_len.

    Attributes:
      causal: a query sees no later position.
      window: [R] int32 or None; a query at p sees positions above p - window; 0 is no window.
      ancestors: [T, 2] uint32 or None: query tokens of the same request that a token sees, as bits
        (low word first), for requests of at most 64 tokens; earlier positions are visible.
    """

    causal: bool = True
    window: jax.Array | None = None
    ancestors: jax.Array | None = None


class Tokens(NamedTuple):
    """What each query token is; [T] each."""

    request: jax.Array  # its request, or R
    position: jax.Array  # its position in the request
    first: jax.Array  # position of the request's first query token
    kv_len: jax.Array  # 0 where the token belongs to no request
    q_len: jax.Array


def tokens_of(batch: Batch, num_tokens: int) -> Tokens:
    """Finds each token's request. Bounds are made monotone and clipped to the tokens there are."""
    requests = batch.kv_lens.shape[0]
    count = jnp.clip(batch.num_requests, 0, requests)
    cu = lax.cummax(jnp.clip(batch.cu_q_lens, 0, num_tokens))
    token = jnp.arange(num_tokens)
    owner = jnp.searchsorted(cu, token, side="right") - 1
    valid = (owner >= 0) & (owner < count) if requests else jnp.zeros(num_tokens, bool)
    owner = jnp.where(valid, owner, requests)

    def of(values: jax.Array) -> jax.Array:
        padded = jnp.concatenate([values, jnp.zeros(1, values.dtype)])
        return padded[owner]

    kv_len, begin, q_len = (
        of(jnp.clip(batch.kv_lens, 0, MAX_KV_LEN)),
        of(cu[:-1]),
        of(cu[1:] - cu[:-1]),
    )
    first = kv_len - q_len
    if batch.query_starts is not None:
        first = of(batch.query_starts)
        kv_len = jnp.clip(kv_len, 0, jnp.maximum(first + q_len, 0))
    return Tokens(owner, first + token - begin, first, kv_len, q_len)


def listed_only(tokens: Tokens, batch: Batch, page_size: int) -> Tokens:
    """The tokens with only such keys as have a listed page."""
    bounds = jnp.clip(batch.page_offsets, 0, batch.page_indices.shape[0])
    listed = jnp.maximum(bounds[1:] - bounds[:-1], 0) * page_size
    listed = jnp.concatenate([listed, jnp.zeros(1, listed.dtype)])[tokens.request]
    return tokens._replace(kv_len=jnp.minimum(tokens.kv_len, listed))


def page_of(batch: Batch, request: jax.Array, position: jax.Array, page_size: int) -> jax.Array:
    """The page of a request's position, -1 where none is listed."""
    if not batch.page_indices.shape[0]:
        return jnp.full(jnp.broadcast_shapes(request.shape, position.shape), -1)
    place = batch.page_offsets[request] + position // page_size
    listed = (position >= 0) & (place >= 0) & (place < batch.page_offsets[request + 1])
    listed &= place < batch.page_indices.shape[0]
    return jnp.where(listed, batch.page_indices[jnp.where(listed, place, 0)], -1)


def quantise(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """Values / scale in the type of a cache, within its range.

    Args:
      x: [T, heads, dim].
      scale: [], [heads] or [T, heads] f32.
      dtype: of the cache.
    """
    dividing = x.astype(jnp.float32) / (scale[..., None] if np.ndim(scale) else scale)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return jnp.clip(jnp.round(dividing), info.min, info.max).astype(dtype)
    if jnp.dtype(dtype).itemsize == 1:
        top = float(jnp.finfo(dtype).max)
        return jnp.clip(dividing, -top, top).astype(dtype)
    return dividing.astype(dtype)


def place_of(batch: Batch, num_tokens: int, num_pages: int, page_size: int) -> jax.Array:
    """The row page * page_size + i of the pool where each new token is written.

    Returns:
      [T] int32; num_pages * page_size for tokens of no request, before position 0 or behind the
      keys, or whose page is not in the pool or not listed: these are not written.
    """
    tokens = tokens_of(batch, num_tokens)
    requests = batch.kv_lens.shape[0]
    nowhere = num_pages * page_size
    if not requests:
        return jnp.full(num_tokens, nowhere, jnp.int32)
    page = page_of(batch, jnp.minimum(tokens.request, requests - 1), tokens.position, page_size)
    legal = (tokens.request < requests) & (page >= 0) & (page < num_pages)
    legal &= tokens.position < tokens.kv_len
    return jnp.where(legal, page * page_size + tokens.position % page_size, nowhere)


def write(pages: jax.Array, new: jax.Array, batch: Batch) -> jax.Array:
    """Writes new rows where their tokens' positions are; see `place_of`.

    Args:
      pages: [pages, page_size, heads, dim].
      new: [T, heads, dim] of the same type.
      batch: the requests.
    """
    place = place_of(batch, new.shape[0], *pages.shape[:2])
    rows = pages.reshape(-1, *pages.shape[2:])
    return rows.at[place].set(new, mode="drop").reshape(pages.shape)


def visible(tokens: Tokens, key: jax.Array, masks: Masks) -> jax.Array:
    """[B, L] whether tokens (fields and ancestors [B, ..]) see the keys at positions `key` [L]."""
    request, position, first, kv_len, q_len = (field[:, None] for field in tokens)
    del request
    before = key <= position
    if masks.ancestors is not None:
        draft = key - first
        word = jnp.where(draft < 32, masks.ancestors[:, :1], masks.ancestors[:, 1:])
        bit = (word >> (draft & 31).astype(jnp.uint32)) & 1
        before = jnp.where(q_len <= TREE_TOKENS, (draft < 0) | (bit == 1), before)
    seen = (key < kv_len) & (position >= 0) & (before | jnp.logical_not(masks.causal))
    if masks.window is not None:
        window = masks.window[:, None]
        seen &= (window <= 0) | (key > position - window)
    return seen


class Block(NamedTuple):
    """Query tokens that are computed together, of any requests."""

    q: jax.Array  # [B, kv_heads, group, key_dim] f32
    tokens: Tokens  # fields [B]
    ancestors: jax.Array | None  # [B, 2]
    window: jax.Array | None  # [B]


class Keys(NamedTuple):
    """Where keys and values are, and what is done to them; as in `attend`."""

    k_pages: jax.Array
    v_pages: jax.Array
    batch: Batch
    causal: bool
    logit_scale: jax.Array
    soft_cap: float | None
    k_scales: jax.Array | None
    v_scales: jax.Array | None

    def rows(self, pages: jax.Array, scales: Any, request: jax.Array, key: jax.Array) -> jax.Array:
        """[L, heads, dim] f32 of a request's positions; zeros where a page is not in the pool."""
        num_pages, page_size = pages.shape[:2]
        page = page_of(self.batch, request, key, page_size)
        legal = (page >= 0) & (page < num_pages)
        place = jnp.where(legal, page, 0), key % page_size
        found = pages[place].astype(jnp.float32)
        found *= 1 if scales is None else scales[place][..., None]
        return jnp.where(legal[:, None, None], found, 0)

    def logits(self, block: Block, request: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        """[B, kv_heads, group, L], -inf where a token does not see a key, and [B, L] who does."""
        seen = visible(block.tokens, key, Masks(self.causal, block.window, block.ancestors))
        seen &= (block.tokens.request == request)[:, None]
        k = self.rows(self.k_pages, self.k_scales, request, key)
        s = jnp.einsum("bhgd,lhd->bhgl", block.q, k, precision="highest")
        s *= self.logit_scale[:, None, None]
        if self.soft_cap is not None:
            s = self.soft_cap * jnp.tanh(s / self.soft_cap)
        return jnp.where(seen[:, None, None], s, -jnp.inf), seen

    def fold(self, tokens: Tokens, step: Callable[..., Any], start: Any) -> Any:
        """step(request, key [KEYS], so far) for all keys of all requests of some tokens."""

        def keys(r: jax.Array, i: jax.Array, so_far: Any) -> Any:
            return step(r, i * KEYS + jnp.arange(KEYS), so_far)

        def request(r: jax.Array, so_far: Any) -> Any:
            end = jnp.max(jnp.where(tokens.request == r, tokens.kv_len, 0))
            return lax.fori_loop(0, (end + KEYS - 1) // KEYS, functools.partial(keys, r), so_far)

        there = tokens.request < self.batch.kv_lens.shape[0]
        last = jnp.max(jnp.where(there, tokens.request, -1))
        return lax.fori_loop(jnp.min(tokens.request), last + 1, request, start)


@functools.partial(jax.jit, static_argnames="rounded")
def attend_blocks(keys: Keys, sinks: jax.Array, blocks: Block, rounded: Any) -> tuple[Any, Any]:
    """Outputs and logarithms of all blocks, f32, as `attend`; sinks [kv_heads, group]."""
    return lax.map(functools.partial(attend_block, keys, sinks, rounded), blocks)


def attend_block(keys: Keys, sinks: jax.Array, rounded: Any, block: Block) -> tuple[Any, Any]:
    """One of the blocks.

    Once through all keys for the largest logit, then again for the weights and their sums.
    """

    def largest(request: jax.Array, key: jax.Array, top: jax.Array) -> jax.Array:
        return jnp.maximum(top, keys.logits(block, request, key)[0].max(axis=-1))

    def sums(request: jax.Array, key: jax.Array, so_far: Any) -> Any:
        s, seen = keys.logits(block, request, key)
        weight = jnp.exp(s - base[..., None]).astype(rounded).astype(jnp.float32)
        v, (total, o) = keys.rows(keys.v_pages, keys.v_scales, request, key), so_far
        finite = jnp.isfinite(v)  # others are NaN to those who see them, and not 0 * NaN to all
        o += jnp.einsum("bhgl,lhd->bhgd", weight, jnp.where(finite, v, 0), precision="highest")
        bad = jnp.einsum("bl,lhd->bhd", seen.astype(jnp.float32), (~finite).astype(jnp.float32))
        return total + weight.sum(axis=-1), jnp.where(bad[:, :, None] > 0, jnp.nan, o)

    given = jax.tree.leaves((block, keys._replace(causal=None, soft_cap=None)))
    zero = varying(jnp.zeros(block.q.shape[:3]), *given, sinks)
    top = keys.fold(block.tokens, largest, zero + sinks)
    base = jnp.where(jnp.isneginf(top), 0, top)
    start = jnp.exp(sinks - base), zero[..., None] + jnp.zeros(keys.v_pages.shape[-1])
    total, o = keys.fold(block.tokens, sums, start)
    o = jnp.where(total[..., None] > 0, o / total[..., None], jnp.where(jnp.isnan(o), o, 0))
    return o, base + jnp.log(total)


def varying(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Lets x differ between the devices of a mesh wherever one of the others does."""
    axes = [jax.typeof(other).manual_axis_type.varying for other in others]
    missing = tuple(frozenset().union(*axes))
    return lax.pcast(x, missing, to="varying") if missing else x


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    batch: Batch,
    masks: Masks,
    *,
    logit_scale: jax.Array,
    value_scale: jax.Array,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of every query token over its request's keys.

    Args:
      q: [T, q_heads, key_dim]; head h uses key/value head h * kv_heads // q_heads.
      k_pages: [pages, page_size, kv_heads, key_dim]; a page that is not in the pool reads as zeros.
      v_pages: [pages, page_size, kv_heads, value_dim].
      batch: the requests.
      masks: who sees whom.
      logit_scale, value_scale: [kv_heads] f32.
      soft_cap: limit of the logits.
      sinks: [q_heads] f32 logits that take part in the softmax and have no value.
      k_scales, v_scales: [pages, page_size, kv_heads] f32 of each row of the pages, or None.

    Returns:
      o [T, q_heads, value_dim] in the type of q, 0 where nothing is visible, and the logarithm of
      the softmax's denominator [T, q_heads] f32, -inf where it is 0. A key or value that is not
      finite makes NaN of the queries that see it.
    """
    num_tokens, q_heads, _ = q.shape
    num_pages, page_size, kv_heads, value_dim = v_pages.shape
    tokens = listed_only(tokens_of(batch, num_tokens), batch, page_size)
    requests = batch.kv_lens.shape[0]
    if sinks is None:
        sinks = jnp.full(q_heads, -jnp.inf)
    sinks = sinks.astype(jnp.float32)
    if not (num_tokens and requests and num_pages and batch.page_indices.shape[0]):
        o = jnp.zeros((num_tokens, q_heads, value_dim), q.dtype)
        return o, jnp.broadcast_to(sinks, (num_tokens, q_heads))
    rounded = jnp.float32 if jnp.float32 in (q.dtype, k_pages.dtype) else jnp.bfloat16
    keys = Keys(k_pages, v_pages, batch, masks.causal, logit_scale, soft_cap, k_scales, v_scales)
    sinks = sinks.reshape(kv_heads, -1)
    window = masks.window
    if window is not None:
        window = jnp.concatenate([window, jnp.zeros(1, window.dtype)])[tokens.request]
    q32 = q.reshape(num_tokens, *sinks.shape, -1).astype(jnp.float32)
    missing = -num_tokens % QUERIES

    def split(x: jax.Array, filler: int = 0) -> jax.Array:
        padded = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), constant_values=filler)
        return padded.reshape(-1, QUERIES, *x.shape[1:])

    blocks = jax.tree.map(split, Block(q32, tokens, masks.ancestors, window))
    blocks = blocks._replace(tokens=Tokens(*map(split, tokens, (requests, 0, 0, 0, 0))))
    o, lse = attend_blocks(keys, sinks, blocks, rounded)
    o = (o * value_scale[:, None, None]).reshape(-1, q_heads, value_dim).astype(q.dtype)
    return o[:num_tokens], lse.reshape(-1, q_heads)[:num_tokens]
