"""Drafts and snapshots of gated linear attention, specified by calls that have neither.

Drafts are tokens that may be thrown away. Those of a request form a chain or a tree; each sees the
request's state, its ancestors and itself, and the state stays as it is: `gla`. Those that are
accepted later are a request's ordinary next tokens: `commit`. A snapshot is the state after a row:
what the request would leave if it ended there.

Sources: trees of drafts as in SpecInfer (arXiv 2305.09781); states that advance by accepted keys
and values, instead of one for every draft, as in KVBuffer (arXiv 2605.19049).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from reference import gla as base
from reference.gla import Decay, HeadDecay, Requests

MAX_DRAFTS = 64  # of a request: bits of two words


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
    """Which requests' rows are drafts.

    Attributes:
      requests: [requests] bool.
      ancestors: None: all drafts form chains. Or [tokens, 1 or 2] uint32, as in paged attention:
        bit d of word w says that a token sees its request's token 32 w + d. A draft's words are its
        parent's and its own bit; a parent comes before its children. Read for requests of at most
        64 drafts; longer ones are chains. Own bits count as set and bits of later drafts as not;
        words that are otherwise no tree's leave the decays within their request unspecified.
    """

    requests: jax.Array
    ancestors: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Snapshots:
    """States that are wanted in other slots.

    Attributes:
      rows: [snapshots] int32 row of the batch after which the state is taken; ascending.
      slots: [snapshots] int32 slot to which it goes; outside [0, slots), such as -1, none.
    """

    rows: jax.Array
    slots: jax.Array


def gla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state_pool: jax.Array,
    slot_ids: jax.Array,
    cu_seqlens: jax.Array,
    has_state: jax.Array,
    *,
    decay: Decay,
    drafts: Drafts | None = None,
    snapshots: Snapshots | None = None,
    run: Callable[..., tuple[jax.Array, jax.Array]] = base.chunked,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """`run` with drafts and snapshots; what is not said here is said there.

    Args:
      drafts: a request of drafts keeps the state in its slot, if it is the last with that slot.
      snapshots: one counts if its slot is one of the pool, its row one of a request with a slot and
        higher than those of all before it. Not taken: of a tree; to the slot of a request with
        rows, unless it is the own slot of a chain of drafts, and of no later request; where
        snapshots share a slot, all but the last.
      run: `reference.gla.chunked` or `recurrent`.
      **options: of `run`.

    Costs a pass over the batch per snapshot, and one over 64 tokens per row if there is a tree.
    """
    inputs, batch = (q, k, v), (slot_ids, cu_seqlens, has_state)
    num_tokens, num_slots = v.shape[0], state_pool.shape[0]
    o, pool = run(*inputs, state_pool, *batch, decay=decay, **options)
    reqs = base.requests(cu_seqlens, slot_ids, has_state, num_tokens, num_slots)
    if not num_tokens or not slot_ids.shape[0] or not num_slots:
        return o, pool
    if drafts is not None:
        kept = jnp.where(drafts.requests, reqs.store, num_slots)
        before = state_pool[jnp.minimum(kept, num_slots - 1)]
        pool = pool.at[kept].set(before, mode="drop")
        if drafts.ancestors is not None:
            trees, words = tree_requests(drafts, reqs), drafts.ancestors
            paths = functools.partial(along_paths, run=run, options=options)
            given = o, inputs, state_pool, reqs, trees, words, decay
            o = lax.cond(jnp.any(trees), paths, lambda o, *_: o, *given)
    if snapshots is not None:

        def state_after(snapshot: tuple[jax.Array, jax.Array]) -> jax.Array:
            row, n = snapshot
            only = jnp.where(jnp.arange(slot_ids.shape[0]) == n, 0, -1)
            bounds = jnp.minimum(lax.cummax(jnp.clip(cu_seqlens, 0, num_tokens)), row + 1)
            state = state_pool[reqs.load[n]][None]
            return run(*inputs, state, only, bounds, has_state, decay=decay, **options)[1][0]

        found = taken_snapshots(snapshots, reqs, drafts, num_tokens, num_slots)
        states = lax.map(state_after, (snapshots.rows, found.request))
        target = jnp.where(found.taken, snapshots.slots, num_slots)
        pool = pool.at[target].set(states, mode="drop")
    return o, pool


def along_paths(
    o: jax.Array,
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    state_pool: jax.Array,
    reqs: Requests,
    trees: jax.Array,
    words: jax.Array,
    decay: Decay,
    run: Callable[..., tuple[jax.Array, jax.Array]],
    options: dict[str, Any],
) -> jax.Array:
    """Outputs o in which a draft's is that of the last token of a chain: its path."""
    num_tokens, zero = o.shape[0], jnp.int32(0)

    def one(row: jax.Array) -> jax.Array:
        n, inside = owner_of(reqs, row)
        draft, bit = row - reqs.start[n], jnp.arange(MAX_DRAFTS)
        path = (bits_of(words[row]) & (bit < draft)) | (bit == draft)
        rows = jnp.minimum(reqs.start[n] + jnp.argsort(~path, stable=True), num_tokens - 1)
        length = jnp.sum(path, dtype=jnp.int32)
        chain = [x[rows] for x in inputs]
        state = state_pool[reqs.load[n]][None]
        batch = (zero[None], jnp.stack([zero, length]), reqs.resumes[n][None])
        found, _ = run(*chain, state, *batch, decay=rows_of(decay, rows), **options)
        return jnp.where(inside & trees[n], found[length - 1], o[row])

    return lax.map(one, jnp.arange(num_tokens), batch_size=16)


