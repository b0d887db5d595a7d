"""What is done when: a ragged batch as a short list of work items in token order.

Every row of the batch belongs to exactly one item. A request of several tokens becomes chunks that
fit a window of rows which starts at an aligned group. Neighbouring one-token requests (decode)
share an item as far as they share such a group. Rows without a request, or whose request has no
slot of the pool, are skipped: their output is zero and no state is moved for them.

Chunks end where windows do, so that all but the first are whole windows; a request's rounding
errors then depend on its first row modulo ROWS. A batch-invariant list cuts chunks of `window -
ROWS` rows, which fit wherever the request starts, and so depends on nothing but the request.

A request is also cut after every row whose state is wanted as a snapshot; each part is listed as if
a request started there. A request of drafts has no state to store; where it, or its last part, fits
one window, its item only reads the state.

The list is made by the kernel itself, on the scalar core, from the caller's arrays. Where time runs
backwards, so does the list: the same items, the last one first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS = 16  # DMAs move aligned groups of this many rows: the packed tile of the narrowest input type

MAX_DRAFTS = 64  # bits of a draft's words

SKIP, RUN, CHUNK, VERIFY = 1, 2, 4, 32  # kinds of item; VERIFY is a chunk that leaves the state
FIRST, LAST = 8, 16  # added to all but RUN where the item opens or ends its request
SNAPSHOT = 64  # added to CHUNK where the state after it is written to another slot
FRESH, NULL = -1, -2  # in place of a slot to load: state starts at zero; request is skipped
RESUMES, DRAFTS = 1, 2  # flags of a request: it has a state; its rows are drafts

Ref = Any


def in_group(row: jax.Array) -> jax.Array:
    """Place of a row in its aligned group."""
    return row & (ROWS - 1)


def group_start(row: jax.Array) -> jax.Array:
    """First row of the aligned group of a row."""
    return row & -ROWS


class Form(NamedTuple):
    """Which of four recurrences; the late ones are the adjoints of the others, backwards.

    Attributes:
      reverse: time runs from a request's last token to its first.
      late: a token's decay applies after it is read, and its scale belongs to the update:
        o_t = q_t (S + scale k_t^T v_t), S' = e^(g_t) (S + scale k_t^T v_t).
    """

    reverse: bool = False
    late: bool = False

    @property
    def short(self) -> bool:
        """Whether the first token of a chunk, in order of rows, does not decay what is read."""
        return self.reverse != self.late

    @property
    def adjoint(self) -> Form:
        """The form of cotangents."""
        return Form(not self.reverse, not self.late)


FORWARD = Form()


class Batch(NamedTuple):
    """The caller's description of the batch, in SMEM, int32; S snapshots, if there are any."""

    slot_ids: Ref  # [N]
    cu_seqlens: Ref  # [N + 1]
    flags: Ref  # [N] RESUMES and DRAFTS
    snapshot_rows: Ref = None  # [S]
    snapshot_slots: Ref = None  # [S]


