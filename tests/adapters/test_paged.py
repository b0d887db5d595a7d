"""Ragged paged attention of both stacks: arguments and caches mean here what they mean there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import ragged_attention
from adapters import paged, sglang_jax, tpu_inference
from ragged_attention import KVCache
from tests.adapters import batches, oracle
from tests.adapters.batches import BOUNDS, KV_LENS, NUM_PAGES, PAGE, Q_LENS, TOKENS, once
from tpukit.errors import ArgumentError

HEADS, KV_HEADS, DIM = 4, 2, 64
F8, BF16, F32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32
SINKS = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
PARENTS = (-1, 0, 0, 2)  # of the drafts of the last request


@functools.cache
def operands(kv_dtype=F8, q_dtype=F32):
    """Queries, new keys and values, and what all pages hold before the call."""
    rng = np.random.default_rng(2)

    def draw(*shape, dtype=kv_dtype):
        return np.asarray(jnp.asarray(rng.normal(size=shape), dtype))

    new = [draw(TOKENS, KV_HEADS, DIM) for _ in range(2)]
    held = [draw(NUM_PAGES, PAGE, KV_HEADS, DIM) for _ in range(2)]
    return draw(TOKENS, HEADS, DIM, dtype=q_dtype), *new, *held


def tree():
    """[4, 4] which drafts a draft sees."""
    seen = np.eye(len(PARENTS), dtype=bool)
    for child, parent in enumerate(PARENTS):
        if parent >= 0:
            seen[child] |= seen[parent]
    return seen


def trees(request):
    q_len = Q_LENS[request]
    return tree() if q_len == len(PARENTS) else np.tril(np.ones((q_len, q_len), bool))


def flat_mask(aligned, dtype=jnp.int32):
    """SGLang-JAX's: rows of kv_len keys, or of as many as whole pages hold, filled with 1."""
    rows = []
    for request, (q_len, kv_len) in enumerate(zip(Q_LENS, KV_LENS, strict=True)):
        width = -(-kv_len // PAGE) * PAGE if aligned else kv_len
        block = np.ones((q_len, width), np.int32)
        block[:, :kv_len] = oracle.visible(q_len, kv_len, tree=trees(request))
        rows.append(block.ravel())
    return jnp.asarray(np.concatenate(rows), dtype)


def rounded_queries(q, scale):
    top = float(jnp.finfo(F8).max)
    return np.clip(q / scale, -top, top).astype(F8).astype(np.float64) * scale


def expected(q, keys, values, *, k_scale=1.0, v_scale=1.0, q_scale=None, masked=False, **options):
    """Outputs of the tokens of requests, from all keys and values in order of their positions."""
    q = oracle.f64(q) if q_scale is None else rounded_queries(q, q_scale)
    temperature = options.pop("temperature", None)
    causal, window = options.pop("causal", True), options.pop("window", None)
    out = []
    for request, (q_len, kv_len) in enumerate(zip(Q_LENS, KV_LENS, strict=True)):
        position = np.arange(kv_len - q_len, kv_len)
        if temperature:
            beyond = np.log(np.maximum(position, 1)) / np.log(temperature)
            options["temperatures"] = np.where(position > temperature, beyond, 1)
        mask = trees(request) if masked else None
        seen = oracle.visible(q_len, kv_len, causal, window, mask)
        rows = slice(BOUNDS[request], BOUNDS[request + 1])
        k, v = (np.asarray(x[request], np.float64) for x in (keys, values))
        out.append(oracle.attend(q[rows], k * k_scale, v * v_scale, seen, **options))
    return np.concatenate(out)


def by_request(held, new):
    """All keys of each request: what its pages hold, the new ones in their places."""
    found = [[] for _ in KV_LENS]
    for request, _, page, row, token in batches.places():
        found[request].append(held[page, row] if token is None else new[token])
    return [np.stack(rows) for rows in found]


CASES = {
    "tpu plain": ("tpu", {}, {"scale": 1.0}),
    "tpu window": (
        "tpu",
        {"sliding_window": 5, "soft_cap": 2.0, "sm_scale": 0.3},
        {"window": 5, "soft_cap": 2.0, "scale": 0.3},
    ),
    "tpu not causal": ("tpu", {"use_causal_mask": False, "skip_kv_mask": True}, {"causal": False}),
    "tpu scales": ("tpu", {"q_scale": 0.02, "k_scale": 0.3, "v_scale": 1.7}, {}),
    "sgl plain": ("sgl", {}, {"scale": 1.0}),
    "sgl everything": (
        "sgl",
        {
            "attention_sink": SINKS,
            "sliding_window": 7,
            "soft_cap": 3.0,
            "sm_scale": 0.4,
            "xai_temperature_len": 8.0,
        },
        {"window": 7, "soft_cap": 3.0, "scale": 0.4, "sinks": SINKS, "temperature": 8},
    ),
    "sgl drafts": ("sgl", {"causal": 0, "custom_mask": flat_mask(False, bool)}, {"masked": True}),
    "sgl aligned drafts": (
        "sgl",
        {
            "causal": 0,
            "custom_mask": flat_mask(True),
            "mask_aligned_to_cu_kv": True,
            "attention_sink": 0.5,
        },
        {"masked": True, "sinks": [0.5] * HEADS},
    ),
    "sgl unread mask": ("sgl", {"custom_mask": jnp.zeros(1)}, {}),
    "sgl not causal": ("sgl", {"causal": 0, "skip_kv_mask": True}, {"causal": False}),
    "sgl scales": ("sgl", {"q_scale": 0.02, "k_scale": 0.3, "v_scale": 1.7}, {}),
}


def call(stack, q, k, v, cache, *, jit=False, **options):
    """The stack's call; unless it comes once not under jit: what is compiled serves all cases."""
    if stack == "tpu":
        fn, args = tpu_inference.ragged_paged_attention, batches.rectangular()
    else:
        mask, sink = options.pop("custom_mask", None), options.pop("attention_sink", None)
        sink = None if sink is None else jnp.asarray(sink)
        fn, args = sglang_jax.ragged_paged_attention, (*batches.tight(), mask, sink)
    q, k, v = map(jnp.asarray, (q, k, v))
    fn = functools.partial(fn, **options)
    return (once(fn) if jit else fn)(q, k, v, cache, *args)


def close(got, want, tolerance=5e-6):
    error = np.abs(np.asarray(got, np.float64)[: len(want)] - want).max()
    assert error <= tolerance * np.abs(want).max()


def check(name, own=False):
    stack, options, meant = CASES[name]
    q, k, v, held_k, held_v = operands()
    pages = jnp.asarray(batches.interleaved(held_k, held_v))
    cache = ragged_attention.from_interleaved(pages, KV_HEADS, DIM) if own else pages
    options = {"sm_scale": 0.2} | options if "scale" not in meant else options
    out, after = call(stack, q, k, v, cache, **options)
    scales = {key: options[key] for key in ("q_scale", "k_scale", "v_scale") if key in options}
    keys, values = by_request(held_k, k), by_request(held_v, v)
    close(out, expected(q, keys, values, **({"scale": 0.2} | meant | scales)))
    assert not np.asarray(out[BOUNDS[-1] :]).any()
    assert isinstance(after, KVCache) == own
    written = ragged_attention.to_interleaved(after) if own else after
    check_pages(written, held_k, held_v, k, v)


def check_pages(pages, held_k, held_v, k, v):
    """New rows are in their places, the rest of every request and all other pages as before."""
    held_k, held_v = held_k.copy(), held_v.copy()
    for _, _, page, row, token in batches.places():
        if token is not None:
            held_k[page, row], held_v[page, row] = k[token], v[token]
    want = batches.interleaved(held_k, held_v)
    np.testing.assert_array_equal(np.asarray(pages, np.float32), want.astype(np.float32))


@pytest.mark.parametrize("name", CASES)
def test_a_cache_as_the_stack_has_it(name):
    check(name)


@pytest.mark.parametrize("name", ["tpu window", "sgl everything", "sgl scales"])
def test_a_cache_of_our_own(name):
    check(name, own=True)


def test_bfloat16_and_a_type_of_the_result():
    q, k, v, held_k, held_v = operands(BF16, BF16)
    pages = jnp.asarray(batches.interleaved(held_k, held_v))
    want = expected(q, by_request(held_k, k), by_request(held_v, v), scale=0.2)
    out, after = call("tpu", q, k, v, pages, sm_scale=0.2, out_dtype=F32, jit=True)
    assert out.dtype == F32
    close(out, want, 1e-2)
    check_pages(after, held_k, held_v, k, v)
    out, _ = jax.eval_shape(lambda *args: call("sgl", *args), q, k, v, pages)
    assert out.dtype == BF16


def test_heads_over_devices():
    """Inside `shard_map`, as both stacks call it: a cache of ours is split by its columns."""
    q, k, v, held_k, held_v = operands(F32)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    split = PartitionSpec(None, "tensor")  # heads of arrays, columns of a cache
    shape = (NUM_PAGES, PAGE, KV_HEADS // 2, DIM, F32)
    allocate = functools.partial(tpu_inference.new_kv_cache, *shape)
    fill = functools.partial(tpu_inference.ragged_paged_attention, sm_scale=0.2)

    def run(q, k, v, held_k, held_v):
        cache = allocate()
        return fill(q, k, v, ragged_attention.pack_pages(held_k, held_v, cache.layout), *args)

    args = batches.rectangular()
    pages = PartitionSpec(None, None, "tensor")
    over = {"mesh": mesh, "in_specs": (split,) * 3 + (pages,) * 2, "out_specs": (split, split)}
    out, after = once(jax.shard_map(run, **over))(q, k, v, held_k, held_v)
    close(out, expected(q, by_request(held_k, k), by_request(held_v, v), scale=0.2))
    again = {"mesh": mesh, "in_specs": (split,) * 4, "out_specs": (split, split)}
    repeated, _ = once(jax.shard_map(lambda *a: fill(*a, *args), **again))(q, k, v, after)
    np.testing.assert_array_equal(repeated, out)


def test_a_cache_that_holds_everything_is_not_written():
    q, k, _, held_k, held_v = operands()
    pages = jnp.asarray(batches.interleaved(held_k, held_v))
    nothing = np.full_like(k, jnp.nan)
    out, after = call("tpu", q, nothing, nothing, pages, sm_scale=0.2, update_kv_cache=False)
    held = [[h[p, r] for _, _, p, r, _ in batches.places()] for h in (held_k, held_v)]
    split = np.cumsum(KV_LENS)[:-1]
    keys, values = (np.split(np.stack(rows), split) for rows in held)
    close(out, expected(q, keys, values, scale=0.2))
    np.testing.assert_array_equal(after, pages)


def test_a_token_whose_mask_is_no_tree_gets_nan():
    q, k, v, held_k, held_v = operands()
    pages = jnp.asarray(batches.interleaved(held_k, held_v))
    width = KV_LENS[1]
    row = KV_LENS[0] + 2 * width  # of the third query token of the second request
    mask = flat_mask(False).at[row + 4].set(0)  # a key before the query tokens
    last = mask.shape[0] - 2 * KV_LENS[2]  # of the third draft
    mask = mask.at[last + KV_LENS[2] - 1].set(1)  # a later draft
    out, _ = call("sgl", q, k, v, pages, sm_scale=0.2, causal=0, custom_mask=mask)
    bad = np.isnan(np.asarray(out)).all((1, 2))
    assert list(np.nonzero(bad)[0]) == [BOUNDS[1] + 2, BOUNDS[2] + 2]


@pytest.mark.parametrize("cut", [False, True])
def test_a_mask_of_more_drafts_than_a_tree_has_is_causal_or_nan(cut):
    """The words of a request of 70 query tokens, of 75 keys."""
    tokens, kv_len = 70, 75
    requests = paged.Requests(
        batches.i32(kv_len), batches.i32(0, tokens), batches.i32(0), batches.i32(0, 0, 1)
    )
    mask = oracle.visible(tokens, kv_len).astype(np.int32)
    mask[69, 20] = not cut
    words_of = once(lambda mask: paged.ancestors_of(mask, requests, requests.kv_lens, tokens))
    _, is_tree = words_of(jnp.asarray(mask.ravel()))
    assert list(np.nonzero(~np.asarray(is_tree))[0]) == ([69] if cut else [])


@pytest.mark.parametrize(
    ("stack", "options", "argument"),
    [
        ("tpu", {"debug_mode": True}, "debug_mode"),
        ("sgl", {"debug_mode": True}, "debug_mode"),
        ("tpu", {"skip_kv_mask": True}, "skip_kv_mask"),
        ("sgl", {"skip_kv_mask": True}, "skip_kv_mask"),
        ("sgl", {"causal": 2}, "causal"),
        ("sgl", {"xai_temperature_len": 8.5}, "xai_temperature_len"),
        ("tpu", {"soft_cap": 0.0}, "soft_cap"),
        ("tpu", {"sliding_window": 0}, "window"),
    ],
)
def test_what_cannot_be_is_refused_by_name(stack, options, argument):
    q, k, v, held_k, held_v = operands()
    pages = jnp.asarray(batches.interleaved(held_k, held_v))
    with pytest.raises(ArgumentError) as error:
        call(stack, q, k, v, pages, **options)
    assert error.value.argument == argument


def test_new_rows_of_another_type_than_the_cache_are_refused():
    q, k, v, held_k, held_v = operands()
    pages = jnp.asarray(batches.interleaved(held_k, held_v))
    with pytest.raises(ArgumentError, match="keys has dtype bfloat16"):
        call("tpu", q, k.astype(BF16), v.astype(BF16), pages)


def test_a_table_that_is_not_rectangular_is_refused():
    q, k, v, held_k, held_v = (jnp.asarray(x) for x in operands())
    lens, table, bounds, distribution = batches.rectangular()
    pages = jnp.asarray(batches.interleaved(*map(np.asarray, (held_k, held_v))))
    with pytest.raises(ArgumentError, match="page_indices"):
        tpu_inference.ragged_paged_attention(q, k, v, pages, lens, table[:-1], bounds, distribution)


# Seeded faults; each is one that an adapter could have.


def changed(name, change, monkeypatch):
    """Runs `ragged_attention`'s function with arguments changed."""
    right = getattr(ragged_attention, name)

    def wrong(*args, **options):
        args, options = change(list(args), options)
        return right(*args, **options)

    monkeypatch.setattr(ragged_attention, name, wrong)


def swapped(args, options):
    args[1], args[2] = args[2], args[1]
    return args, options


def with_option(**wrong):
    def change(args, options):
        values = {name: make(options.get(name)) for name, make in wrong.items()}
        return args, options | values

    return change


def transposed_table(table):
    return table.reshape(table.shape[::-1]).T if table.ndim == 2 else table[::-1]


FAULTS = {
    "K and V swapped": ("tpu plain", swapped),
    "table read by columns": ("tpu plain", with_option(page_indices=transposed_table)),
    "tight list reversed": ("sgl plain", with_option(page_indices=transposed_table)),
    "offsets in tokens": ("sgl plain", with_option(page_offsets=lambda x: x * PAGE)),
    "offsets off by one": ("sgl plain", with_option(page_offsets=lambda x: x + 1)),
    "all requests": ("tpu plain", with_option(num_requests=lambda n: n + 1)),
    "one request less": ("sgl plain", with_option(num_requests=lambda n: n - 1)),
    "no scale of logits": ("tpu window", with_option(sm_scale=lambda x: None)),
    "window off by one": ("tpu window", with_option(window=lambda x: x + 1)),
    "no soft cap": ("tpu window", with_option(soft_cap=lambda x: None)),
    "k_scale forgotten": ("tpu scales", with_option(q_scale=lambda x: 0.02)),
    "v_scale twice": ("tpu scales", with_option(v_scale=lambda x: x * x)),
    "causal": ("tpu not causal", with_option(causal=lambda x: True)),
    "sinks reversed": ("sgl everything", with_option(sinks=lambda x: x[::-1])),
    "no temperature": ("sgl everything", with_option(temperature_len=lambda x: None)),
    "no tree": ("sgl drafts", with_option(ancestors=lambda x: None)),
    "tree of the next token": ("sgl drafts", with_option(ancestors=lambda x: jnp.roll(x, 1, 0))),
    "mask read": ("sgl unread mask", with_option(causal=lambda x: False)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, monkeypatch):
    name, change = FAULTS[fault]
    changed("ragged_paged_attention", change, monkeypatch)
    with pytest.raises(AssertionError):
        check(name)


def test_a_mask_read_with_other_widths_is_caught(monkeypatch):
    right = paged.ancestors_of
    monkeypatch.setattr(
        paged, "ancestors_of", lambda mask, of, widths, n: right(mask, of, of.kv_lens, n)
    )
    with pytest.raises(AssertionError):
        check("sgl aligned drafts")


def test_a_cache_whose_values_come_first_is_caught(monkeypatch):
    right = ragged_attention.from_interleaved

    def wrong(pages, heads, dim):
        flat = pages.reshape(*pages.shape[:2], heads, 2, -1)[:, :, :, ::-1]
        return right(flat.reshape(pages.shape), heads, dim)

    monkeypatch.setattr(ragged_attention, "from_interleaved", wrong)
    with pytest.raises(AssertionError):
        check("tpu plain")
