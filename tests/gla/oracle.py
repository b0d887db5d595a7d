"""Independent oracles in numpy float64, batch builders, and error measures.

`exact` is the recurrence. `rounded` does float64 arithmetic on exactly the operands that the kernel
rounds to bf16 before a matrix product, cut into chunks as the kernel cuts them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import gla
from reference import gla as reference

ROWS = 16


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arguments of `gla.gla`, as numpy arrays."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pool: np.ndarray
    slots: np.ndarray
    cu: np.ndarray
    known: np.ndarray
    g: np.ndarray  # [heads], [tokens, heads] or [tokens, heads, key_dim]
    beta: np.ndarray | None = None  # [tokens, heads]

    def args(self):
        return tuple(
            jnp.asarray(x)
            for x in (self.q, self.k, self.v, self.pool, self.slots, self.cu, self.known)
        )

    @property
    def strength(self):
        return None if self.beta is None else jnp.asarray(self.beta)

    @property
    def decay(self):
        return decay_of(jnp.asarray(self.g))


def decay_of(g):
    """The decay that a shape of g stands for."""
    return (gla.HeadDecay, gla.TokenDecay, gla.ChannelDecay)[g.ndim - 1](g)


def chunked(batch, **options):
    """The reference, compiled whole: its operations one by one take many times as long."""
    gates = {"decay": batch.decay, "beta": batch.strength}
    return _chunked(tuple(sorted(options.items())))(batch.args(), gates)


@functools.cache
def _chunked(options):
    return jax.jit(lambda args, gates: reference.chunked(*args, **gates, **dict(options)))


def random_batch(  # noqa: PLR0913  (a batch, by what is special about it)
    seed,
    lengths,
    *,
    tokens=None,
    gap=0,
    qk_heads=2,
    heads=2,
    dims=(128, 128),
    dtype=ml_dtypes.bfloat16,
    state=np.float32,
    per_token=False,
    per_channel=False,
    slots=None,
    known=None,
    strongest=1.0,
    delta=False,
    keys=1.0,
):
    """A batch with requests of the given lengths, `gap` rows before the first.

    With the delta rule, keys have norm `keys`.
    """
    rng = np.random.default_rng(seed)
    count = len(lengths)
    cu = (gap + np.cumsum([0, *lengths])).astype(np.int32)
    tokens = int(cu[-1]) if tokens is None else tokens
    draw = rng.standard_normal
    size = (tokens, heads) if per_token else (heads,)
    size = (tokens, heads, dims[0]) if per_channel else size
    q, k = (draw((tokens, qk_heads, dims[0])) for _ in range(2))
    k = keys * k / np.linalg.norm(k, axis=-1, keepdims=True) if delta else k
    return Batch(
        q=q.astype(dtype),
        k=k.astype(dtype),
        v=draw((tokens, heads, dims[1])).astype(dtype),
        pool=draw((count + 3, heads, *dims)).astype(state),
        slots=(1 + rng.permutation(count) if slots is None else np.asarray(slots)).astype(np.int32),
        cu=cu,
        known=rng.random(count) < 0.6 if known is None else np.asarray(known, bool),
        g=-rng.uniform(1e-5, strongest, size).astype(np.float32),
        beta=rng.uniform(0, 1, (tokens, heads)).astype(np.float32) if delta else None,
    )


def wide(x):
    return np.asarray(x).astype(np.float64)


def bf16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def cut(start, length, window=128, batch_invariant=False):
    """Lengths of the chunks of a request, as documented in gla.schedule."""
    found = []
    row = start
    while length:
        most = window - ROWS if batch_invariant else window - row % ROWS
        found.append(min(length, most))
        row, length = row + found[-1], length - found[-1]
    return found


def rows_of(batch):
    """[N] first row and end of each request, by the documented rules."""
    tokens = batch.q.shape[0]
    bounds = np.maximum.accumulate(np.clip(batch.cu.astype(np.int64), 0, tokens))
    return list(itertools.pairwise(bounds))


def run(batch, request, scale=None, reverse=False):
    """Applies `request(q, k, v, g, state, start, scale[, beta]) -> (o, state)` to each request."""
    heads = batch.v.shape[1]
    group = heads // batch.q.shape[1]
    q, k = (np.repeat(wide(x), group, axis=1) for x in (batch.q, batch.k))
    v, pool = wide(batch.v), wide(batch.pool)
    g = np.clip(wide(batch.g), -30, 0)
    g = np.broadcast_to(g, (len(q), heads)) if g.ndim == 1 else g
    beta = None if batch.beta is None else wide(batch.beta)
    g = g if g.ndim == 3 else g[..., None]  # [tokens, heads, 1 or key_dim]
    scale = batch.q.shape[-1] ** -0.5 if scale is None else scale
    o, after = np.zeros(v.shape), pool.copy()
    for n, (begin, end) in enumerate(rows_of(batch)):
        slot = int(batch.slots[n])
        if begin == end or not 0 <= slot < len(pool):
            continue
        state = pool[slot] if batch.known[n] else np.zeros_like(pool[0])
        part = np.arange(begin, end)[:: -1 if reverse else 1]
        more = {} if beta is None else {"beta": beta[part]}
        tokens = (q[part], k[part], v[part], g[part])
        o[part], after[slot] = request(*tokens, state, begin, scale, **more)
    return o, after


def recurrence(q, k, v, g, state, start, scale, beta=None):
    o = np.empty_like(v)
    for t in range(len(q)):
        state = np.exp(g[t])[:, :, None] * state
        u = v[t]
        if beta is not None:
            u = beta[t][:, None] * (u - np.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t][:, :, None] * u[:, None, :]
        o[t] = scale * np.einsum("hk,hkv->hv", q[t], state)
    return o, state


def exact(batch, scale=None, reverse=False):
    """Output and pool of the definition."""
    return run(batch, recurrence, scale, reverse)


def rounded(batch, *, window=128, batch_invariant=False, reverse=False):
    """Output and pool of float64 arithmetic on the operands that the kernel rounds to bf16."""

    def request(q, k, v, g, state, start, scale, beta=None):
        if len(q) == 1 and not reverse:
            return recurrence(q, k, v, g, state, start, scale, beta)
        outputs, row = [], 0
        for rows in cut(start, len(q), window, batch_invariant)[:: -1 if reverse else 1]:
            part = slice(row, row + rows)
            at = 0 if batch_invariant else (start + row) % ROWS
            strengths = None if beta is None else beta[part]
            tokens = (q[part], k[part], v[part], g[part])
            o, state = chunk(*tokens, state, scale, at, strengths)
            outputs.append(o)
            row += rows
        return np.concatenate(outputs), state

    return run(batch, request, reverse=reverse)


def channel_weights(rows, k, g, first):
    """Products of rows with decayed keys, cut into halves around aligned rows, as the kernel does.

    Blocks of 4 are not cut: their decays are those from the second row of the window's 4.

    Args:
      rows, k, g: [n, key_dim].
      first: place of the first row in its window.
    """
    found = np.zeros((len(k), len(k)))
    index = first + np.arange(len(k))
    for block in np.unique(index // 4):
        here = np.flatnonzero(index // 4 == block)
        second = index[here] % 4 <= 1
        b = np.cumsum(g[here], axis=0) - np.sum(g[here][second], axis=0)
        near = np.tril(bf16(rows[here] * np.exp(b)) @ bf16(k[here] * np.exp(-b)).T, -1)
        found[np.ix_(here, here)] = near + np.diag(np.sum(rows[here] * k[here], axis=1))
    m = 4
    while m < index[-1] + 1:
        for middle in range(m, index[-1] + 1, 2 * m):
            keys = (index >= middle - m) & (index < middle)
            queries = (index >= middle) & (index < middle + m)
            after = np.cumsum(g[keys][::-1], axis=0)[::-1] - g[keys]
            a = bf16(rows[queries] * np.exp(np.cumsum(g[queries], axis=0)))
            found[np.ix_(queries, keys)] = a @ bf16(k[keys] * np.exp(after)).T
        m *= 2
    return found


def two_terms(g):
    """Log decays as the sum of two bf16 numbers, in units of log 2."""
    g = (g * np.log2(np.e)).astype(np.float32)
    high = bf16(g)
    return (high + bf16(g - high)) / np.log2(np.e)


def written(n, missing, first):
    """(I + n)^-1 missing, one half of the window after the other."""
    size = 32
    while size < first + len(n):
        size *= 2
    half = np.clip(size // 2 - first, 0, len(n))

    def solve(part, missing):
        inverse = np.linalg.inv(np.eye(len(missing)) + n[part, part])
        return bf16(bf16(inverse) @ bf16(missing))

    one, two = slice(half), slice(half, None)
    u = solve(one, missing[one])
    return np.concatenate([u, solve(two, missing[two] - bf16(n[two, one]) @ u)])


def chunk(q, k, v, g, state, scale, first=0, beta=None):
    per_channel = g.shape[2] > 1
    g = two_terms(g) if per_channel else g
    b = np.cumsum(g, axis=0)
    early, late = (scale, 1) if beta is None and not per_channel else (1, scale)
    lower = np.tril(np.ones((len(q), len(q)), bool))
    o, new = np.empty_like(v), np.empty_like(state)
    for h in range(v.shape[1]):

        def pairs(rows, h=h):
            if per_channel:
                return channel_weights(rows, k[:, h], g[:, h], first)
            difference = np.where(lower, b[:, None, h, 0] - b[None, :, h, 0], -np.inf)
            return (rows @ k[:, h].T) * np.exp(difference)

        def read(rows, h=h):
            if per_channel:
                return bf16(rows * np.exp(b[:, h])) @ bf16(state[h])
            return (rows @ bf16(state[h])) * np.exp(b[:, h])

        u = v[:, h]
        if beta is not None:
            strength = beta[:, h, None]
            u = written(
                strength * np.tril(pairs(k[:, h]), -1), strength * (u - read(k[:, h])), first
            )
        o[:, h] = late * (bf16(early * pairs(q[:, h])) @ u + early * read(q[:, h]))
        decayed = bf16(k[:, h] * np.exp(b[-1, h] - b[:, h]))
        new[h] = np.exp(b[-1, h])[:, None] * state[h] + decayed.T @ u
    return o, new


def error(found, wanted, axis=None):
    """Relative Frobenius error; with an axis the worst row's."""
    found, wanted = wide(found), wide(wanted)
    difference = np.sqrt(np.sum((found - wanted) ** 2, axis=axis))
    size = np.sqrt(np.sum(wanted**2, axis=axis))
    return float(np.max(difference / np.maximum(size, 1e-30))) if difference.size else 0.0


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()
