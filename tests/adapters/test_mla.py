"""Latent attention of both stacks: arguments and caches mean here what they mean there."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import ragged_attention
from adapters import paged, sglang_jax, tpu_inference
from ragged_attention import KVCache
from tests.adapters import batches, oracle
from tests.adapters.batches import BOUNDS, KV_LENS, NUM_PAGES, PAGE, Q_LENS, TOKENS, once
from tpukit.errors import ArgumentError

HEADS, RANK, ROPE = 3, 160, 64  # a latent that fills no whole number of 128 lanes
F8, BF16, F32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32
SCALES = {"q_scale": 0.8, "k_scale": 0.3, "v_scale": 1.7}
OPTIONS = {"sliding_window": 5, "soft_cap": 2.0}


@functools.cache
def operands(kv_dtype=F8, q_dtype=F32):
    """Queries, new rows, and what all pages hold; latents and rotated parts side by side."""
    rng = np.random.default_rng(3)

    def draw(*shape, dtype):
        return np.asarray(jnp.asarray(rng.normal(size=shape), dtype))

    width = RANK + ROPE
    new, held = (draw(*shape, width, dtype=kv_dtype) for shape in ((TOKENS,), (NUM_PAGES, PAGE)))
    return draw(TOKENS, HEADS, width, dtype=q_dtype), new, held


def expected(q, new, held, *, window=None, soft_cap=None, q_scale=1, k_scale=1, v_scale=1):
    rows = [[] for _ in KV_LENS]
    for request, _, page, row, token in batches.places():
        rows[request].append(held[page, row] if token is None else new[token])
    out = []
    for request, (q_len, kv_len) in enumerate(zip(Q_LENS, KV_LENS, strict=True)):
        keys = oracle.f64(np.stack(rows[request]))[:, None]
        seen = oracle.visible(q_len, kv_len, window=window)
        own = slice(BOUNDS[request], BOUNDS[request + 1])
        scale = 0.1 * q_scale * k_scale
        out.append(oracle.attend(q[own], keys, keys[..., :RANK], seen, scale, soft_cap) * v_scale)
    return np.concatenate(out)


def call(stack, q, new, cache, *, jit=False, **options):
    q, new = jnp.asarray(q), jnp.asarray(new)
    latent, rope, rows = q[..., :RANK], q[..., RANK:], (new[:, :RANK], new[:, RANK:])
    options = {"sm_scale": 0.1} | options
    stacks = {
        "sgl": (sglang_jax.mla_ragged_paged_attention, batches.tight()),
        "tpu": (tpu_inference.mla_ragged_paged_attention, batches.rectangular()),
    }
    fn, batch = stacks[stack]
    fn = functools.partial(fn, **options)
    latent = latent.swapaxes(0, 1) if stack == "tpu" else latent
    out, cache = (once(fn) if jit else fn)(latent, rope, *rows, cache, *batch)
    return out.swapaxes(0, 1) if stack == "tpu" else out, cache


CASES = {  # a stack, the packing of its cache (0: transposed, None: ours), options
    "tpu": ("tpu", 4, {}),
    "tpu options": ("tpu", 4, OPTIONS),
    "tpu packed beyond a word": ("tpu", 8, SCALES),
    "tpu transposed": ("tpu", 0, {}),
    "tpu ours": ("tpu", None, SCALES),
    "sgl": ("sgl", 4, {}),
    "sgl scales": ("sgl", 4, SCALES),
    "sgl ours": ("sgl", None, OPTIONS),
}


def check(name):
    stack, packing, options = CASES[name]
    q, new, held = operands()

    def laid_out(rows):
        pages = batches.latents(rows, RANK, packing or 1)
        if packing == 0:  # and no more lanes than there have to be
            return pages[:, :, 0, : 256 + ROPE].swapaxes(1, 2)
        return pages

    cache = jnp.asarray(laid_out(held))
    layout = ragged_attention.CacheLayout(1, RANK + ROPE, RANK, held.dtype.name, PAGE, latent=True)
    if packing is None:
        cache = ragged_attention.pack_pages(jnp.asarray(held)[:, :, None], None, layout)
    how = {"transpose_kv_cache": True} if packing == 0 else {}
    out, after = call(stack, q, new, cache, **options, **how)
    meant = {"window": options.get("sliding_window"), "soft_cap": options.get("soft_cap")}
    want = expected(q, new, held, **(options if options is SCALES else meant))
    assert out.shape == (TOKENS, HEADS, RANK)
    error = np.abs(np.asarray(out, np.float64)[: len(want)] - want).max()
    assert error <= 5e-6 * np.abs(want).max()
    assert not np.asarray(out[BOUNDS[-1] :]).any()
    written = held.copy()
    for _, _, page, row, token in batches.places():
        if token is not None:
            written[page, row] = new[token]
    if packing is None:
        assert isinstance(after, KVCache) and after.layout == layout
        after, want = after.unpack()[0][:, :, 0], written
    else:
        want = laid_out(written)
    np.testing.assert_array_equal(np.asarray(after, np.float32), want.astype(np.float32))


@pytest.mark.parametrize("name", CASES)
def test_results_and_cache(name):
    check(name)


def test_float8_queries_give_float8_results_from_a_cache_that_was_allocated():
    """As the stacks' kernels write their results where the queries were."""
    q, new, held = operands(F8, F8)
    cache = tpu_inference.new_mla_cache(NUM_PAGES, PAGE, RANK, ROPE, F8)
    out, after = call("tpu", q, new, cache, **SCALES, jit=True)
    want = expected(q, new, np.zeros_like(held), **SCALES)
    assert out.dtype == F8 and isinstance(after, KVCache) and after.layout == cache.layout
    got = np.asarray(out, np.float64)[: len(want)]
    assert (np.abs(got - want) <= 0.07 * np.abs(want) + 4e-3).all()