class Schedule(NamedTuple):
    """Scalars that drive the kernel, int32 in SMEM; I items, R requests that have rows, in order.

    Attributes:
      counts: [3] number of items, of requests, of snapshots that are written.
      row: [I] the item's first row.
      rows: [I] its rows.
      request: [I] its request (RUN: the first of `rows` consecutive ones).
      kind: [I] SKIP, RUN, CHUNK or VERIFY, with FIRST, LAST and SNAPSHOT.
      load: [R] slot to read the state from, FRESH or NULL.
      store: [R] slot to write the state to, or -1.
      owner: [slots] the last request with that slot; undefined where there is none.
      snapshot: [I] its number among those written; undefined where the item has none.
      target: [S] slot of each snapshot that is written.
      place: [S] item after which each of the caller's snapshots is taken, or -1.
    """

    counts: Ref
    row: Ref
    rows: Ref
    request: Ref
    kind: Ref
    load: Ref
    store: Ref
    owner: Ref
    snapshot: Ref
    target: Ref
    place: Ref

    @staticmethod
    def sizes(limits: Limits, num_requests: int) -> tuple[int, ...]:
        """Lengths of the fields, for any batch, with a place for writes that do not count."""
        requests = num_requests + 2  # the rows before the first and after the last are one each
        parts = requests + limits.num_snapshots
        items = limits.num_tokens // limits.chunk + 2 * parts + 1
        wanted = limits.num_snapshots + 1
        taken = items if limits.num_snapshots else 1
        slots = max(limits.num_slots, 1)
        return (3, *[items] * 4, *[requests + 1] * 2, slots, taken, wanted, wanted)

    @staticmethod
    def shapes(limits: Limits, num_requests: int) -> Schedule:
        """SMEM shapes of the fields."""
        sizes = Schedule.sizes(limits, num_requests)
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
    runs: bool = True  # requests of one token share items; else each is a chunk
    drafts: bool = False  # requests may be drafts
    tree: bool = False  # whose tokens have words of ancestors
    num_snapshots: int = 0
    reverse: bool = False  # the last item comes first

    @property
    def chunk(self) -> int:
        """Rows of every chunk but a request's first and last."""
        return self.window - ROWS if self.batch_invariant else self.window


class Segment(NamedTuple):
    """Rows to be listed, from where the list has come to: a request or a part of one, or a gap."""

    end: jax.Array
    slot: jax.Array
    flags: jax.Array
    opens: jax.Array | bool = True  # whether the request begins here
    closes: jax.Array | bool = True  # whether it ends here
    cut: jax.Array | bool = False  # whether the state after it is wanted

    def live(self, limits: Limits) -> jax.Array:
        """Whether it has a slot of the pool."""
        return (self.slot >= 0) & (self.slot < limits.num_slots)


def list_items(batch: Batch, schedule: Schedule, limits: Limits) -> None:
    """Fills the schedule: bounds are made monotone and clipped to [0, num_tokens] on the way."""
    num_requests = batch.slot_ids.shape[0]
    zero = jnp.int32(0)

    def gap(end: jax.Array, at: Position) -> Position:
        bound = jnp.minimum(end, limits.num_tokens)
        return list_segment(schedule, limits, Segment(bound, jnp.int32(-1), zero), at)

    def request(n: jax.Array, at: Position) -> Position:
        return list_segment(schedule, limits, whole_request(batch, limits, n), at)

    at = gap(batch.cu_seqlens[0], Position(zero, zero, zero, zero))
    if limits.num_snapshots:
        at = list_parts(batch, schedule, limits, at)
    else:
        at = lax.fori_loop(0, num_requests, request, at)
    at = gap(jnp.int32(limits.num_tokens), at)
    schedule.counts[0], schedule.counts[1] = at.items, at.requests

    def keep(
        r: jax.Array, _: None
    ) -> None:  # of the requests that share a slot, the last one's state
        slot = schedule.store[r]
        superseded = schedule.owner[jnp.maximum(slot, 0)] != r
        schedule.store[r] = jnp.where((slot >= 0) & superseded, -1, slot)

    lax.fori_loop(0, at.requests, keep, None)
    if limits.num_snapshots:
        keep_snapshots(batch, schedule)
    if limits.reverse:
        turn_around(schedule)


