"""One ragged batch, as each of the stacks describes it, and its caches, as each lays them out."""

import jax
import jax.numpy as jnp
import numpy as np

PAGE, NUM_PAGES, WIDTH = 8, 12, 3  # tokens of a page, pages of the pool, pages of a request's row
KV_LENS, Q_LENS = (13, 20, 9), (1, 6, 4)
REQUESTS, ROOM = len(KV_LENS), len(KV_LENS) + 1  # and one that does not count
BOUNDS = np.concatenate([[0], np.cumsum(Q_LENS)])
TOKENS = BOUNDS[-1] + 2  # and two of no request
PAGES = ((4, 9), (1, 11, 6), (7, 2))


def i32(*values):
    return jnp.asarray(values, jnp.int32)


def rectangular():
    """tpu-inference: kv_lens, page table, bounds, distribution."""
    table = np.zeros((ROOM, WIDTH), np.int32)
    for request, pages in enumerate(PAGES):
        table[request, : len(pages)] = pages
    bounds = [*BOUNDS, TOKENS]  # of the request that does not count they may be anything
    return i32(*KV_LENS, 5), i32(*table.ravel()), i32(*bounds), i32(1, 1, REQUESTS)


def tight():
    """SGLang-JAX: kv_lens, pages, bounds, page-aligned sums of kv_lens, distribution."""
    lens, _, bounds, distribution = rectangular()
    pages = [page for pages in PAGES for page in pages] + [0] * 4
    sums = np.cumsum([0, *(PAGE * len(pages) for pages in PAGES), 0])
    return lens, i32(*pages), bounds, i32(*sums), distribution


def place(request, position):
    """Page and row of a token."""
    return PAGES[request][position // PAGE], position % PAGE


def places():
    """Every token: request, position, page, row, and which new token it is, or None."""
    for request, (kv_len, q_len) in enumerate(zip(KV_LENS, Q_LENS, strict=True)):
        for position in range(kv_len):
            new = position - (kv_len - q_len)
            token = BOUNDS[request] + new if new >= 0 else None
            yield request, position, *place(request, position), token


def interleaved(keys, values):
    """The stacks' pages from [pages, PAGE, heads, dim]: K and V of a head in rows side by side."""
    heads, dim = keys.shape[2:]
    pack = 4 // np.dtype(keys.dtype).itemsize
    rows = -(-2 * heads // pack) * pack
    pages = np.zeros((NUM_PAGES, PAGE, rows, -(-dim // 128) * 128), keys.dtype)
    for head in range(heads):
        pages[:, :, 2 * head, :dim] = keys[:, :, head]
        pages[:, :, 2 * head + 1, :dim] = values[:, :, head]
    return pages.reshape(NUM_PAGES, PAGE, rows // pack, pack, -1)


def latents(keys, rank, packing):
    """The stacks' pages from [pages, PAGE, rank + rope_dim], both parts from a multiple of 128."""
    begin = -(-rank // 128) * 128
    rope = keys.shape[-1] - rank
    pages = np.zeros((NUM_PAGES, PAGE, begin + -(-rope // 128) * 128), keys.dtype)
    pages[..., :rank], pages[..., begin : begin + rope] = keys[..., :rank], keys[..., rank:]
    return pages.reshape(NUM_PAGES, PAGE // packing, packing, -1)


def once(fn):
    """Jitted for a single run: quick to compile."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})
