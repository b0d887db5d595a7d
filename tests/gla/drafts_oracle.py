"""Oracles in numpy float64 for drafts, their acceptance, and snapshots; see `tests.gla.oracle`."""

from __future__ import annotations

import numpy as np

from tests.gla import oracle
from tests.gla.oracle import bf16, rows_of, wide

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
        o[i] = recurrence(q[path], k[path], v[path], g[path], state, scale)[0][-1]
    return o


def along_paths_rounded(q, k, v, g, state, words, scale):
    """The same on the operands that the kernel rounds to bf16."""
    return rounded(q, k, v, g, state, seen(words), scale)[0]


def recurrence(q, k, v, g, state, scale):
    """The definition. g: [n, heads, 1 or key_dim]."""
    o = np.empty_like(v)
    for t in range(len(q)):
        state = np.exp(g[t])[:, :, None] * state + k[t][:, :, None] * v[t][:, None, :]
        o[t] = scale * np.einsum("hk,hkv->hv", q[t], state)
    return o, state


def rounded(q, k, v, g, state, mask, scale):
    """A chunk whose row i sees the rows mask[i], on the operands that the kernel rounds to bf16."""
    o, new = np.empty_like(v), np.empty_like(state)
    for h in range(v.shape[1]):
        b = mask @ g[:, h, 0]
        decay = np.where(mask, np.exp(np.where(mask, b[:, None] - b[None], 0)), 0)
        weights = bf16((q[:, h] @ k[:, h].T) * (scale * decay))
        o[:, h] = weights @ v[:, h] + (q[:, h] @ bf16(state[h])) * (scale * np.exp(b))[:, None]
        decayed = bf16(k[:, h] * np.exp(np.minimum(b[-1] - b, 0))[:, None])
        new[h] = np.exp(b[-1]) * state[h] + decayed.T @ v[:, h]
    return o, new


def in_parts(q, k, v, g, state, start, scale, cuts, window):
    """Output and states after the rows of `cuts` and the last; window: as rounded, or None."""
    o, states, row = np.empty_like(v), [], 0
    for end in [*cuts, len(q)]:
        lengths = oracle.cut(start + row, end - row, window) if window else [end - row]
        for rows in lengths:
            part = slice(row, row + rows)
            tokens = (q[part], k[part], v[part], g[part], state)
            lower = np.tril(np.ones((rows, rows), bool))
            form = rounded(*tokens, lower, scale) if window else recurrence(*tokens, scale)
            o[part], state = form
            row += rows
        states.append(state)
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


def run(batch, draft=None, words=None, snapshots=((), ()), *, window=None):
    """Output and pool; with a window, as the kernel cuts into such windows and rounds."""
    bounds, pool, group = rows_of(batch), wide(batch.pool), batch.v.shape[1] // batch.q.shape[1]
    draft = np.zeros(len(bounds), bool) if draft is None else draft
    q, k = (np.repeat(wide(x), group, axis=1) for x in (batch.q, batch.k))
    g = np.clip(wide(batch.g), -30, 0)
    g = np.broadcast_to(g, (len(q), len(g))) if g.ndim == 1 else g
    g = g if g.ndim == 3 else g[..., None]
    v, scale = wide(batch.v), batch.q.shape[-1] ** -0.5
    o, after, cuts = np.zeros(v.shape), pool.copy(), taken(batch, snapshots, draft, words)
    for n, (begin, end) in enumerate(bounds):
        slot, part = int(batch.slots[n]), slice(begin, end)
        if begin == end or not 0 <= slot < len(pool):
            continue
        state = pool[slot] if batch.known[n] else np.zeros_like(pool[0])
        tokens = (q[part], k[part], v[part], g[part], state)
        if words is not None and draft[n] and 1 < end - begin <= MAX_DRAFTS:
            paths = along_paths_rounded if window else along_paths
            o[part], states, mine = paths(*tokens, words[part], scale), [pool[slot]], []
        else:
            mine = [cut for cut in cuts if cut[0] == n]
            ends = [row + 1 - begin for _, row, _, _ in mine]
            one = end - begin == 1 and not mine  # decoded, without rounding
            size = None if one else window
            o[part], states = in_parts(*tokens, begin, scale, ends, size)
        after[slot] = pool[slot] if draft[n] else states[-1]
        for (_, _, target, free), taken_state in zip(mine, states, strict=False):
            if free:
                after[target] = taken_state
    return o, after


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
