"""What is done when: the batch as a sequence of records, made one by one as they are needed.

A record is one tile of keys for one block of query tokens. A request whose query tokens fit a block
has its new keys and values put into the tile on their way to the cache. A longer one is preceded by
records that only write, and a fence behind them, after which everything is read from the cache.
Rows of no request are blocks without keys: they give 0.

Nothing here grows with the batch or the context: the scalar core walks the batch with a cursor,
some records ahead of the computation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from reference.ragged_attention import TREE_TOKENS

Ref = Any
GROUP_ROWS = 8  # rows of words that a DMA moves at once

FIRST, LAST, WRITES, FENCE, END = 1, 2, 4, 8, 16  # bits of Record.kind


class Record(NamedTuple):
    """A tile of keys for a block of queries; int32 scalars.

    Attributes:
      kind: FIRST and LAST of its block; WRITES new rows only; first behind a FENCE; the END.
      row: first query token of the block.
      count: query tokens of the block.
      position: position of the block's first query token in its request.
      first: position of the request's first query token.
      key: position of the tile's first key, a multiple of the page size.
      span: keys of the tile.
      cached: how many of them, from the front, are in the cache already.
      page: place of the tile's first page in the list of pages.
      pages: how many pages the request has from there on.
      window: a query sees so many positions, itself included; 0 means all.
      is_tree: whether the block's tree mask counts.
      fences: how many fences there are up to here.
      block: number of the block.
    """

    kind: Any
    row: Any
    count: Any
    position: Any
    first: Any
    key: Any
    span: Any
    cached: Any
    page: Any
    pages: Any
    window: Any
    is_tree: Any
    fences: Any
    block: Any


class Cursor(NamedTuple):
    """Where the walk is: the next record to make."""

    segment: jax.Array  # 0 is the rows before the first request, r + 1 is request r
    begin: jax.Array  # the segment's rows are [begin, end)
    end: jax.Array
    row: jax.Array  # first row of the next block
    key: jax.Array  # first key of the next tile; of the next tile that writes, its first new key
    writing: jax.Array  # 1 in records that only write
    fences: jax.Array
    block: jax.Array


class Batch(NamedTuple):
    """The caller's description of the batch, in SMEM, int32; R requests."""

    kv_lens: Ref  # [R]
    cu_q_lens: Ref  # [R + 1]
    page_offsets: Ref  # [R + 1]
    windows: Ref  # [R], or [1] without windows
    num_requests: Ref  # [1], within 0 to R


class Limits(NamedTuple):
    """Static facts the records depend on."""

    num_tokens: int
    num_indices: int  # length of the list of pages
    block: int  # most query tokens of a block
    tile: int  # keys of a tile
    page_size: int
    pack: int  # tokens that share words
    causal: bool
    windowed: bool
    tree: bool
    update: bool


class Request(NamedTuple):
    """What a segment is."""

    kv_len: jax.Array
    first: jax.Array  # position of its first query token, negative if the lengths are wrong
    window: jax.Array
    number: jax.Array  # of the request, 0 where there is none
    is_request: jax.Array
    long: jax.Array  # its new rows are written by records of their own


def select(condition: jax.Array, then: Any, otherwise: Any) -> jax.Array:
    """One of two scalars."""
    return jnp.where(condition, jnp.int32(then), jnp.int32(otherwise))


