"""What is done when: a ragged batch as a short list of work items in token order.

Every row of the batch belongs to exactly one item. A request of several tokens becomes chunks that
fit a window of rows which starts at an aligned group. Neighbouring one-token requests (decode)
share an item as far as they share such a group. Rows without a request, or whose request has no
slot of the pool, are skipped: their output is zero and no state is moved for them.

Chunks end where windows do, so that all but the first are whole windows; a request's rounding
errors then depend on its first row modulo ROWS. A batch-invariant list cuts chunks of `window -
ROWS` rows, which fit wherever the request starts, and so depends on nothing but the request.

The list is made by the kernel itself, on the scalar core, from the caller's arrays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS = 16  # DMAs move aligned groups of this many rows: the packed tile of the narrowest input type

SKIP, RUN, CHUNK = 1, 2, 4  # kinds of item
FIRST, LAST = 8, 16  # added to SKIP and CHUNK where the item opens or ends its request
FRESH, NULL = -1, -2  # in place of a slot to load: state starts at zero; request is skipped

Ref = Any


def in_group(row: jax.Array) -> jax.Array:
    """Place of a row in its aligned group."""
    return row & (ROWS - 1)


def group_start(row: jax.Array) -> jax.Array:
    """First row of the aligned group of a row."""
    return row & -ROWS


class Batch(NamedTuple):
    """The caller's description of the batch, in SMEM, int32."""

    slot_ids: Ref  # [N]
    cu_seqlens: Ref  # [N + 1]
    has_state: Ref  # [N] 0 or 1


class Schedule(NamedTuple):
    """Scalars that drive the kernel, int32 in SMEM; I items, R requests that have rows, in order.

    Attributes:
      counts: [2] number of items, number of requests.
      row: [I] the item's first row.
      rows: [I] its rows.
      request: [I] its request (RUN: the first of `rows` consecutive ones).
      kind: [I] SKIP, RUN or CHUNK, with FIRST and LAST.
      load: [R] slot to read the state from, FRESH or NULL.
      store: [R] slot to write the state to, or -1.
      owner: [slots] the last request with that slot; undefined where there is none.
    """

    counts: Ref
    row: Ref
    rows: Ref
    request: Ref
    kind: Ref
    load: Ref
    store: Ref
    owner: Ref

    @staticmethod
    def shapes(limits: Limits, num_requests: int) -> Schedule:
        """SMEM shapes of the fields, for any lengths, with a place for writes that do not count."""
        requests = num_requests + 2  # the rows before the first and after the last are one each
        items = limits.num_tokens // limits.chunk + 2 * requests + 1
        sizes = (2, *[items] * 4, *[requests + 1] * 2, max(limits.num_slots, 1))
        return Schedule(*(pltpu.SMEM((size,), jnp.int32) for size in sizes))


class Position(NamedTuple):
    """How far the batch has been listed."""

    row: jax.Array  # first row that is not listed yet
    items: jax.Array
    requests: jax.Array
    run: jax.Array  # 1 if the last item is a RUN


class Limits(NamedTuple):
    """Static facts the list depends on."""

    num_tokens: int
    num_slots: int
    window: int  # rows, a multiple of ROWS
    batch_invariant: bool

    @property
    def chunk(self) -> int:
        """Rows of every chunk but a request's first and last."""
        return self.window - ROWS if self.batch_invariant else self.window


def list_items(batch: Batch, schedule: Schedule, limits: Limits) -> None:
    """Fills the schedule: bounds are made monotone and clipped to [0, num_tokens] on the way."""
    num_requests = batch.slot_ids.shape[0]

    def segment(end: jax.Array, slot: jax.Array, known: jax.Array, at: Position) -> Position:
        return list_segment(schedule, limits, jnp.minimum(end, limits.num_tokens), slot, known, at)

    def request(n: jax.Array, at: Position) -> Position:
        return segment(batch.cu_seqlens[n + 1], batch.slot_ids[n], batch.has_state[n], at)

    zero = jnp.int32(0)
    at = segment(batch.cu_seqlens[0], jnp.int32(-1), zero, Position(zero, zero, zero, zero))
    at = lax.fori_loop(0, num_requests, request, at)
    at = segment(jnp.int32(limits.num_tokens), jnp.int32(-1), zero, at)
    schedule.counts[0], schedule.counts[1] = at.items, at.requests

    def keep(
        r: jax.Array, _: None
    ) -> None:  # of the requests that share a slot, the last one's state
        slot = schedule.store[r]
        superseded = schedule.owner[jnp.maximum(slot, 0)] != r
        schedule.store[r] = jnp.where((slot >= 0) & superseded, -1, slot)

    lax.fori_loop(0, at.requests, keep, None)


def list_segment(
    schedule: Schedule,
    limits: Limits,
    end: jax.Array,
    slot: jax.Array,
    known: jax.Array,
    at: Position,
) -> Position:
    """Lists the rows [at.row, end) of one request; writes past the counts are overwritten later."""
    length = end - at.row
    live = (slot >= 0) & (slot < limits.num_slots)
    schedule.load[at.requests] = jnp.where(live, jnp.where(known != 0, slot, FRESH), NULL)
    schedule.store[at.requests] = jnp.where(live, slot, -1)

    @pl.when(live & (length > 0))
    def _() -> None:
        schedule.owner[slot] = at.requests

    begin = in_group(at.row)
    opening = jnp.minimum(length, limits.chunk - (0 if limits.batch_invariant else begin))
    single = length == 1
    joins = single & (at.run == 1) & (begin != 0)
    place = at.items - joins.astype(jnp.int32)
    schedule.row[place] = jnp.where(joins, schedule.row[place], at.row)
    schedule.rows[place] = jnp.where(joins, schedule.rows[place] + 1, opening)
    schedule.request[place] = jnp.where(joins, schedule.request[place], at.requests)
    kind = jnp.where(live, CHUNK, SKIP)
    opens = kind + FIRST + jnp.where(opening == length, LAST, 0)
    schedule.kind[place] = jnp.where(single, RUN, opens)
    more = (length - opening + limits.chunk - 1) // limits.chunk

    def piece(i: jax.Array, _: None) -> None:
        item, done = at.items + 1 + i, opening + i * limits.chunk
        schedule.row[item] = at.row + done
        schedule.rows[item] = jnp.minimum(length - done, limits.chunk)
        schedule.request[item] = at.requests
        schedule.kind[item] = kind + jnp.where(i == more - 1, LAST, 0)

    lax.fori_loop(0, more, piece, None)
    listed = Position(
        row=end, items=place + 1 + more, requests=at.requests + 1, run=single.astype(jnp.int32)
    )
    return jax.tree.map(lambda new, old: jnp.where(length > 0, new, old), listed, at)
