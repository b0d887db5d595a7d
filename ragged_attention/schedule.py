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

from reference.ragged_attention import MAX_KV_LEN, TREE_TOKENS

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
    window: Any
    is_tree: Any
    fences: Any
    block: Any


class Cursor(NamedTuple):
    """Where the walk is: the next record to make; int32 scalars.

    Attributes:
      segment: 0 is the rows before the first request, r + 1 is request r.
      begin: the segment's first row.
      row: first row of the next block.
      key: first key of the next tile, or NEW at the first of a block; of the next record that only
        writes, its first new key.
      written: whether the segment's new rows have been written ahead: NOT_YET, PARTLY or WHOLLY.
      fences: how many fences there have been.
      block: number of the next block.
    """

    segment: jax.Array
    begin: jax.Array
    row: jax.Array
    key: jax.Array
    written: jax.Array
    fences: jax.Array
    block: jax.Array


NEW = -1
NOT_YET, PARTLY, WHOLLY = 0, 1, 2


class Batch(NamedTuple):
    """The caller's description of the batch, in SMEM, int32; R requests."""

    kv_lens: Ref  # [R]
    cu_q_lens: Ref  # [R + 1]
    page_offsets: Ref  # [R + 1]
    windows: Ref  # [R], or [1] without windows
    query_starts: Ref  # [R], or [1] where they follow from the lengths
    num_requests: Ref  # [1], within 0 to R


class Limits(NamedTuple):
    """Static facts the records depend on."""

    num_tokens: int
    num_indices: int  # length of the list of pages
    block: int  # most query tokens of a block
    tile: int  # keys of a tile
    page_size: int
    group: int  # tokens of a group of rows, which a DMA moves at once
    causal: bool
    windowed: bool
    update: bool
    placed: bool  # positions of queries are given

    @property
    def may_write_ahead(self) -> bool:
        """Whether a request can be longer than a block, and has rows to write."""
        return self.update and self.num_tokens > self.block


class Request(NamedTuple):
    """What a segment is; its rows are [begin, end)."""

    number: jax.Array  # of the request, 0 where there is none
    end: jax.Array
    kv_len: jax.Array  # keys that have a listed page; 0 where there is no request
    first: jax.Array  # position of its first query token
    window: jax.Array
    long: jax.Array  # its new rows are written by records of their own


def select(condition: jax.Array, then: Any, otherwise: Any) -> jax.Array:
    """One of two scalars."""
    return jnp.where(condition, jnp.int32(then), jnp.int32(otherwise))


def either(condition: jax.Array, then: Any, otherwise: Any) -> Any:
    """One of two tuples of scalars."""
    return jax.tree.map(lambda a, b: select(condition, a, b), then, otherwise)


