"""How the cache lies in memory: rows of 32-bit words, so that a DMA can move any of them.

A token's row holds the keys of all heads, then the values of all heads, and is padded once, to a
multiple of 128 lanes. Rows of tokens that share words (2 of bf16, 4 or 8 of narrow types) are
packed one above the other, as the vector registers pack them: word (i, lane) holds tokens i * pack,
i * pack + 1, ... from its low bits up, so a register of words is a register of keys. A head need
not begin at a multiple of 128 lanes: it is multiplied as part of an aligned window, in which the
query has zeros beside it.

Latents of, say, 512 + 64 lanes would be padded by a ninth. So a row holds two of their words: both
latents, then both rotated parts in 128 lanes. Words w and w + 8 share a row, so that a group of
rows, in its two halves, is still a run of tokens:

    row r of group g:  | latent of word 16 g + r | of word 16 g + 8 + r | rotated | rotated |
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ragged_attention.schedule import GROUP_ROWS
from tpukit import checks
from tpukit.errors import ArgumentError

LANES = 128
UNSIGNED = {4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}


def bits_of(dtype: Any) -> int:
    """Bits of a value in the cache; arrays elsewhere give a byte to 4 of them."""
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return int(info(dtype).bits)


def round_up(value: Any, multiple: int) -> Any:
    """The next multiple."""
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Window:
    """Where one kind of row part (keys or values) lies; the same for all heads but for an offset.

    Attributes:
      base: lane at which head 0 begins.
      stride: lanes from one head to the next.
      dim: lanes of a head.
      heads: number of heads.
      end: lanes of a row.
    """

    base: int
    stride: int
    dim: int
    heads: int
    end: int

    def lane(self, head: Any) -> Any:
        """The first lane of the window that holds a head, a multiple of 128."""
        aligned = (self.base + head * self.stride) & -LANES
        last = self.end - self.width
        return min(aligned, last) if isinstance(head, int) else jnp.minimum(aligned, last)

    def offset(self, head: int) -> int:
        """Where in its window a head begins."""
        return self.base + head * self.stride - self.lane(head)

    @property
    def width(self) -> int:
        """Lanes of every window."""
        begins = [self.base + head * self.stride for head in range(self.heads)]
        return max(round_up(begin % LANES + self.dim, LANES) for begin in begins)


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """What the cache of a layer holds.

    Attributes:
      kv_heads: key/value heads.
      key_dim, value_dim: widths of a head.
      dtype: name of the type of keys and values, "float32", "bfloat16", "int8", "float8_e4m3fn",
        "float8_e5m2" or, on tpu7x, "float4_e2m1fn".
      page_size: tokens of a page.
      latent: values are the first value_dim lanes of the keys (multi-head latent attention).
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    page_size: int
    latent: bool = False

    @property
    def pack(self) -> int:
        """Tokens that share a word."""
        return 32 // bits_of(self.dtype)

    @property
    def words_per_row(self) -> int:
        """Words of tokens that share a row: 2 of latents where that saves padding, else 1."""
        rotated = self.key_dim - self.value_dim
        pays = self.latent and self.value_dim % LANES == 0 and 0 < rotated <= LANES // 2
        return 2 if pays and self.page_size % (2 * GROUP_ROWS * self.pack) == 0 else 1

    @property
    def run(self) -> int:
        """Tokens behind each other in a group of rows: all of it, or one of its halves."""
        return GROUP_ROWS * self.pack

    @property
    def group(self) -> int:
        """Tokens of a group of rows, which a DMA moves at once."""
        return self.words_per_row * self.run

    @property
    def page_rows(self) -> int:
        """Rows of words of a page."""
        return self.page_size // self.words_per_row // self.pack

    @property
    def values(self) -> int:
        """Lanes of a token that hold anything."""
        return self.kv_heads * (self.key_dim + (0 if self.latent else self.value_dim))

    @property
    def token_width(self) -> int:
        """Lanes of a token that has its row to itself."""
        return round_up(self.values, LANES)

    @property
    def width(self) -> int:
        """Lanes of a row."""
        return 2 * self.value_dim + LANES if self.words_per_row == 2 else self.token_width

    @property
    def keys(self) -> Window:
        """Where a token's keys are."""
        return Window(0, self.key_dim, self.key_dim, self.kv_heads, self.token_width)

    @property
    def vals(self) -> Window:
        """Where a token's values are."""
        if self.latent:
            return Window(0, self.key_dim, self.value_dim, self.kv_heads, self.token_width)
        base = self.kv_heads * self.key_dim
        return Window(base, self.value_dim, self.value_dim, self.kv_heads, self.token_width)

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes."""
        return self.width * 4 // self.pack // self.words_per_row

    def place(self, index: jax.Array, tokens: int = 1) -> jax.Array:
        """Where in a chunk its keys lie, in steps of so many tokens, given their order.

        Keys are computed 128 of first halves, then 128 of second ones, and so on, for which nothing
        has to move along lanes.
        """
        if self.words_per_row == 1:
            return index
        block, run = LANES // tokens, self.run // tokens
        half, inner = index // block & 1, index & (block - 1)
        return (index & -2 * block) + 2 * (inner & -run) + half * run + (inner & (run - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The paged cache of one layer. Donate it: it is written in place.

    Attributes:
      words: [pages * page_rows, width] int32.
      layout: what is in it.
    """

    words: jax.Array
    layout: CacheLayout = dataclasses.field(metadata={"static": True})

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.words.shape[0] // self.layout.page_rows

    def unpack(self) -> tuple[jax.Array, jax.Array]:
        """Keys [pages, page_size, kv_heads, key_dim] and values [..., value_dim]."""
        layout = self.layout
        rows = from_words(apart(self.words, layout), layout.dtype)
        pages = rows.reshape(self.num_pages, layout.page_size, layout.token_width)

        def part(window: Window) -> jax.Array:
            lanes = window.base + jnp.arange(window.heads)[:, None] * window.stride
            return pages[:, :, lanes + jnp.arange(window.dim)]

        return part(layout.keys), part(layout.vals)