@pytest.mark.parametrize("stack", ["tpu", "sgl"])
def test_what_cannot_be_is_refused_by_name(stack):
    q, new, held = operands()
    cache = jnp.asarray(batches.latents(held, RANK, 4))
    wrong = [
        ({"debug_mode": True}, cache, new, "debug_mode"),
        ({}, cache[..., :256], new, "cache_kv"),
        ({}, cache, new.astype(BF16), "new_kv_c"),
        ({}, paged.new_mla_cache(8, PAGE, 128, ROPE, F8), new, "cache"),
        ({"sliding_window": 0}, cache, new, "window"),
    ]
    for options, pages, rows, argument in wrong:
        with pytest.raises(ArgumentError) as error:
            call(stack, q, rows, pages, **options)
        assert error.value.argument == argument


def test_queries_with_tokens_first_are_refused_where_heads_come_first():
    q, new, held = operands()
    cache = jnp.asarray(batches.latents(held, RANK, 4))
    q, new = jnp.asarray(q), jnp.asarray(new)
    rows = new[:, :RANK], new[:, RANK:]
    with pytest.raises(ArgumentError, match="q_pe"):
        tpu_inference.mla_ragged_paged_attention(
            q[..., :RANK], q[..., RANK:], *rows, cache, *batches.rectangular()
        )


def test_an_allocated_cache_is_as_wide_as_the_stacks():
    cache = paged.new_mla_cache(NUM_PAGES, PAGE, 512, 64, BF16)
    assert cache.layout.latent and cache.layout.width == 640 and cache.num_pages == NUM_PAGES


# Seeded faults; each is one that an adapter could have.


def transposed_heads(args, options):
    """Heads and tokens of the latent queries in each other's places, where both may be."""
    shape = args[0].shape
    args[0] = args[0].reshape(shape[1], shape[0], -1).swapaxes(0, 1)
    return args, options


def with_option(**wrong):
    def change(args, options):
        return args, options | {name: make(options[name]) for name, make in wrong.items()}

    return change


def rope_first(args, options):
    args[2], args[3] = (
        jnp.roll(jnp.concatenate(args[2:4], 1), ROPE, 1)[:, :RANK],
        jnp.concatenate(args[2:4], 1)[:, :ROPE],
    )
    return args, options


FAULTS = {
    "transposed latent": ("tpu", transposed_heads),
    "latent and rope exchanged": ("tpu", rope_first),
    "table read by columns": (
        "tpu",
        with_option(page_indices=lambda x: x.reshape(x.shape[::-1]).T),
    ),
    "offsets in tokens": ("sgl", with_option(page_offsets=lambda x: x * PAGE)),
    "scale of keys twice": ("sgl scales", with_option(q_scale=lambda x: x * 0.3)),
    "scale of values forgotten": ("sgl scales", with_option(v_scale=lambda x: None)),
    "scale of logits forgotten": ("sgl", with_option(sm_scale=lambda x: 1.0)),
    "no window": ("tpu options", with_option(window=lambda x: None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, monkeypatch):
    name, change = FAULTS[fault]
    right = ragged_attention.mla_ragged_paged_attention

    def wrong(*args, **options):
        args, options = change(list(args), options)
        return right(*args, **options)

    monkeypatch.setattr(ragged_attention, "mla_ragged_paged_attention", wrong)
    with pytest.raises(AssertionError):
        check(name)


@pytest.mark.parametrize("name", ["tpu", "tpu transposed"])
def test_lanes_that_are_not_where_the_stack_has_them_are_caught(name, monkeypatch):
    right = paged.latents_of

    def wrong(where, pages, rank, rope_dim, transposed):
        pages = jnp.roll(pages, 256 - RANK, 1 if transposed else -1)
        return right(where, pages, rank, rope_dim, transposed)

    monkeypatch.setattr(paged, "latents_of", wrong)
    with pytest.raises(AssertionError):
        check(name)