class Walk(NamedTuple):
    """Makes records."""

    batch: Batch
    limits: Limits

    def start(self) -> Cursor:
        """Before the first record."""
        zero = jnp.int32(0)
        blank = Cursor(*[zero] * len(Cursor._fields))
        return self.enter(blank, zero, zero)

    def bound(self, segment: jax.Array) -> jax.Array:
        """Where a segment's rows end, if that is behind where they begin."""
        count = self.batch.num_requests[0]
        inside = segment <= count
        end = self.batch.cu_q_lens[select(inside, segment, 0)]
        return select(inside, jnp.minimum(end, self.limits.num_tokens), self.limits.num_tokens)

    def enter(self, at: Cursor, segment: jax.Array, begin: jax.Array) -> Cursor:
        """The first block of the next segment that has rows, or the end."""
        last = self.batch.num_requests[0] + 1
        segment = lax.while_loop(
            lambda s: (s <= last) & (self.bound(jnp.minimum(s, last)) <= begin),
            lambda s: s + 1,
            segment,
        )
        end = self.bound(jnp.minimum(segment, last))
        moved = at._replace(segment=segment, begin=begin, end=end, row=begin)
        request = self.request(moved)
        return moved._replace(
            writing=request.long.astype(jnp.int32),
            key=select(
                request.long, jnp.maximum(request.first, 0), self.keys(moved, request, begin)[0]
            ),
        )

    def over(self, at: Cursor) -> jax.Array:
        """Whether all records have been made."""
        return at.segment > self.batch.num_requests[0] + 1

    def request(self, at: Cursor) -> Request:
        """What the cursor's segment is."""
        limits = self.limits
        is_request = (at.segment > 0) & (at.segment <= self.batch.num_requests[0])
        number = select(is_request, at.segment - 1, 0)
        kv_len = select(is_request, jnp.maximum(self.batch.kv_lens[number], 0), 0)
        window = jnp.int32(0)
        if limits.windowed:
            window = select(is_request, jnp.maximum(self.batch.windows[number], 0), 0)
        length = at.end - at.begin
        long = (length > limits.block) & (kv_len > 0) & limits.update
        return Request(kv_len, kv_len - length, window, number, is_request, long)

    def keys(
        self, at: Cursor, request: Request, row: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The keys [begin, end) that the block at `row` sees, and its tokens."""
        limits = self.limits
        count = jnp.minimum(at.end - row, limits.block)
        position = request.first + row - at.begin
        begin, end = jnp.int32(0), request.kv_len
        if limits.windowed:
            oldest = jnp.maximum(position - request.window + 1, 0)
            oldest = jnp.minimum(oldest, request.kv_len)
            begin = select(request.window > 0, oldest - lax.rem(oldest, limits.page_size), 0)
        if limits.causal:
            end = jnp.clip(position + count, 0, request.kv_len)
        return begin, end, count

    def record(self, at: Cursor) -> tuple[Record, Cursor]:
        """The cursor's record, and the cursor behind it; the END once all are made."""
        request = self.request(at)
        written, past_write = self.write_record(at, request)
        attended, past_tile = self.attend_record(at, request)
        writing = at.writing == 1

        def pick(then: Any, otherwise: Any) -> Any:
            return jax.tree.map(lambda a, b: select(writing, a, b), then, otherwise)

        record, moved = pick(written, attended), pick(past_write, past_tile)
        over = self.over(at)
        record = record._replace(kind=select(over, END, record.kind))
        done = (moved.row >= moved.end) & ~over
        stepped = lax.cond(done, lambda c: self.enter(c, c.segment + 1, c.end), lambda c: c, moved)
        return record, jax.tree.map(lambda new, old: select(over, old, new), stepped, at)

    def common(self, at: Cursor, request: Request, key: jax.Array) -> dict[str, Any]:
        """Fields that all records of a request have in common."""
        offsets = self.batch.page_offsets
        begin = jnp.clip(offsets[request.number], 0, self.limits.num_indices)
        end = jnp.clip(offsets[request.number + 1], 0, self.limits.num_indices)
        place = begin + lax.div(key, jnp.int32(self.limits.page_size))
        length = at.end - at.begin
        return {
            "first": request.first,
            "key": key,
            "page": place,
            "pages": jnp.maximum(end - place, 0),
            "window": request.window,
            "is_tree": (length <= TREE_TOKENS).astype(jnp.int32),
        }

    def write_record(self, at: Cursor, request: Request) -> tuple[Record, Cursor]:
        """Writes the new rows from position at.key on."""
        limits = self.limits
        key = at.key - lax.rem(at.key, limits.page_size)
        group = GROUP_ROWS * limits.pack  # records do not share what a DMA moves
        most = at.key + limits.block
        end = jnp.minimum(key + limits.tile, most - lax.rem(most, group))
        end = jnp.minimum(end, request.kv_len)
        record = Record(
            kind=jnp.int32(WRITES),
            row=at.begin,
            count=jnp.int32(0),
            position=request.first,
            span=end - key,
            cached=at.key - key,
            fences=at.fences,
            block=at.block,
            **self.common(at, request, key),
        )
        done = (end >= request.kv_len).astype(jnp.int32)
        first_key = self.keys(at, request, at.begin)[0]
        moved = at._replace(
            key=select(done == 1, first_key, end), writing=1 - done, fences=at.fences + done
        )
        return record, moved

    def attend_record(self, at: Cursor, request: Request) -> tuple[Record, Cursor]:
        """A tile of keys for the block of query tokens at at.row."""
        limits = self.limits
        begin, end, count = self.keys(at, request, at.row)
        span = jnp.clip(end - at.key, 0, limits.tile)
        in_cache = request.kv_len
        if limits.update:
            in_cache = select(request.long, request.kv_len, jnp.maximum(request.first, 0))
        opens, closes = at.key == begin, at.key + limits.tile >= end
        fence = opens & (at.row == at.begin) & request.long
        record = Record(
            kind=select(opens, FIRST, 0) + select(closes, LAST, 0) + select(fence, FENCE, 0),
            row=at.row,
            count=count,
            position=request.first + at.row - at.begin,
            span=span,
            cached=jnp.clip(in_cache - at.key, 0, span),
            fences=at.fences,
            block=at.block,
            **self.common(at, request, at.key),
        )
        row = select(closes, at.row + limits.block, at.row)
        inside = jnp.minimum(row, at.end - 1)
        first_key = self.keys(at, request, inside)[0]
        moved = at._replace(
            row=row,
            key=select(closes, first_key, at.key + limits.tile),
            block=at.block + closes.astype(jnp.int32),
        )
        return record, moved


def store_record(books: Ref, slot: jax.Array, record: Record) -> None:
    """Puts a record into a slot of books [slots, fields]."""
    for field, value in enumerate(record):
        books[slot, field] = jnp.int32(value)


class Noted:
    """A record in its slot; fields are read when they are asked for."""

    def __init__(self, books: Ref, slot: jax.Array) -> None:
        self.books, self.slot = books, slot

    def __getattr__(self, name: str) -> jax.Array:
        return self.books[self.slot, Record._fields.index(name)]

    def has(self, kind: int) -> jax.Array:
        """Whether it is of a kind."""
        return (self.kind & kind) != 0
