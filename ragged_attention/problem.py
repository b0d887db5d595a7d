"""What a call asks for: its arguments, checked, and brought to one form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ragged_attention.layout import CacheLayout, KVCache
from ragged_attention.plan import CACHE_DTYPES, DTYPES, PAGE_SIZES, Problem
from ragged_attention.schedule import GROUP_ROWS
from reference import ragged_attention as reference
from tpukit import checks
from tpukit.errors import ArgumentError

WHERE = "ragged_attention"


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of `ragged_paged_attention`, under their names."""

    q: Any
    k: Any
    v: Any
    cache: KVCache
    kv_lens: Any
    cu_q_lens: Any
    page_indices: Any
    page_offsets: Any = None
    num_requests: Any = None
    causal: bool = True
    window: Any = None
    ancestors: Any = None
    sinks: Any = None
    soft_cap: float | None = None
    sm_scale: float | None = None
    q_scale: Any = None
    k_scale: Any = None
    v_scale: Any = None
    temperature_len: int | None = None
    query_starts: Any = None
    return_lse: bool = False

    def batch(self) -> reference.Batch:
        """The ragged batch; a page table becomes a list with offsets."""
        indices, offsets = self.page_indices, self.page_offsets
        if offsets is None:
            requests, width = indices.shape
            indices = indices.reshape(-1)
            offsets = jnp.arange(requests + 1, dtype=jnp.int32) * width
        count = self.kv_lens.shape[0] if self.num_requests is None else self.num_requests
        count = jnp.asarray(count, jnp.int32).reshape(())
        return reference.Batch(
            self.kv_lens, self.cu_q_lens, indices, offsets, count, self.query_starts
        )

    def windows(self) -> jax.Array | None:
        """[requests] int32."""
        if self.window is None:
            return None
        return jnp.broadcast_to(jnp.asarray(self.window, jnp.int32), self.kv_lens.shape)

    def words(self) -> jax.Array | None:
        """[tokens, 2] words of ancestors."""
        if self.ancestors is None:
            return None
        missing = 2 - self.ancestors.shape[1]
        return jnp.pad(self.ancestors, ((0, 0), (0, missing)))

    def scaled_queries(self, batch: reference.Batch) -> tuple[jax.Array, jax.Array]:
        """Queries times what scales heads or tokens have, and [2, kv_heads] all other scales."""
        heads, one = self.cache.layout.kv_heads, jnp.float32(1)
        scale = self.q.shape[2] ** -0.5 if self.sm_scale is None else self.sm_scale
        factors = []
        if self.q_scale is not None and np.ndim(self.q_scale):
            factors.append(jnp.asarray(self.q_scale, jnp.float32)[..., None])
        elif self.q_scale is not None:
            one = jnp.asarray(self.q_scale, jnp.float32)
        if self.temperature_len is not None:
            position = reference.tokens_of(batch, self.q.shape[0]).position
            beyond = jnp.log(jnp.maximum(position, 1)) / math.log(self.temperature_len)
            beyond = jnp.where(position > self.temperature_len, beyond, 1.0)
            factors.append(beyond[:, None, None])
        q = self.q
        if factors:
            q = (q.astype(jnp.float32) * math.prod(factors)).astype(q.dtype)
        k, v = (
            jnp.broadcast_to(jnp.float32(1) if of_rows(s) else s, heads)
            for s in self.cache_scales()
        )
        return q, jnp.stack([scale * one * k, v])

    def cache_scales(self) -> tuple[jax.Array, jax.Array]:
        """Scales of keys and values as they were given, f32."""
        k, v = (
            jnp.asarray(1.0 if s is None else s, jnp.float32) for s in (self.k_scale, self.v_scale)
        )
        return k, v

    def row_scales(self) -> dict[str, jax.Array]:
        """Those among them that rows of the pool have each, by their names in the reference."""
        named = zip(("k_scales", "v_scales"), self.cache_scales(), strict=True)
        return {name: scale for name, scale in named if of_rows(scale)}

    def quantised(self) -> tuple[jax.Array, jax.Array | None]:
        """New keys and values in the type of the cache; None where keys hold the values."""
        layout, found = self.cache.layout, []
        for x, scale in zip((self.k, self.v), self.cache_scales(), strict=True):
            if x is not None and of_rows(scale):  # a token's is that of the row it is written to
                size = layout.page_size
                place = reference.place_of(self.batch(), len(x), self.cache.num_pages, size)
                scale = scales_at(scale, place)
            found.append(None if x is None else reference.quantise(x, scale, layout.dtype))
        return cast(jax.Array, found[0]), found[1]


