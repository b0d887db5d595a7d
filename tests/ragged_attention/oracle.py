"""An independent oracle in numpy float64, batch builders, and error bounds.

`exact` walks over requests and query tokens in plain loops, on the operands as they are stored. Its
second result bounds what rounding may do to each element.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import ragged_attention as ra

BF16 = ml_dtypes.bfloat16
pack_pages = jax.jit(ra.pack_pages, static_argnums=2)
unpack = jax.jit(lambda cache, layout: ra.KVCache(cache.words, layout).unpack(), static_argnums=1)


@dataclasses.dataclass
class Random:
    """A random batch and the pages its requests have; arrays are numpy."""

    q: np.ndarray
    k: np.ndarray | None
    v: np.ndarray | None
    k_pages: np.ndarray
    v_pages: np.ndarray
    layout: ra.CacheLayout
    kv_lens: np.ndarray
    cu: np.ndarray
    pages: np.ndarray
    offsets: np.ndarray
    options: dict[str, Any]

    @property
    def cache(self) -> ra.KVCache:
        """The pages as the kernel has them."""
        values = None if self.layout.latent else jnp.asarray(self.v_pages)
        return pack_pages(jnp.asarray(self.k_pages), values, self.layout)

    def args(self) -> tuple[Any, ...]:
        """Positional arguments of `ragged_paged_attention`."""
        new = (None if x is None else jnp.asarray(x) for x in (self.k, self.v))
        rest = (self.kv_lens, self.cu, self.pages, self.offsets)
        return (jnp.asarray(self.q), *new, self.cache, *map(jnp.asarray, rest))


def random_batch(  # noqa: PLR0913  (every shape has a default)
    seed: int,
    kv_lens: list[int],
    q_lens: list[int],
    *,
    q_heads: int = 4,
    kv_heads: int = 1,
    key_dim: int = 128,
    value_dim: int | None = None,
    cache: Any = BF16,
    dtype: Any = BF16,
    page_size: int = 16,
    latent: bool = False,
    num_pages: int = 40,
    tokens: int = 64,
    indices: int = 48,
    gap: int = 0,
    update: bool = True,
    **options: Any,
) -> Random:
    """Requests with pages in random order; shapes depend on none of the lengths."""
    rng = np.random.default_rng(seed)
    value_dim = key_dim if value_dim is None else value_dim
    layout = ra.CacheLayout(kv_heads, key_dim, value_dim, np.dtype(cache).name, page_size, latent)

    def draw(*shape: int, dtype: Any = dtype) -> np.ndarray:
        scale = 30 if np.dtype(dtype) == np.int8 else 1
        return (rng.standard_normal(shape) * scale).astype(dtype)

    counts = [-(-length // page_size) for length in kv_lens]
    offsets = np.cumsum([0, *counts]).astype(np.int32)
    pages = rng.permutation(num_pages)[: offsets[-1]].astype(np.int32)
    assert len(pages) == offsets[-1] <= indices
    assert gap + sum(q_lens) <= tokens
    k_pages = draw(num_pages, page_size, kv_heads, key_dim, dtype=cache)
    v_pages = (
        k_pages[..., :value_dim]
        if latent
        else draw(num_pages, page_size, kv_heads, value_dim, dtype=cache)
    )
    new = [draw(tokens, kv_heads, dim) for dim in (key_dim, value_dim)]
    return Random(
        q=draw(tokens, q_heads, key_dim),
        k=new[0] if update else None,
        v=new[1] if update and not latent else None,
        k_pages=k_pages,
        v_pages=v_pages,
        layout=layout,
        kv_lens=np.asarray(kv_lens, np.int32),
        cu=np.cumsum([gap, *q_lens]).astype(np.int32),
        pages=np.pad(pages, (0, indices - len(pages)), constant_values=-1),
        offsets=offsets,
        options=options,
    )


def quantised(x: np.ndarray, scale: Any, dtype: Any) -> np.ndarray:
    """New rows as the cache stores them."""
    x = x.astype(np.float32) / np.broadcast_to(np.float32(scale), x.shape[1])[:, None]
    if np.dtype(dtype) == np.int8:
        return np.clip(np.rint(x), -128, 127).astype(np.int8)
    if np.dtype(dtype).itemsize == 1:
        top = float(ml_dtypes.finfo(dtype).max)
        return np.clip(x, -top, top).astype(dtype)
    return x.astype(dtype)


def written_scale(batch: Random, name: str, place: tuple[int, int]) -> Any:
    """What a row of the pool is divided by as it is written."""
    scale = batch.options.get(name, 1.0)
    return scale[place] if np.ndim(scale) == 3 else scale


def head_scale(batch: Random, name: str) -> np.ndarray:
    """Scales of heads, 1 where rows have their own."""
    scale = batch.options.get(name, 1.0)
    scale = 1.0 if np.ndim(scale) == 3 else scale
    return np.broadcast_to(scale, batch.layout.kv_heads).astype(np.float64)


def written(batch: Random) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pages of keys and values after the write, and which rows of them belong to a request."""
    k_pages, v_pages = batch.k_pages.copy(), batch.v_pages.copy()
    live = np.zeros(k_pages.shape[:2], bool)
    size = batch.layout.page_size
    for r, kv_len in enumerate(batch.kv_lens):
        listed = batch.pages[batch.offsets[r] : batch.offsets[r + 1]]
        first = kv_len - (batch.cu[r + 1] - batch.cu[r])
        for position in range(kv_len):
            page = listed[position // size] if position // size < len(listed) else -1
            if not 0 <= page < len(k_pages):
                continue
            place = page, position % size
            live[place] = True
            if position < first or batch.k is None:
                continue
            row = batch.cu[r] + position - first
            dtype = batch.layout.dtype
            key = quantised(batch.k[row : row + 1], written_scale(batch, "k_scale", place), dtype)
            k_pages[place] = key[0]
            if batch.layout.latent:
                v_pages[place] = key[0][:, : batch.layout.value_dim]
            else:
                scale = written_scale(batch, "v_scale", place)
                value = quantised(batch.v[row : row + 1], scale, dtype)
                v_pages[place] = value[0]
    return k_pages, v_pages, live


def sees(batch: Random, r: int, position: int, key: np.ndarray) -> np.ndarray:
    """Which keys the query at a position of request r sees."""
    options, q_len = batch.options, batch.cu[r + 1] - batch.cu[r]
    first = batch.kv_lens[r] - q_len
    seen = key >= 0
    if options.get("causal", True):
        seen = key <= position
        if options.get("ancestors") is not None and q_len <= 64:
            words = np.asarray(options["ancestors"])[batch.cu[r] + position - first]
            words = int(words[0]) | (int(words[1]) << 32 if len(words) > 1 else 0)
            bits = np.array([j < first or bool(words >> int(j - first) & 1) for j in key], bool)
            seen = bits
    window = options.get("window")
    if window is not None:
        window = int(np.broadcast_to(window, batch.kv_lens.shape)[r])
        if window > 0:
            seen &= key > position - window
    return seen


def scale_of(batch: Random, token: int, head: int, kv_head: int, position: int) -> float:
    """What a query's products are multiplied by."""
    options = batch.options
    q_scale = np.asarray(options.get("q_scale", 1.0), np.float64)
    if q_scale.ndim == 2:
        q_scale = np.broadcast_to(q_scale, batch.q.shape[:2])[token]
    q_scale = np.broadcast_to(q_scale, batch.q.shape[1])[head]
    k_scale = head_scale(batch, "k_scale")[kv_head]
    scale = options.get("sm_scale", batch.q.shape[2] ** -0.5) * float(q_scale) * float(k_scale)
    limit = options.get("temperature_len")
    if limit is not None and position > limit:
        scale *= np.log(position) / np.log(limit)
    return scale


def gathered(batch: Random, r: int, pages: np.ndarray) -> np.ndarray:
    """Rows of a request in order; zeros where its page is not in the pool."""
    rows = np.zeros((batch.kv_lens[r], *pages.shape[2:]))
    listed = batch.pages[batch.offsets[r] : batch.offsets[r + 1]]
    for j in range(len(rows)):
        place, row = divmod(j, batch.layout.page_size)
        if place < len(listed) and 0 <= listed[place] < len(pages):
            rows[j] = pages[listed[place], row].astype(np.float64)
    return rows


def softmax(logits: np.ndarray, sink: float) -> tuple[np.ndarray, float]:
    """Weights that sum to 1 with the sink's, and the logarithm of the denominator."""
    top = max(logits.max(initial=-np.inf), sink)
    if np.isneginf(top):
        return np.zeros_like(logits), -np.inf
    w = np.exp(logits - top)
    total = w.sum() + np.exp(sink - top)
    return w / total, top + np.log(total)


def exact(batch: Random) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """o [T, q_heads, value_dim], lse [T, q_heads], and per element sum_j w_j |v_j|."""
    layout, options = batch.layout, batch.options
    k_pages, v_pages, _ = written(batch)
    tokens, heads, _ = batch.q.shape
    sinks = np.broadcast_to(options.get("sinks", -np.inf), heads).astype(np.float64)
    o = np.zeros((tokens, heads, layout.value_dim))
    size, lse = np.zeros_like(o), np.tile(sinks, (tokens, 1))
    v_scale = head_scale(batch, "v_scale")
    owned = [(r, t) for r in range(len(batch.kv_lens)) for t in range(batch.cu[r], batch.cu[r + 1])]
    rows = {r: [gathered(batch, r, pages) for pages in (k_pages, v_pages)] for r, _ in owned}
    for r, found in rows.items():
        for i, name in enumerate(("k_scale", "v_scale")):
            if np.ndim(options.get(name, 1.0)) == 3:
                found[i] *= gathered(batch, r, options[name])[..., None]
    for r, t in owned:
        keys, values = rows[r]
        position = batch.kv_lens[r] - batch.cu[r + 1] + t
        if position < 0:
            continue
        listed = (batch.offsets[r + 1] - batch.offsets[r]) * layout.page_size
        seen = sees(batch, r, position, np.arange(batch.kv_lens[r]))
        seen &= np.arange(batch.kv_lens[r]) < listed
        for h in range(heads):
            kv = h * layout.kv_heads // heads
            s = keys[:, kv] @ batch.q[t, h].astype(np.float64)
            s *= scale_of(batch, t, h, kv, position)
            if (cap := options.get("soft_cap")) is not None:
                s = cap * np.tanh(s / cap)
            w, lse[t, h] = softmax(np.where(seen, s, -np.inf), sinks[h])
            o[t, h] = w[seen] @ values[seen, kv] * v_scale[kv]
            size[t, h] = w[seen] @ np.abs(values[seen, kv]) * abs(v_scale[kv])
    return o, lse, size


def covered(batch: Random) -> np.ndarray:
    """Which query tokens belong to a request."""
    token = np.arange(len(batch.q))
    return (token >= batch.cu[0]) & (token < batch.cu[-1])


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays are the same, bit for bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