def turn_around(schedule: Schedule) -> None:
    """Puts items and requests into the opposite order."""
    items, requests = schedule.counts[0], schedule.counts[1]

    def exchange(ref: Ref, i: jax.Array, count: jax.Array, change: Any = lambda x: x) -> None:
        j = count - 1 - i
        ref[i], ref[j] = change(ref[j]), change(ref[i])

    def other_end(kind: jax.Array) -> jax.Array:
        first, last = kind & FIRST, kind & LAST
        return kind - first - last + first * (LAST // FIRST) + last // (LAST // FIRST)

    def item(i: jax.Array, _: None) -> None:
        exchange(schedule.row, i, items)
        exchange(schedule.rows, i, items)
        exchange(schedule.request, i, items, lambda r: requests - 1 - r)
        exchange(schedule.kind, i, items, other_end)

    def request(r: jax.Array, _: None) -> None:
        exchange(schedule.load, r, requests)
        exchange(schedule.store, r, requests)

    lax.fori_loop(0, (items + 1) // 2, item, None)
    lax.fori_loop(0, (requests + 1) // 2, request, None)


def whole_request(batch: Batch, limits: Limits, n: jax.Array) -> Segment:
    """All rows of request n."""
    end = jnp.minimum(batch.cu_seqlens[n + 1], limits.num_tokens)
    return Segment(end, batch.slot_ids[n], batch.flags[n])


def list_segment(schedule: Schedule, limits: Limits, segment: Segment, at: Position) -> Position:
    """Lists a segment's rows; writes past the counts are overwritten later."""
    length, live = segment.end - at.row, segment.live(limits)
    note_request(schedule, limits, segment, at)
    begin = in_group(at.row)
    opening = jnp.minimum(length, limits.chunk - (0 if limits.batch_invariant else begin))
    whole = opening == length
    single = (length == 1) & segment.opens & segment.closes & ~jnp.bool_(segment.cut) & limits.runs
    joins = single & (at.run == 1) & (begin != 0)
    place = at.items - joins.astype(jnp.int32)
    schedule.row[place] = jnp.where(joins, schedule.row[place], at.row)
    schedule.rows[place] = jnp.where(joins, schedule.rows[place] + 1, opening)
    schedule.request[place] = jnp.where(joins, schedule.request[place], at.requests)
    kind = jnp.where(live, CHUNK, SKIP)
    close = jnp.where(segment.closes, LAST, 0)
    first = jnp.where(whole & reads_only(limits, segment, length), VERIFY, kind)
    first += jnp.where(segment.opens, FIRST, 0) + jnp.where(whole, close, 0)
    schedule.kind[place] = jnp.where(single, RUN, first)
    more = (length - opening + limits.chunk - 1) // limits.chunk

    def piece(i: jax.Array, _: None) -> None:
        item, done = at.items + 1 + i, opening + i * limits.chunk
        schedule.row[item] = at.row + done
        schedule.rows[item] = jnp.minimum(length - done, limits.chunk)
        schedule.request[item] = at.requests
        schedule.kind[item] = kind + jnp.where(i == more - 1, close, 0)

    lax.fori_loop(0, more, piece, None)
    listed = Position(
        row=segment.end,
        items=place + 1 + more,
        requests=at.requests + jnp.where(segment.closes, 1, 0),
        run=single.astype(jnp.int32),
    )
    return jax.tree.map(lambda new, old: jnp.where(length > 0, new, old), listed, at)


def note_request(schedule: Schedule, limits: Limits, segment: Segment, at: Position) -> None:
    """Notes where the state of a segment's request comes from and goes to."""
    r, slot, live = at.requests, segment.slot, segment.live(limits)
    resumes, writes = segment.flags & RESUMES != 0, live
    if limits.drafts:
        writes &= segment.flags & DRAFTS == 0
    schedule.load[r] = jnp.where(live, jnp.where(resumes, slot, FRESH), NULL)
    schedule.store[r] = jnp.where(writes, slot, -1)

    @pl.when(live & (segment.end > at.row))
    def _() -> None:
        schedule.owner[slot] = r


def reads_only(limits: Limits, segment: Segment, length: jax.Array) -> jax.Array | bool:
    """Whether a segment is drafts after which nobody needs the state."""
    if not limits.drafts:
        return False
    drafts = segment.live(limits) & (segment.flags & DRAFTS != 0) & (length <= MAX_DRAFTS)
    end = segment.closes & ~jnp.bool_(segment.cut)
    return drafts & end & segment.opens if limits.tree else drafts & end


def list_parts(batch: Batch, schedule: Schedule, limits: Limits, at: Position) -> Position:
    """Lists all requests, cut after the rows of snapshots.

    A step lists the rows up to the next snapshot's or the request's end, or passes over a snapshot
    that cannot be taken: no slot of the pool, or a row that is listed already or of no request.
    """
    num_requests, num_snapshots = batch.slot_ids.shape[0], limits.num_snapshots

    def clear(c: jax.Array, _: None) -> None:
        slot = batch.snapshot_slots[c]
        schedule.place[c] = -1

        @pl.when((slot >= 0) & (slot < limits.num_slots))
        def _() -> None:
            schedule.owner[slot] = -1

    def step(_: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        n, c, begun, at = state
        opens = begun == 0
        request = whole_request(batch, limits, jnp.minimum(n, num_requests - 1))
        entry = jnp.minimum(c, num_snapshots - 1)
        row, slot = batch.snapshot_rows[entry], batch.snapshot_slots[entry]
        there = (slot >= 0) & (slot < limits.num_slots) & (row < limits.num_tokens)
        waiting = (c < num_snapshots) & (n < num_requests)
        void = waiting & ~(there & (row >= at.row))
        cut = waiting & ~void & (row < request.end) & request.live(limits)
        if limits.tree:  # whose drafts leave no state
            short = opens & (request.end - at.row <= MAX_DRAFTS)
            cut &= ~(short & (request.flags & DRAFTS != 0))
        end = jnp.where(cut, row + 1, request.end)
        end = jnp.where(void, at.row, end)
        over = ~void & (end >= request.end)
        some = end > at.row
        part = request._replace(end=end, opens=opens, closes=over, cut=cut)
        at = list_segment(schedule, limits, part, at)
        schedule.place[jnp.where(cut, entry, num_snapshots)] = at.items - 1
        passed = (void | cut).astype(jnp.int32)
        begun = jnp.where(over, 0, begun | some.astype(jnp.int32))  # Mosaic carries no bool
        return n + over.astype(jnp.int32), c + passed, begun, at

    lax.fori_loop(0, num_snapshots, clear, None)
    zero = jnp.int32(0)
    steps = num_requests + num_snapshots
    return lax.fori_loop(0, steps, step, (zero, zero, zero, at))[3]


def keep_snapshots(batch: Batch, schedule: Schedule) -> None:
    """Numbers the snapshots to be written: not to slots of requests, one to each slot.

    A request of drafts leaves its slot to its own snapshot, if no later request reads it.
    """
    num_snapshots = batch.snapshot_rows.shape[0]
    claim = batch.slot_ids.shape[0] + 3  # above every request, so that claims of a slot differ

    def of_taken(action: Callable[[jax.Array, jax.Array, jax.Array], None]) -> None:
        """action(snapshot, its item, its slot) for those that are taken."""

        def consider(c: jax.Array, _: None) -> None:
            item = schedule.place[c]

            @pl.when(item >= 0)
            def _() -> None:
                action(c, item, batch.snapshot_slots[c])

        lax.fori_loop(0, num_snapshots, consider, None)

    def refuse(c: jax.Array, item: jax.Array, slot: jax.Array) -> None:
        owner = schedule.owner[slot]
        mine = (schedule.request[item] == owner) & (schedule.store[jnp.maximum(owner, 0)] < 0)
        schedule.place[c] = jnp.where((owner < 0) | mine, item, -1)

    def contend(c: jax.Array, item: jax.Array, slot: jax.Array) -> None:
        schedule.owner[slot] = claim + c

    def number(c: jax.Array, item: jax.Array, slot: jax.Array) -> None:
        @pl.when(schedule.owner[slot] == claim + c)
        def _() -> None:
            count = schedule.counts[2]
            schedule.kind[item] += SNAPSHOT
            schedule.snapshot[item] = count
            schedule.target[count] = slot
            schedule.counts[2] = count + 1

    schedule.counts[2] = 0
    of_taken(refuse)
    of_taken(contend)
    of_taken(number)