class Walk(NamedTuple):
    """Makes records, without branches: their scalar code is one straight line."""

    batch: Batch
    limits: Limits

    def start(self) -> Cursor:
        """Before the first record."""
        zero = jnp.int32(0)
        return Cursor(zero, zero, zero, jnp.int32(NEW), zero, zero, zero)

    def record(self, at: Cursor) -> tuple[Record, Cursor]:
        """The cursor's record, and the cursor behind it; the END once all are made."""
        request = self.request(at)
        record, moved = self.attend_record(at, request)
        if self.limits.may_write_ahead:
            writing = request.long & (at.written != WHOLLY)
            record, moved = either(writing, self.write_record(at, request), (record, moved))
        done = moved.row >= request.end
        onwards = moved._replace(
            segment=at.segment + 1, begin=request.end, row=request.end, written=jnp.int32(NOT_YET)
        )
        moved = either(done, onwards, moved)
        over = at.segment > self.batch.num_requests[0] + 1
        record = record._replace(kind=select(over, END, record.kind))
        return record, either(over, at, moved)

    def request(self, at: Cursor) -> Request:
        """What the cursor's segment is."""
        limits, count = self.limits, self.batch.num_requests[0]
        behind = at.segment > count
        is_request = (at.segment > 0) & ~behind
        number = select(is_request, at.segment - 1, 0)
        bound = jnp.minimum(self.batch.cu_q_lens[select(behind, 0, at.segment)], limits.num_tokens)
        end = jnp.maximum(select(behind, limits.num_tokens, bound), at.begin)
        kv_len = select(is_request, jnp.clip(self.batch.kv_lens[number], 0, MAX_KV_LEN), 0)
        window = jnp.int32(0)
        if limits.windowed:
            window = select(is_request, jnp.maximum(self.batch.windows[number], 0), 0)
        length = end - at.begin
        first = kv_len - length
        if limits.placed:
            first = select(is_request, self.batch.query_starts[number], 0)
            kv_len = jnp.clip(kv_len, 0, jnp.maximum(first + length, 0))
        begin_page, end_page = self.pages(number)
        kv_len = jnp.minimum(kv_len, jnp.maximum(end_page - begin_page, 0) * limits.page_size)
        long = (length > limits.block) & (kv_len > jnp.maximum(first, 0))
        return Request(number, end, kv_len, first, window, long)

    def keys(self, at: Cursor, request: Request) -> tuple[jax.Array, jax.Array]:
        """The keys [begin, end) that the cursor's block sees."""
        limits = self.limits
        position = request.first + at.row - at.begin
        begin, end = jnp.int32(0), request.kv_len
        if limits.windowed:
            oldest = jnp.clip(position - request.window + 1, 0, request.kv_len)
            begin = select(request.window > 0, oldest & -limits.page_size, 0)
        if limits.causal:
            end = jnp.clip(position + limits.block, 0, request.kv_len)
        return begin, end

    def pages(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where a request's pages begin and end in the list."""
        bounds = (self.batch.page_offsets[number + i] for i in range(2))
        begin, end = (jnp.clip(bound, 0, self.limits.num_indices) for bound in bounds)
        return begin, end

    def common(self, at: Cursor, request: Request, key: jax.Array) -> dict[str, Any]:
        """Fields that all records of a request have in common."""
        limits = self.limits
        place = self.pages(request.number)[0] + (key >> (limits.page_size.bit_length() - 1))
        return {
            "first": request.first,
            "key": key,
            "page": jnp.minimum(place, limits.num_indices),
            "window": request.window,
            "is_tree": (request.end - at.begin <= TREE_TOKENS).astype(jnp.int32),
        }

    def attend_record(self, at: Cursor, request: Request) -> tuple[Record, Cursor]:
        """A tile of keys for the block of query tokens at at.row."""
        limits = self.limits
        begin, end = self.keys(at, request)
        opens = at.key == NEW
        key = select(opens, begin, at.key)
        count = jnp.minimum(request.end - at.row, limits.block)
        span = jnp.clip(end - key, 0, limits.tile)
        span = select(count > 0, span, 0)
        in_cache = request.kv_len
        if limits.update:
            in_cache = select(request.long, request.kv_len, jnp.maximum(request.first, 0))
        closes = key + limits.tile >= end
        fence = opens & (at.row == at.begin) & request.long & limits.update
        kind = select(opens, FIRST, 0) + select(closes, LAST, 0) + select(fence, FENCE, 0)
        record = Record(
            kind=select(count > 0, kind, 0),
            row=at.row,
            count=count,
            position=request.first + at.row - at.begin,
            span=span,
            cached=jnp.clip(in_cache - key, 0, span),
            fences=at.fences,
            block=at.block,
            **self.common(at, request, key),
        )
        moved = at._replace(
            row=select(closes, at.row + limits.block, at.row),
            key=select(closes, NEW, key + limits.tile),
            block=at.block + closes.astype(jnp.int32),
        )
        return record, moved

    def write_record(self, at: Cursor, request: Request) -> tuple[Record, Cursor]:
        """Writes the new rows from a position on."""
        limits = self.limits
        new = select(at.written == NOT_YET, jnp.maximum(request.first, 0), at.key)
        key = new & -limits.page_size
        # Records do not share what a DMA moves.
        most = (new - key + max(limits.block, limits.group)) & -limits.group
        end = key + jnp.minimum(limits.tile, most)
        end = jnp.minimum(end, request.kv_len)
        record = Record(
            kind=jnp.int32(WRITES),
            row=at.begin,
            count=jnp.int32(0),
            position=request.first,
            span=end - key,
            cached=new - key,
            fences=at.fences,
            block=at.block,
            **self.common(at, request, key),
        )
        done = end >= request.kv_len
        moved = at._replace(
            key=select(done, NEW, end),
            written=select(done, WHOLLY, PARTLY),
            fences=at.fences + done.astype(jnp.int32),
        )
        return record, moved


def store_record(books: Record, slot: jax.Array, record: Record) -> None:
    """Puts a record into a slot of books, an array [slots] of each field that is of use."""
    for field, value in zip(books, record, strict=True):
        if field is not None:
            field[slot] = jnp.int32(value)


class Noted:
    """A record in its slot; fields are read when they are asked for."""

    def __init__(self, books: Record, slot: jax.Array) -> None:
        self.books, self.slot = books, slot

    def __getattr__(self, name: str) -> jax.Array:
        return getattr(self.books, name)[self.slot]

    def has(self, kind: int) -> jax.Array:
        """Whether it is of a kind."""
        return (self.kind & kind) != 0
