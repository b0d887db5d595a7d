"""Who goes where: what the kernel has to know about a device's own tokens, in plain JAX.

An entry is one token in one of its slots; it is alone if the token has no other expert on the same
device. A device's `Table` lists its entries by expert, so that those for one device, and for one
expert there, are consecutive. Devices exchange tables inside the
kernel; from them each knows which rows it will receive and where each result belongs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

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

# A token's tail, the 32-bit words that travel behind its values: ids, weights, and whether a slot
# holds the last expert on its device, `top_k` words each from these multiples of top_k; its scale.
IDS, WEIGHTS, LASTS = 0, 1, 2
SCALE = LANES - 1
MAX_TOP_K = SCALE // 3


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Table:
    """Where a device's table of int32 holds what.

    Attributes:
      num_experts: of all devices.
      num_entries: tokens of the device times top_k.
    """

    num_experts: int
    num_entries: int

    SENDS = 0  # rows that leave for another device
    RETURNS = 1  # rows that come back from one
    ME = 2  # the device
    BOUNDS = 3  # [2 * num_experts + 1] first entry of each expert, first of several of each expert

    @property
    def firsts(self) -> int:
        """[num_experts] entries of each expert that are the first of their token on its device."""
        return self.BOUNDS + 2 * self.num_experts + 1

    @property
    def entries(self) -> int:
        """[num_entries] the entries by expert: those that are alone first, then one of several."""
        return self.firsts + self.num_experts

    @property
    def width(self) -> int:
        """Words that other devices need, whole tiles of an array of one dimension."""
        return round_up(self.entries + self.num_entries, WORDS)

    @property
    def send_keys(self) -> int:
        """[num_entries] what leaves, in order: expert there * devices + way to its device - 1."""
        return self.width

    @property
    def send_tokens(self) -> int:
        """[num_entries] the tokens of these."""
        return self.send_keys + self.num_entries

    @property
    def own_width(self) -> int:
        """Words in all."""
        return round_up(self.send_tokens + self.num_entries, WORDS)


def same(values: jax.Array) -> jax.Array:
    """[T, top_k, top_k]: whether slot j has the value of slot i."""
    return values[:, :, None] == values[:, None, :]


def describe(
    expert_ids: jax.Array, expert_weights: jax.Array, num_experts: int, num_devices: int, me: Any
) -> tuple[jax.Array, jax.Array]:
    """A device's table, and the tails of its tokens.

    Args:
      expert_ids: [T, top_k] int32; ids outside [0, num_experts) are skipped, an id that a token
        names twice is one entry.
      expert_weights: [T, top_k] float32.
      num_experts: of all devices.
      num_devices: that share them equally, in order.
      me: index of this device.

    Returns:
      The table [own_width] int32 (see `Table`) and the tails [T, 128] int32.
    """
    num_tokens, top_k = expert_ids.shape
    layout = Table(num_experts, num_tokens * top_k)
    slot = jnp.arange(top_k)
    known = (expert_ids >= 0) & (expert_ids < num_experts)
    earlier = slot[None, :, None] > slot[None, None, :]
    fresh = known & ~jnp.any(same(expert_ids) & earlier, axis=2)
    experts = jnp.where(fresh, expert_ids, num_experts)
    device = experts // (num_experts // num_devices)
    beside = same(device) & fresh[:, None, :]
    below = experts[:, None, :] < experts[:, :, None]
    above = experts[:, None, :] > experts[:, :, None]
    first = fresh & ~jnp.any(beside & below, axis=2)
    last = fresh & ~jnp.any(beside & above, axis=2)

    token = jnp.arange(num_tokens)[:, None]
    code = token | slot << TOKEN_BITS | jnp.where(first, FIRST, 0) | jnp.where(last, LAST, 0)
    key = 2 * experts + ~(first & last)
    keys, codes = lax.sort((key.ravel(), code.ravel()), num_keys=1, is_stable=True)
    bounds = jnp.sum(keys[None, :] < jnp.arange(2 * num_experts + 1)[:, None], axis=1)
    is_expert = experts.ravel()[None, :] == jnp.arange(num_experts)[:, None]
    firsts = jnp.sum(is_expert & first.ravel()[None, :], axis=1)
    away = device != me
    counts = jnp.stack([jnp.sum(first & away), jnp.sum(last & away), jnp.asarray(me)])
    head = jnp.concatenate([counts, bounds, firsts])
    shared = jnp.concatenate([head, codes])
    shared = jnp.pad(shared, (0, layout.width - shared.size))

    way = (device - me - 1) % num_devices
    send_key = experts % (num_experts // num_devices) * num_devices + way
    send_key = jnp.where(first & away, send_key, num_experts)
    sends = lax.sort((send_key.ravel(), jnp.broadcast_to(token, experts.shape).ravel()), num_keys=1)
    table = jnp.concatenate([shared, *sends])
    table = jnp.pad(table, (0, layout.own_width - table.size))

    weights = jnp.where(known, expert_weights, 0.0)
    fields = [expert_ids, lax.bitcast_convert_type(weights, jnp.int32), last]
    tail = jnp.concatenate([x.astype(jnp.int32) for x in fields], axis=1)
    tail = jnp.pad(tail, ((0, 0), (0, LANES - tail.shape[1])))
    return table.astype(jnp.int32), tail