def of_rows(scale: Any) -> bool:
    """Whether every row of the pool has a scale."""
    return np.ndim(scale) == 3


def scales_at(scale: jax.Array, place: jax.Array) -> jax.Array:
    """[T, kv_heads] scales of rows of the pool, 1 behind its end.

    XLA keeps tokens along lanes; it would copy the pool to take many heads of one.

    Args:
      scale: [pages, page_size, kv_heads].
      place: [T] page * page_size + row, as `reference.place_of` has it.
    """
    _, size, heads = scale.shape
    page, row = place // size, place % size
    if heads < GROUP_ROWS:
        return scale.at[page, row].get(mode="fill", fill_value=1.0)
    flat = scale.swapaxes(1, 2).reshape(-1)
    first = page * (heads * size) + row
    each = first[:, None] + jnp.arange(heads) * size
    return flat.at[each].get(mode="fill", fill_value=1.0)


def refuse(argument: str, got: str, expected: str, advice: str = "") -> None:
    """Raises an `ArgumentError`."""
    raise ArgumentError(where=WHERE, argument=argument, got=got, expected=expected, advice=advice)


def problem_of(call: Call) -> Problem:
    """Checks shapes, types and numbers.

    Raises:
      ArgumentError: one of them is wrong.
    """
    check_cache(call.cache)
    layout, dims = call.cache.layout, checks.Dims(WHERE)
    dims.bind("q", call.q, "tokens q_heads key_dim")
    checks.check_dtype(WHERE, "q", call.q, DTYPES)
    if dims["key_dim"] != layout.key_dim:
        refuse("q", f"has shape {tuple(call.q.shape)}", f"the cache's key_dim {layout.key_dim}")
    checks.check_range(WHERE, "q_heads", dims["q_heads"], low=1)
    checks.check_multiple(
        WHERE, "q_heads", dims["q_heads"], layout.kv_heads, "Every key/value head needs as many."
    )
    check_new_rows(call, dims)
    dims.bind("kv_lens", call.kv_lens, "requests")
    dims.bind("cu_q_lens", call.cu_q_lens, "requests+1")
    if call.page_offsets is None:
        dims.bind("page_indices", call.page_indices, "requests _")
    else:
        dims.bind("page_indices", call.page_indices, "_")
        dims.bind("page_offsets", call.page_offsets, "requests+1")
        checks.check_dtype(WHERE, "page_offsets", call.page_offsets, (jnp.int32,))
    if call.query_starts is not None:
        dims.bind("query_starts", call.query_starts, "requests")
        checks.check_dtype(WHERE, "query_starts", call.query_starts, (jnp.int32,))
    for name in ("kv_lens", "cu_q_lens", "page_indices"):
        checks.check_dtype(WHERE, name, getattr(call, name), (jnp.int32,))
    check_options(call, dims)
    return Problem(
        num_tokens=dims["tokens"],
        num_requests=dims["requests"],
        num_indices=math.prod(call.page_indices.shape),
        num_pages=call.cache.words.shape[0] // layout.page_rows,
        q_heads=dims["q_heads"],
        layout=layout,
        dtype=jnp.dtype(call.q.dtype),
        causal=call.causal,
        windowed=call.window is not None,
        window=call.window if isinstance(call.window, int) else 0,
        tree=call.ancestors is not None,
        sinks=call.sinks is not None,
        soft_cap=None if call.soft_cap is None else float(call.soft_cap),
        update=call.k is not None,
        placed=call.query_starts is not None,
        lse=call.return_lse,
        k_scales=of_rows(call.k_scale),
        v_scales=of_rows(call.v_scale),
    )


def check_layout(layout: CacheLayout) -> None:
    """Checks the numbers and the type of a layout."""
    checks.check_choice(WHERE, "cache.layout.dtype", layout.dtype, CACHE_DTYPES)
    checks.check_choice(WHERE, "cache.layout.page_size", layout.page_size, PAGE_SIZES)
    for name in ("kv_heads", "key_dim", "value_dim"):
        checks.check_type(WHERE, f"cache.layout.{name}", getattr(layout, name), int)
    checks.check_range(WHERE, "cache.layout.kv_heads", layout.kv_heads, low=1)
    for name in ("key_dim", "value_dim"):
        checks.check_range(WHERE, f"cache.layout.{name}", getattr(layout, name), low=8, high=1024)
    if layout.latent and (layout.kv_heads != 1 or layout.value_dim > layout.key_dim):
        refuse("cache.layout", f"is {layout}", "one head whose keys hold its values")


