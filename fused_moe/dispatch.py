"""Who goes where: what the kernel has to know about a device's own tokens, in plain JAX.

An entry is one token in one of its slots; it is alone if the token has no other expert on the same
device. A device lists its entries by expert, so that those for one device, and for one expert
there, are consecutive. Inside the kernel every device gets the parts of the lists that are for it,
and so knows which rows it will receive and where each result belongs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128
WORDS = 1024  # of a tile of an array of one dimension
# An entry in 32 bits: the token, its slot, and whether the expert is the first and the last of the
# token's experts on its device.
TOKEN_BITS = 20
SLOT_BITS = 6
TOKEN = (1 << TOKEN_BITS) - 1
SLOT = (1 << SLOT_BITS) - 1
FIRST = 1 << (TOKEN_BITS + SLOT_BITS)
LAST = FIRST << 1

# A token's tail, the 32-bit words that travel behind its values: `top_k` ids, as many weights, and
# in the last word its scale.
SCALE = LANES - 1
MAX_TOP_K = SCALE // 2


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


class Lists(NamedTuple):
    """What a device knows of its own tokens; see `Layout` for what is where."""

    own: jax.Array  # [own words] for itself
    heads: jax.Array  # [n * head rows, 128] for each device: where its entries are
    entries: jax.Array  # [entry rows, 128] entries by expert: those that are alone first


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where `Lists` hold what.

    Attributes:
      num_devices: that share the experts.
      num_experts: of all devices.
      num_tokens: of a device.
      top_k: slots of a token.
    """

    num_devices: int
    num_experts: int
    num_tokens: int
    top_k: int

    ME = 0  # of the own words: the device
    SENDS = 1  # rows that leave for another device
    RETURNS = 2  # rows that come back from one
    SEGMENTS = 3  # [num_devices + 1] first entry for each device

    BOUNDS = 0  # of a head: [2 * experts + 1] first entry of each expert; first one of several

    @property
    def experts(self) -> int:
        """Experts of a device."""
        return self.num_experts // self.num_devices

    @property
    def num_entries(self) -> int:
        """Entries of a device."""
        return self.num_tokens * self.top_k

    @property
    def send_keys(self) -> int:
        """[num_entries] what leaves, in order: expert there * devices + way to its device - 1."""
        return self.SEGMENTS + self.num_devices + 1

    @property
    def send_tokens(self) -> int:
        """[num_entries] the tokens of these."""
        return self.send_keys + self.num_entries

    @property
    def own_words(self) -> int:
        """Own words in all."""
        return round_up(self.send_tokens + self.num_entries, WORDS)

    @property
    def firsts(self) -> int:
        """Of a head: [experts] entries of each expert that are the first of their token there."""
        return self.BOUNDS + 2 * self.experts + 1

    @property
    def head_rows(self) -> int:
        """Rows of a head."""
        return -(-(self.firsts + self.experts) // LANES)

    @property
    def entry_rows(self) -> int:
        """Rows of entries of a device."""
        return -(-self.num_entries // LANES)

    @property
    def window_rows(self) -> int:
        """Rows that hold the entries of one expert, at most: a token is there once."""
        return min(-(-self.num_tokens // LANES) + 1, self.entry_rows)


def slots_where(condition: jax.Array, of: jax.Array) -> jax.Array:
    """[top_k, T]: whether a slot i has a slot j of its token with condition[i, j] and of[j]."""
    return jnp.any(condition & of[None], axis=1)


def describe(
    expert_ids: jax.Array, expert_weights: jax.Array, num_experts: int, num_devices: int, me: Any
) -> tuple[Lists, jax.Array]:
    """A device's lists, and the tails of its tokens.

    Args:
      expert_ids: [T, top_k] int32; ids outside [0, num_experts) are skipped, an id that a token
        names twice is one entry.
      expert_weights: [T, top_k] float32.
      num_experts: of all devices.
      num_devices: that share them equally, in order.
      me: index of this device.

    Returns:
      The lists, int32, and the tails [T, 128] int32.
    """
    num_tokens, top_k = expert_ids.shape
    layout = Layout(num_devices, num_experts, num_tokens, top_k)
    ids = expert_ids.T  # [top_k, T]: tokens along the lanes
    slot = jnp.arange(top_k)[:, None]
    counted = fresh(ids, num_experts)
    experts = jnp.where(counted, ids, num_experts)
    device = experts // layout.experts
    beside = device[:, None] == device[None]
    first = counted & ~slots_where(beside & (experts[None] < experts[:, None]), counted)
    last = counted & ~slots_where(beside & (experts[None] > experts[:, None]), counted)

    token = jnp.broadcast_to(jnp.arange(num_tokens), ids.shape)
    code = token | slot << TOKEN_BITS | jnp.where(first, FIRST, 0) | jnp.where(last, LAST, 0)
    key = 2 * experts + ~(first & last)
    keys, codes = lax.sort((key.ravel(), code.ravel()), num_keys=2, is_stable=False)
    bounds = jnp.sum(keys[None, :] < jnp.arange(2 * num_experts + 1)[:, None], axis=1)
    is_expert = experts.ravel()[None, :] == jnp.arange(num_experts)[:, None]
    firsts = jnp.sum(is_expert & first.ravel()[None, :], axis=1)

    away = device != me
    way = (device - me - 1) % num_devices
    send_key = jnp.where(first & away, experts % layout.experts * num_devices + way, num_experts)
    sends = lax.sort((send_key.ravel(), token.ravel()), num_keys=2, is_stable=False)
    counts = jnp.stack([jnp.asarray(me), jnp.sum(first & away), jnp.sum(last & away)])
    segments = bounds[:: 2 * layout.experts]
    lists = Lists(
        own=filled(jnp.concatenate([counts, segments, *sends]), layout.own_words),
        heads=heads(bounds, firsts, layout),
        entries=filled(codes, layout.entry_rows * LANES).reshape(-1, LANES),
    )
    return lists, tails(expert_ids, expert_weights)


def fresh(ids: jax.Array, num_experts: int) -> jax.Array:
    """[top_k, T]: which ids are an expert's, and not in an earlier slot of their token as well."""
    slot = jnp.arange(ids.shape[0])
    known = (ids >= 0) & (ids < num_experts)
    earlier = slot[None, :, None] < slot[:, None, None]
    return known & ~slots_where((ids[:, None] == ids[None]) & earlier, known)


def tails(expert_ids: jax.Array, expert_weights: jax.Array) -> jax.Array:
    """The tails [T, 128] int32 of tokens, without a scale."""
    weights = lax.bitcast_convert_type(expert_weights, jnp.int32)
    found = jnp.concatenate([expert_ids, weights], axis=1)
    return jnp.pad(found, ((0, 0), (0, LANES - found.shape[1])))


def filled(values: jax.Array, size: int) -> jax.Array:
    """int32 values with zeros behind them."""
    return jnp.pad(values.astype(jnp.int32), (0, size - values.size))


def heads(bounds: jax.Array, firsts: jax.Array, layout: Layout) -> jax.Array:
    """For each device the bounds and counts of its experts."""
    shape = (layout.num_devices, -1)
    ends = bounds[2 * layout.experts :: 2 * layout.experts]
    parts = [bounds[:-1].reshape(shape), ends[:, None], firsts.reshape(shape)]
    head = jnp.concatenate([x.astype(jnp.int32) for x in parts], axis=1)
    head = jnp.pad(head, ((0, 0), (0, layout.head_rows * LANES - head.shape[1])))
    return head.reshape(-1, LANES)