def token_rows(keys: jax.Array, values: jax.Array | None, layout: CacheLayout) -> jax.Array:
    """Rows [tokens, token_width] in the type of the cache. keys: [tokens, kv_heads, key_dim].

    What is not finite in values is moved to their keys, see `contained`.
    """
    if values is None:
        parts = keys[..., : layout.value_dim], keys[..., layout.value_dim :]
        parts = contained(*(part.astype(layout.dtype) for part in reversed(parts)))[::-1]
    else:
        parts = contained(keys.astype(layout.dtype), values.astype(layout.dtype))
    rows = jnp.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    return jnp.pad(rows, ((0, 0), (0, layout.token_width - rows.shape[1])))


def contained(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [..., dim] with 0 for values that are not finite, and their keys NaN.

    A weight of 0 times NaN is NaN, also for queries that do not see a token. The logits of a key
    that is NaN are NaN for the queries that see it, and the mask keeps them from the others. Not so
    int8 and float4, which have no NaN, and latents without a rotated part, whose keys are the
    values: of those, as of values put into pages by others, one that is not finite reaches all
    queries of its request that are computed together.
    """
    if not (keys.shape[-1] and jnp.issubdtype(values.dtype, jnp.floating)):
        return keys, values  # no lane, or no value, can say so
    bad = ~jnp.isfinite(values.astype(jnp.float32))
    # As numbers: XLA takes seven times as long to look for a flag along lanes.
    spoiled = jnp.max(bad.astype(jnp.float32), axis=-1, keepdims=True) > 0
    return jnp.where(spoiled, jnp.nan, keys), jnp.where(bad, 0, values)


def pack_pages(keys: jax.Array, values: jax.Array | None, layout: CacheLayout) -> KVCache:
    """A cache from keys [pages, page_size, kv_heads, key_dim] and values; the inverse of `unpack`.

    For a latent layout the values are part of the keys and are not given.

    Raises:
      ArgumentError: they are not of the layout's shapes.
    """
    dims, shape = checks.Dims("pack_pages"), f"pages {layout.page_size} {layout.kv_heads}"
    dims.bind("keys", keys, f"{shape} {layout.key_dim}")
    if (values is None) != layout.latent:
        raise ArgumentError(
            where="pack_pages",
            argument="values",
            got="is given" if layout.latent else "is None",
            expected="None for a latent layout, whose keys hold them, else an array",
        )
    if values is not None:
        dims.bind("values", values, f"{shape} {layout.value_dim}")
    flat = None if values is None else values.reshape(-1, *values.shape[2:])
    rows = token_rows(keys.reshape(-1, *keys.shape[2:]), flat, layout)
    return KVCache(joined(to_words(rows), layout), layout)


def joined(words: jax.Array, layout: CacheLayout) -> jax.Array:
    """Rows [n / halves, width] of the cache from words of tokens [n, token_width]."""
    if layout.words_per_row == 1:
        return words
    halves = words.reshape(-1, 2, GROUP_ROWS, layout.token_width)
    one, other = (in_both(halves[:, half], layout) for half in (0, 1))
    return jnp.where(lane_halves(layout) == 0, one, other).reshape(-1, layout.width)


def in_both(words: jax.Array, layout: CacheLayout) -> jax.Array:
    """Rows [..., width] with words of tokens [..., token_width] in every half."""
    if layout.words_per_row == 1:
        return words
    latent, rotated = jnp.split(words[..., : layout.width // 2], [layout.value_dim], axis=-1)
    return jnp.concatenate([latent, latent, rotated, rotated], axis=-1)


def lane_halves(layout: CacheLayout) -> jax.Array:
    """[width] int32, which half of a row its lanes belong to."""
    lane, rank = jnp.arange(layout.width), layout.value_dim
    second = jnp.where(lane < 2 * rank, lane >= rank, lane >= 2 * rank + LANES // 2)
    return (second & (layout.words_per_row == 2)).astype(jnp.int32)


def apart(rows: jax.Array, layout: CacheLayout) -> jax.Array:
    """The inverse of `joined`."""
    if layout.words_per_row == 1:
        return rows
    groups, rank = rows.reshape(-1, GROUP_ROWS, 1, layout.width), layout.value_dim
    latents = groups[..., : 2 * rank].reshape(-1, GROUP_ROWS, 2, rank)
    rotated = groups[..., 2 * rank :].reshape(-1, GROUP_ROWS, 2, LANES // 2)
    rotated = jnp.pad(rotated, ((0, 0), (0, 0), (0, 0), (0, LANES // 2)))
    both = jnp.concatenate([latents, rotated], axis=3)
    return both.swapaxes(1, 2).reshape(-1, layout.token_width)


def word_bits(rows: jax.Array) -> jax.Array:
    """Each value alone in the low bits of a word, int32."""
    unsigned = UNSIGNED[bits_of(rows.dtype)]
    return lax.bitcast_convert_type(rows, unsigned).astype(jnp.uint32).view(jnp.int32)


def to_words(rows: jax.Array) -> jax.Array:
    """Packs rows [n, width] of a type into words [n / pack, width] int32."""
    pack = 32 // bits_of(rows.dtype)
    bits = word_bits(rows).reshape(-1, pack, rows.shape[1])
    shifts = (jnp.arange(pack, dtype=jnp.int32) * (32 // pack))[None, :, None]
    return jnp.bitwise_or.reduce(bits << shifts, axis=1)


def from_words(words: jax.Array, dtype: Any) -> jax.Array:
    """Unpacks words [n, width] into rows [n * pack, width] of a type."""
    dtype = jnp.dtype(dtype)
    unsigned, pack = UNSIGNED[bits_of(dtype)], 32 // bits_of(dtype)
    shifts = (jnp.arange(pack, dtype=jnp.uint32) * (32 // pack))[None, :, None]
    bits = (words.view(jnp.uint32)[:, None, :] >> shifts).astype(unsigned)
    return lax.bitcast_convert_type(bits.reshape(-1, words.shape[1]), dtype)
