"""What is done when: a ragged batch as a short list of work items in token order.

Every row of the batch belongs to exactly one item. A request of several tokens becomes chunks of at
most `chunk` rows, counted from its own first row, so that its result does not depend on where it
lies in the batch. Neighbouring one-token requests (decode) share an item as far as they share an
aligned group of rows. Rows without a request, or whose request has no valid slot, are skipped: their
output is zero and no state is moved for them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

ROWS = 16  # DMAs move aligned groups of this many rows: the packed tile of the narrowest input type

SKIP, RUN, CHUNK = 0, 1, 2  # kinds of item
FRESH, NULL = -1, -2  # in place of a slot to load: state starts at zero; request is skipped


class Schedule(NamedTuple):
    """Scalars that drive the kernel. All int32; items [I], requests [R] in order, empty ones left out.

    Attributes:
      counts: [2] number of items, number of requests.
      base: [I] first row of the item's window, a multiple of ROWS.
      begin: [I] the item's first row, counted from `base`; below ROWS.
      rows: [I] rows of the item.
      request: [I] its request (RUN: the first of `rows` consecutive ones).
      kind: [I] SKIP, RUN or CHUNK.
      first: [I] 1 where a CHUNK opens its request.
      last: [I] 1 where a CHUNK ends its request.
      load: [R] slot to read the state from, FRESH or NULL.
      store: [R] slot to write the state to, or -1.
    """

    counts: jax.Array
    base: jax.Array
    begin: jax.Array
    rows: jax.Array
    request: jax.Array
    kind: jax.Array
    first: jax.Array
    last: jax.Array
    load: jax.Array
    store: jax.Array


def max_items(num_tokens: int, num_requests: int, chunk: int) -> int:
    """Upper bound of the number of items, for any lengths."""
    return num_tokens // chunk + num_requests + 2


def row_bounds(cu_seqlens: jax.Array, num_tokens: int) -> jax.Array:
    """[N+3] first row of each segment and the end: leading gap, the N requests, trailing gap."""
    inside = jax.lax.cummax(jnp.clip(cu_seqlens.astype(jnp.int32), 0, num_tokens))
    return jnp.concatenate([jnp.zeros(1, jnp.int32), inside, jnp.full(1, num_tokens, jnp.int32)])


def make_schedule(
    cu_seqlens: jax.Array,
    slot_ids: jax.Array,
    has_state: jax.Array,
    *,
    num_tokens: int,
    num_slots: int,
    chunk: int,
) -> Schedule:
    """Lists the work items of a ragged batch.

    Args:
      cu_seqlens: [N+1] int32, rows [cu[n], cu[n+1]) belong to request n. Made monotone and clipped
        to [0, num_tokens].
      slot_ids: [N] int32; a slot outside [0, num_slots) makes the request NULL.
      has_state: [N] bool; False starts from a zero state.
      num_tokens: rows of the batch, a multiple of ROWS.
      num_slots: slots of the state pool.
      chunk: most rows of one item, a multiple of ROWS.
    """
    gap = jnp.full(1, -1, jnp.int32)
    slot = jnp.concatenate([gap, slot_ids.astype(jnp.int32), gap])
    known = jnp.concatenate([gap != gap, has_state.astype(bool), gap != gap])
    bounds = row_bounds(cu_seqlens, num_tokens)
    length = bounds[1:] - bounds[:-1]

    # Leave out empty requests, so that the previous request is the owner of the previous row.
    index = jnp.arange(length.shape[0], dtype=jnp.int32)
    rank = jnp.cumsum(length > 0)
    order = jnp.minimum(jnp.sum(rank[None, :] <= index[:, None], axis=1), index[-1])
    alive = index < rank[-1]
    start, slot, known = bounds[order], slot[order], known[order]
    length = jnp.where(alive, length[order], 0)
    valid = alive & (slot >= 0) & (slot < num_slots)

    # Among requests that share a slot, the last one's state is kept.
    later = index[None, :] > index[:, None]
    superseded = jnp.any(later & valid[None, :] & (slot[None, :] == slot[:, None]), axis=1)
    load = jnp.where(valid, jnp.where(known, slot, FRESH), NULL)
    store = jnp.where(valid & ~superseded, slot, -1)

    single = length == 1
    group = start // ROWS
    joins = single & jnp.roll(single, 1) & (jnp.roll(group, 1) == group) & (index > 0)
    run_end = jnp.where(joins, index.shape[0], index)  # the next request that opens an item
    run_end = jnp.append(jax.lax.cummin(run_end, reverse=True)[1:], index.shape[0])
    run_end = jnp.minimum(run_end, rank[-1].astype(jnp.int32))

    pieces = jnp.where(single, ~joins, -(-length // chunk)).astype(jnp.int32)
    ends = jnp.cumsum(pieces)
    item = jnp.arange(max_items(num_tokens, cu_seqlens.shape[0] - 1, chunk), dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(ends[None, :] <= item[:, None], axis=1), index[-1])
    done = (item - (ends - pieces)[owner]) * chunk
    row = start[owner] + done
    rows = jnp.where(single[owner], run_end[owner] - owner, jnp.minimum(chunk, length[owner] - done))
    skipped = jnp.where(valid[owner], CHUNK, SKIP)
    fields = Schedule(
        counts=jnp.stack([ends[-1], rank[-1]]),
        base=row // ROWS * ROWS,
        begin=row % ROWS,
        rows=rows,
        request=owner,
        kind=jnp.where(single[owner], RUN, skipped),
        first=done == 0,
        last=done + rows == length[owner],
        load=load,
        store=store,
    )
    return Schedule(*(field.astype(jnp.int32) for field in fields))