def check_cache(cache: Any) -> None:
    """Checks what a cache says of itself."""
    checks.check_type(WHERE, "cache", cache, KVCache, "Use allocate_kv_cache.")
    layout = cache.layout
    check_layout(layout)
    checks.check_dtype(WHERE, "cache.words", cache.words, (jnp.int32,))
    shape = tuple(cache.words.shape)
    if len(shape) != 2 or shape[1] != layout.width or shape[0] % layout.page_rows:
        refuse(
            "cache.words",
            f"has shape {shape}",
            f"[pages * {layout.page_rows}, {layout.width}]",
            "Use allocate_kv_cache.",
        )


def check_new_rows(call: Call, dims: checks.Dims) -> None:
    """Checks the new keys and values."""
    layout = call.cache.layout
    if layout.latent and call.v is not None:
        refuse("v", "is given", "None where the keys of a latent cache hold the values")
    given = {"k": call.k} if layout.latent else {"k": call.k, "v": call.v}
    if all(x is None for x in given.values()):
        return
    for name, dim in (("k", layout.key_dim), ("v", layout.value_dim)):
        if name not in given:
            continue
        x = given[name]
        if x is None:
            refuse(name, "is None", "an array, as the other of k and v is")
            continue
        dims.bind(name, x, f"tokens {layout.kv_heads} {dim}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            refuse(name, f"has dtype {x.dtype}", "a float type", "Give it unquantised.")


def check_options(call: Call, dims: checks.Dims) -> None:
    """Checks the options."""
    heads = call.cache.layout.kv_heads
    for name in ("causal", "return_lse"):
        checks.check_type(WHERE, name, getattr(call, name), bool, "It is static.")
    check_window(call, dims)
    if call.ancestors is not None:
        dims.bind("ancestors", call.ancestors, "tokens _")
        checks.check_dtype(WHERE, "ancestors", call.ancestors, (jnp.uint32,))
        checks.check_choice(WHERE, "words of ancestors", call.ancestors.shape[1], (1, 2))
        if not call.causal:
            refuse("ancestors", "is given", "None where causal=False", "A tree is a causal mask.")
    if call.sinks is not None:
        dims.bind("sinks", call.sinks, "q_heads")
    for name in ("soft_cap", "sm_scale"):
        value = getattr(call, name)
        if value is None:
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (0 < abs(value) < 1e30)
        ):
            refuse(name, f"is {value!r}", "a finite Python number, not 0, or None")
    if call.soft_cap is not None:
        checks.check_range(WHERE, "soft_cap", call.soft_cap, low=0)
    if call.temperature_len is not None:
        checks.check_type(WHERE, "temperature_len", call.temperature_len, int)
        checks.check_range(WHERE, "temperature_len", call.temperature_len, low=2)
    check_scale_shapes(call, dims, heads)


def check_window(call: Call, dims: checks.Dims) -> None:
    """Checks the windows and the number of requests."""
    if call.window is not None and np.ndim(call.window):
        dims.bind("window", call.window, "requests")
        checks.check_dtype(WHERE, "window", call.window, (jnp.int32,))
    elif call.window is not None and not isinstance(call.window, jax.Array | np.integer):
        if isinstance(call.window, bool) or not isinstance(call.window, int):
            refuse("window", f"is {call.window!r}", "an integer of at least 1, or an int32 array")
        checks.check_range(WHERE, "window", call.window, low=1)
    count = call.num_requests
    if count is not None and (np.ndim(count) or jnp.result_type(count).kind not in "iu"):
        refuse("num_requests", f"is {count!r}", "one integer")


