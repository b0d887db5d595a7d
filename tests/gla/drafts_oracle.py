"""Oracles in numpy float64 for drafts, their acceptance, and snapshots; see `tests.gla.oracle`."""

from __future__ import annotations

import numpy as np

from tests.gla import oracle
from tests.gla.oracle import bf16, recurrence, rows_of, wide

MAX_DRAFTS = 64


def words_of(parents):
    """[tokens, 2] uint32 words of the drafts of requests, given each draft's parent or -1."""
    words = []
    for request in parents:
        paths = []
        for draft, parent in enumerate(request):
            paths.append((1 << draft) | (paths[parent] if parent >= 0 else 0))
        words += [(path & 0xFFFFFFFF, path >> 32 & 0xFFFFFFFF) for path in paths]
    return np.array(words, np.uint32).reshape(-1, 2)


def random_words(rng, lengths, tokens):
    """Words of random trees; zeros where there is no request."""
    parents = [[int(rng.integers(-1, i)) if i else -1 for i in range(n)] for n in lengths]
    words = words_of(parents)
    return np.concatenate([words, np.zeros((tokens - len(words), 2), np.uint32)])


def bits(words):
    """Numbers of the bits that are set."""
    value = sum(int(word) << (32 * w) for w, word in enumerate(words))
    return [d for d in range(MAX_DRAFTS) if value >> d & 1]


def seen(words):
    """[n, n] whether draft i sees draft j."""
    mask = np.eye(len(words), dtype=bool)
    for i, word in enumerate(words):
        mask[i, [d for d in bits(word) if d < i]] = True
    return mask


def along_paths(q, k, v, g, state, words, scale):
    """Output of each draft at the end of its path."""
    o = np.empty_like(v)
    for i, row in enumerate(seen(words)):
        path = np.flatnonzero(row)
        o[i] = recurrence(q[path], k[path], v[path], g[path], state, 0, scale)[0][-1]
    return o


def along_paths_rounded(q, k, v, g, state, words, scale):
    """The same on the operands that the kernel rounds to bf16."""
    mask, o = seen(words), np.empty_like(v)
    for h in range(v.shape[1]):
        b = mask @ g[:, h, 0]
        decay = np.where(mask, np.exp(np.where(mask, b[:, None] - b[None], 0)), 0)
        weights = bf16((q[:, h] @ k[:, h].T) * (scale * decay))
        o[:, h] = weights @ v[:, h] + (q[:, h] @ bf16(state[h])) * (scale * np.exp(b))[:, None]
    return o


def chunks(q, k, v, g, state, start, scale, cuts, window):
    """Output and states after the rows of `cuts` and the last, as the kernel cuts and rounds."""
    o, states, row = np.empty_like(v), [], 0
    for end in [*cuts, len(q)]:
        for rows in oracle.cut(start + row, end - row, window):
            part = slice(row, row + rows)
            at = (start + row) % oracle.ROWS
            o[part], state = oracle.chunk(q[part], k[part], v[part], g[part], state, scale, at)
            row += rows
        states.append(state)
    return o, states


def steps(q, k, v, g, state, start, scale, cuts, window):
    """The same by the definition."""
    o, states, row = np.empty_like(v), [], 0
    for end in [*cuts, len(q)]:
        part = slice(row, end)
        o[part], state = recurrence(q[part], k[part], v[part], g[part], state, start, scale)
        states.append(state)
        row = end
    return o, states


def taken(batch, snapshots, draft, tree):
    """(request, row, slot, whether it may be written) of the snapshots that cut a request."""
    found, highest, bounds = [], -1, rows_of(batch)
    slots = len(batch.pool)
    has = [0 <= s < slots and e > b for s, (b, e) in zip(batch.slots, bounds, strict=True)]
    for row, slot in zip(*snapshots, strict=True):
        if not (0 <= slot < slots and 0 <= row < len(batch.q)):
            continue
        ascends, highest = row > highest, max(row, highest)
        owners = [n for n, (b, e) in enumerate(bounds) if b <= row < e and has[n]]
        if not owners or not ascends:
            continue
        n = owners[0]
        if tree is not None and draft[n] and bounds[n][1] - bounds[n][0] <= MAX_DRAFTS:
            continue
        others = [m for m in range(len(has)) if has[m] and batch.slots[m] == slot]
        own = bool(others) and others[-1] == n and bool(draft[n])
        found.append((n, int(row), int(slot), not others or own))
    return found


def run(batch, draft=None, words=None, snapshots=((), ()), *, rounded=False, window=128):
    """Output and pool."""
    draft = np.zeros(len(batch.slots), bool) if draft is None else draft
    cuts = taken(batch, snapshots, draft, words)
    paths = along_paths_rounded if rounded else along_paths
    last = {int(slot): n for n, slot in enumerate(batch.slots) if np.diff(rows_of(batch)[n])[0] > 0}
    pool, written = wide(batch.pool).copy(), {}

    def request(q, k, v, g, state, start, scale):
        n = next(n for n, (b, e) in enumerate(rows_of(batch)) if b == start and e > b)
        mine = [c for c in cuts if c[0] == n]
        if words is not None and draft[n] and 1 < len(q) <= MAX_DRAFTS:
            return paths(q, k, v, g, state, words[start : start + len(q)], scale), state
        one = len(q) == 1 and not mine
        ends = [row + 1 - start for _, row, _, _ in mine]
        form = chunks if rounded and not one else steps
        o, states = form(q, k, v, g, state, start, scale, ends, window)
        for (_, _, slot, free), after in zip(mine, states, strict=False):
            if free:
                written[slot] = after
        return o, states[-1]

    o, after = oracle.run(batch, request)
    for slot, n in last.items():
        if 0 <= slot < len(pool) and not draft[n]:
            pool[slot] = after[slot]
    for slot, state in written.items():
        pool[slot] = state
    return o, pool


def accepted(batch, words):
    """The batch of the accepted drafts alone."""
    rows, lengths = [], []
    for (begin, end), word in zip(rows_of(batch), words, strict=True):
        mine = [begin + d for d in bits(word) if begin + d < end]
        rows += mine
        lengths.append(len(mine))
    values = vars(batch) | {name: getattr(batch, name)[rows] for name in ("q", "k", "v")}
    values["cu"] = np.cumsum([0, *lengths]).astype(np.int32)
    values["g"] = batch.g if batch.g.ndim == 1 else batch.g[rows]
    return oracle.Batch(**values)