def owner_of(reqs: Requests, row: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The request with a slot that has a row, and whether there is one; any shape of rows."""
    row = row[..., None]
    owns = (row >= reqs.start) & (row < reqs.start + reqs.length) & reqs.live
    return jnp.argmax(owns, axis=-1), jnp.any(owns, axis=-1)


def bits_of(words: jax.Array) -> jax.Array:
    """[..., 64] bool of [..., 1 or 2] uint32, the lowest bit of the first word first."""
    bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1 == 1
    bits = bits.reshape(*words.shape[:-1], -1)
    missing = MAX_DRAFTS - bits.shape[-1]
    return jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, missing)])


def rows_of(decay: Decay, rows: jax.Array) -> Decay:
    """Decays of the tokens `rows`."""
    return decay if isinstance(decay, HeadDecay) else jax.tree.map(lambda x: x[rows], decay)


class Taken(NamedTuple):
    """What becomes of snapshots; [S] each."""

    placed: jax.Array  # a slot of the pool, and a row after which a state can be taken
    taken: jax.Array  # of those, the ones whose slot is theirs
    request: jax.Array


def taken_snapshots(
    snapshots: Snapshots, reqs: Requests, drafts: Drafts | None, num_tokens: int, num_slots: int
) -> Taken:
    """Applies the rules for snapshots: see `gla`."""
    rows, slots = snapshots.rows, snapshots.slots
    n, inside = owner_of(reqs, rows)
    counts = (slots >= 0) & (slots < num_slots) & (rows >= 0) & (rows < num_tokens)
    upto = lax.cummax(jnp.where(counts, rows, -1))
    ascends = rows > jnp.concatenate([jnp.full(1, -1, rows.dtype), upto])[:-1]
    placed = counts & inside & ascends & ~tree_requests(drafts, reqs)[n]
    used = reqs.live & (reqs.length > 0) & (reqs.load == slots[:, None])  # [S, N]
    free = ~jnp.any(used, axis=1)
    if drafts is not None:
        free |= drafts.requests[n] & (reqs.store[n] == slots)
    index = jnp.arange(slots.shape[0])
    rival = (placed & free)[None, :] & (slots[None, :] == slots[:, None])
    last = ~jnp.any(rival & (index[None, :] > index[:, None]), axis=1)
    return Taken(placed, placed & free & last, n)


def tree_requests(drafts: Drafts | None, reqs: Requests) -> jax.Array:
    """[N] whether a request's words of ancestors are read."""
    if drafts is None or drafts.ancestors is None:
        return jnp.zeros_like(reqs.live)
    return drafts.requests & reqs.live & (reqs.length <= MAX_DRAFTS)


def accepted_rows(
    accepted: jax.Array, cu_seqlens: jax.Array, num_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """The accepted rows of a batch, one after another.

    Args:
      accepted: [requests, 1 or 2] uint32, see `commit`.
      cu_seqlens: [requests + 1] row bounds.
      num_tokens: T, rows of the batch.

    Returns:
      [T] the rows, as far as there are any, and the [requests + 1] bounds among them.
    """
    bounds = lax.cummax(jnp.clip(cu_seqlens, 0, num_tokens))
    row = jnp.arange(num_tokens)[:, None]
    owns = (row >= bounds[:-1]) & (row < bounds[1:])  # [T, N]
    draft = row - bounds[:-1]
    words = jnp.pad(accepted, ((0, 0), (0, 2 - accepted.shape[1])))
    word = jnp.where(draft < 32, words[:, 0], words[:, 1])
    bit = (word >> (draft & 31).astype(jnp.uint32)) & 1 == 1
    kept = jnp.any(owns & bit & (draft < MAX_DRAFTS), axis=1)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(kept, dtype=jnp.int32)])
    source = jnp.sum(before[1:] <= row, axis=1)  # the first row with more than so many accepted
    return jnp.minimum(source, max(num_tokens - 1, 0)), before[bounds]


def commit(
    k: jax.Array,
    v: jax.Array,
    state_pool: jax.Array,
    slot_ids: jax.Array,
    cu_seqlens: jax.Array,
    has_state: jax.Array,
    accepted: jax.Array,
    *,
    decay: Decay,
    run: Callable[..., tuple[jax.Array, jax.Array]] = base.chunked,
    **options: Any,
) -> jax.Array:
    """The pool after each request's accepted drafts, which are its ordinary tokens now.

    Args:
      k, v: [tokens, qk_heads, key_dim] and [tokens, heads, value_dim] of the drafts.
      state_pool, slot_ids, cu_seqlens, has_state, decay: as they were when these were verified.
      accepted: [requests, 1 or 2] uint32: bit d of word w accepts a request's draft 32 w + d. Of a
        tree the word of the last accepted draft's ancestors, itself included; of the first n of a
        chain 2^n - 1. Drafts after the first 64 are not accepted.
      run, **options: as in `gla`.
    """
    if not v.shape[0] or not slot_ids.shape[0]:
        return state_pool
    rows, bounds = accepted_rows(accepted, cu_seqlens, v.shape[0])
    k, v = k[rows], v[rows]
    batch = (slot_ids, bounds, has_state)
    return run(k, k, v, state_pool, *batch, decay=rows_of(decay, rows), **options)[1]