def check_scale_shapes(call: Call, dims: checks.Dims, heads: int) -> None:
    """Checks the shapes of the scales."""
    tokens, q_heads = dims["tokens"], dims["q_heads"]
    rows = call.cache.num_pages, call.cache.layout.page_size, heads
    shapes = {
        "q_scale": [(), (q_heads,), (tokens, 1), (tokens, q_heads)],
        "k_scale": [(), (heads,), rows],
        "v_scale": [(), (heads,), rows],
    }
    for name, allowed in shapes.items():
        value = getattr(call, name)
        if value is not None and np.shape(value) not in allowed:
            expected = " or ".join(str(shape) for shape in allowed)
            refuse(name, f"has shape {np.shape(value)}", f"shape {expected}")


def scale_rules(call: Call, live: jax.Array) -> list[checks.Condition]:
    """What scales and sinks have to obey; live [pages, page_size]: rows that requests have."""
    rules = []
    for name in ("q_scale", "k_scale", "v_scale"):
        if (value := getattr(call, name)) is not None:
            scale = jnp.asarray(value, jnp.float32)
            bad = ~(jnp.isfinite(scale) & (scale > 0))
            bad &= live[..., None] if of_rows(scale) else True
            rules.append(checks.Condition(name, scale, bad, "finite numbers above 0"))
    if call.sinks is not None:
        sinks = jnp.asarray(call.sinks, jnp.float32)
        bad = ~(sinks < jnp.inf)
        rules.append(checks.Condition("sinks", sinks, bad, "numbers, or -inf for no sink"))
    return rules


def value_rules(call: Call) -> list[checks.Condition]:
    """What values have to obey."""
    batch, layout = call.batch(), call.cache.layout
    cu, offsets, lens = batch.cu_q_lens, batch.page_offsets, batch.kv_lens
    counted = jnp.arange(lens.shape[0]) < batch.num_requests
    q_lens = cu[1:] - cu[:-1]
    pages = -(-lens // layout.page_size)
    place = jnp.arange(batch.page_indices.shape[0])
    owner = jnp.searchsorted(offsets, place, side="right") - 1
    inside = (owner >= 0) & (owner < lens.shape[0])
    owner = jnp.clip(owner, 0, max(lens.shape[0] - 1, 0))
    nth = place - offsets[owner]
    used = inside & counted[owner] & (nth < pages[owner])
    held = nth[:, None] * layout.page_size + jnp.arange(layout.page_size) < lens[owner][:, None]
    pool = jnp.zeros((call.cache.num_pages, layout.page_size), bool)
    legal = used & (batch.page_indices >= 0)
    live = pool.at[jnp.where(legal, batch.page_indices, len(pool))].max(held, mode="drop")
    written = used & ((nth + 1) * layout.page_size > (lens - q_lens)[owner])
    written &= q_lens[owner] > 0
    indices = batch.page_indices
    order = jnp.argsort(jnp.where(written, indices, -1), stable=True)
    same = jnp.where(written, indices, -1)[order]
    twin = jnp.zeros_like(written).at[order[1:]].set((same[1:] == same[:-1]) & (same[1:] >= 0))
    previous = jnp.concatenate([cu[:1], cu[:-1]])
    requests = jnp.asarray(batch.num_requests)
    bounds = jnp.arange(offsets.shape[0]) <= requests
    rules = [
        *scale_rules(call, live),
        checks.in_range("num_requests", requests, 0, lens.shape[0] + 1),
        checks.in_range("cu_q_lens", cu, 0, call.q.shape[0] + 1),
        checks.Condition("cu_q_lens", cu, cu < previous, "ascending bounds"),
        checks.Condition("kv_lens", lens, counted & (lens < 0), "lengths of at least 0"),
        checks.Condition(
            "page_offsets",
            offsets,
            bounds & ((offsets < 0) | (offsets > len(batch.page_indices))),
            f"0 to {len(batch.page_indices)}, places in the list",
        ),
        checks.Condition(
            "page_offsets",
            offsets[1:],
            counted & (offsets[1:] - offsets[:-1] < pages),
            "a page for every page_size tokens of kv_lens",
        ),
        checks.Condition(
            "page_indices",
            indices,
            used & ((indices < 0) | (indices >= call.cache.num_pages)),
            f"pages of the pool, 0 to {call.cache.num_pages - 1}",
        ),
    ]
    if call.query_starts is None:
        few = counted & (q_lens > 0) & (lens < q_lens)
        rules.append(checks.Condition("kv_lens", lens, few, "at least the query tokens"))
    if call.k is not None:
        rules.append(
            checks.Condition("page_indices", indices, twin, "each page written by one request")
        )
    return rules
