"""The package's rooms one by one: layouts, schedules, helpers, and what stands on the kernel."""

import functools
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import ragged_attention as ra
from ragged_attention import plumbing, schedule, tiles
from ragged_attention.layout import CacheLayout, from_words, to_words
from ragged_attention.schedule import END, FENCE, FIRST, LAST, WRITES, Batch, Limits, Record, Walk
from tests.ragged_attention import oracle
from tests.ragged_attention.oracle import random_batch
from tests.ragged_attention.test_ragged_attention import PLAN, bound
from tpukit import interpret

TYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
SCALES = ("k_scale", "v_scale")
SHAPES = [(1, 128, 128), (3, 80, 80), (8, 96, 96), (2, 192, 128), (1, 40, 8), (3, 80, 72)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("heads,key_dim,value_dim", SHAPES)
def test_pages_survive_packing(heads, key_dim, value_dim, dtype):
    layout = CacheLayout(heads, key_dim, value_dim, dtype, 8)
    rng = np.random.default_rng(0)
    keys, values = (
        jnp.asarray(rng.standard_normal((3, 8, heads, dim)) * 9).astype(dtype)
        for dim in (key_dim, value_dim)
    )
    found = ra.pack_pages(keys, values, layout).unpack()
    assert all(oracle.same_bits(a, b) for a, b in zip(found, (keys, values), strict=True))


@pytest.mark.parametrize("heads,key_dim,value_dim", SHAPES)
def test_every_head_lies_in_an_aligned_window_of_the_row(heads, key_dim, value_dim):
    layout = CacheLayout(heads, key_dim, value_dim, "bfloat16", 16)
    assert layout.width - heads * (key_dim + value_dim) in range(128)
    for window in (layout.keys, layout.vals):
        for head in range(heads):
            begin = window.lane(head)
            assert begin % 128 == 0 and 0 <= begin <= layout.width - window.width
            assert 0 <= window.offset(head) <= window.width - window.dim
            assert begin == int(window.lane(jnp.int32(head)))


@pytest.mark.parametrize("page_size", [16, 128])
def test_entries_say_where_pages_are_and_where_runs_of_them_begin(page_size):
    rng = np.random.default_rng(0)
    pages = rng.integers(-2, 210, 300)
    for begin, first, length in ((10, 3, 32), (60, 100, 31), (120, 5, 70), (268, 180, 32)):
        pages[begin : begin + length] = first + np.arange(length)
    layout = CacheLayout(1, 128, 128, "bfloat16", page_size)
    of = types.SimpleNamespace(layout=layout, num_pages=200, page_units=layout.page_rows // 8)
    found = np.asarray(plumbing.entries(jnp.asarray(pages, jnp.int32), of))
    legal = (pages >= 0) & (pages < 200)
    assert ((found & plumbing.MISSING == 1) == ~legal).all()
    assert (tiles.first_unit(found)[legal] == pages[legal] * of.page_units).all()
    begins = [
        len(pages[i : i + 32]) == 32 and legal[i : i + 32].all()
        and (np.diff(pages[i : i + 32]) == 1).all()
        for i in range(300)
    ]  # fmt: skip
    assert sum(begins) == 40
    assert (found >> plumbing.RUN_BIT & 1 == (begins if page_size == 16 else 0)).all()


def test_a_token_takes_its_bytes():
    assert CacheLayout(1, 128, 128, "float8_e4m3fn", 32).token_bytes == 256
    assert CacheLayout(1, 128, 128, "float4_e2m1fn", 32).token_bytes == 128
    assert CacheLayout(1, 64, 64, "bfloat16", 16).token_bytes == 256
    assert CacheLayout(1, 576, 512, "bfloat16", 16, latent=True).token_bytes == 1280


@pytest.mark.parametrize("dtype", TYPES)
def test_words_survive(dtype):
    rows = jnp.asarray(np.random.default_rng(1).standard_normal((16, 128)) * 9).astype(dtype)
    words = to_words(rows)
    assert words.shape == (16 // CacheLayout(1, 64, 64, dtype, 16).pack, 128)
    assert oracle.same_bits(from_words(words, dtype), rows)


@pytest.mark.parametrize(
    "dtype,heads,dim", [("bfloat16", 1, 128), ("float8_e4m3fn", 3, 80), ("float4_e2m1fn", 2, 128)]
)
def test_other_libraries_pages_survive(dtype, heads, dim):
    pack = CacheLayout(heads, dim, dim, dtype, 16).pack
    rng = np.random.default_rng(2)
    pages = jnp.asarray(rng.standard_normal((3, 16, 2 * heads, dim))).astype(dtype)
    theirs = jnp.pad(pages, ((0, 0), (0, 0), (0, -2 * heads % pack), (0, -dim % 128)))
    theirs = theirs.reshape(3, 16, -1, pack, theirs.shape[-1])
    ours = ra.from_interleaved(theirs, heads, dim)
    keys, values = ours.unpack()
    assert oracle.same_bits(keys, pages[:, :, 0::2]) and oracle.same_bits(values, pages[:, :, 1::2])
    assert oracle.same_bits(ra.to_interleaved(ours), theirs)


@pytest.mark.parametrize("cache", [ml_dtypes.bfloat16, np.int8, np.float32])
def test_update_kv_cache_writes_what_attention_writes(cache):
    scale = np.float32(2**-5) if cache == np.int8 else np.float32(1)
    batch = random_batch(
        3, [40, 33, 9], [3, 16, 0], cache=cache, gap=2, k_scale=scale, v_scale=scale
    )
    batch.pages[1] = 10**6
    _, k, v, pool, *rest = batch.args()
    out = ra.update_kv_cache(k, v, pool, *rest, k_scale=scale, v_scale=scale)
    keys, values, _ = oracle.written(batch)
    for found, wanted in zip(out.unpack(), (keys, values), strict=True):
        assert oracle.same_bits(found, wanted)


@pytest.mark.parametrize(("cache", "heads"), [(np.int8, 2), (ml_dtypes.float8_e4m3fn, 8)])
def test_rows_of_the_cache_can_have_scales_of_their_own(cache, heads):
    """By the reference; and written rows are divided by theirs."""
    rng = np.random.default_rng(9)
    scales = {name: rng.uniform(0.02, 0.1, (40, 16, heads)).astype(np.float32) for name in SCALES}
    shape = {"cache": cache, "q_heads": 8, "kv_heads": heads, "gap": 1, "window": np.int32(30)}
    batch = random_batch(9, [40, 33, 9], [3, 16, 0], **shape, **scales)
    args = batch.args()
    out = ra.ragged_paged_attention(*args, **batch.options)
    wanted, _, size = oracle.exact(batch)
    assert (np.abs(np.asarray(out.o, float) - wanted) <= bound(batch, wanted, size)).all()
    update = ra.update_kv_cache(*args[1:], **{n: jnp.asarray(s) for n, s in scales.items()})
    keys, values, _ = oracle.written(batch)
    for found in (out.cache, update):
        for own, right in zip(found.unpack(), (keys, values), strict=True):
            assert oracle.same_bits(own, right)
    assert ra.supports(*args, **batch.options, chip="tpu7x")


def test_partial_results_merge():
    rng = np.random.default_rng(4)
    s, v = rng.standard_normal((5, 2, 30)), rng.standard_normal((30, 2, 8))
    s[3, :, :10], s[4] = -np.inf, -np.inf

    def attend(keys):
        part = s[:, :, keys]
        w = np.where(np.isneginf(part), 0, np.exp(part))
        total = w.sum(axis=2)
        o = np.einsum("thl,lhd->thd", w, v[keys]) / np.where(total == 0, 1, total)[..., None]
        with np.errstate(divide="ignore"):
            return o, np.log(total)

    parts = [attend(keys) for keys in (slice(0, 10), slice(10, 11), slice(11, 30))]
    o, lse = (jnp.asarray(np.stack(x), jnp.float32) for x in zip(*parts, strict=True))
    merged, merged_lse = ra.merge_attention_states(o, lse)
    wanted, wanted_lse = attend(slice(0, 30))
    assert np.allclose(merged, wanted, atol=1e-6)
    assert np.allclose(merged_lse, wanted_lse, atol=1e-6)
    # What a set without keys says does not count; what is not a number is not lost.
    o, lse = o.at[0, 3].set(np.nan), lse.at[1, 0].set(np.nan).at[:, 4].set(-np.inf)
    merged, merged_lse = ra.merge_attention_states(o, lse)
    assert np.isnan(merged[0]).all() and np.isnan(merged_lse[0]).all()
    assert np.allclose(merged[3], wanted[3], atol=1e-6)
    assert not np.asarray(merged[4]).any() and np.isneginf(merged_lse[4]).all()


def test_a_shared_prefix_is_attended_to_once_and_merged():
    batch = random_batch(5, [96, 64], [1, 1], update=False)
    batch.pages[6:10] = batch.pages[:4]  # the second request's keys are the first one's prefix
    q, _, _, cache, _, _, pages, _ = batch.args()

    def part(kv_lens, offsets, indices, causal):
        return ra.ragged_paged_attention(
            q, None, None, cache, jnp.asarray(kv_lens, jnp.int32), jnp.array([0, 1, 2], jnp.int32),
            indices, jnp.asarray(offsets, jnp.int32), causal=causal, return_lse=True,
        )  # fmt: skip

    whole = part([96, 64], [0, 6, 10], pages, True)
    prefix = part([64, 64], [0, 4, 8], jnp.concatenate([pages[:4], pages[:4]]), False)
    rest = part([32, 0], [4, 6, 6], pages, False)
    merged, lse = ra.merge_attention_states(
        jnp.stack([prefix.o, rest.o]), jnp.stack([prefix.lse, rest.lse])
    )
    assert np.allclose(lse[:2], whole.lse[:2], atol=2e-3)
    error = np.asarray(merged[:2], np.float32) - np.asarray(whole.o[:2], np.float32)
    assert np.abs(error).max() < 0.02


@functools.cache
def spread(devices, implementation):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("keys",))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(), P(), P("keys"), P(), P(), P("keys"), P()),
        out_specs=(P(), P(), P("keys")),
    )
    def run(q, k, v, words, kv_lens, cu, pages, offsets):
        layout = CacheLayout(1, 128, 128, "bfloat16", 16)
        out = ra.context_parallel_attention(
            q, k, v, ra.KVCache(words, layout), kv_lens, cu, pages[0], offsets,
            axis_name="keys", keys_per_device=48, implementation=implementation, plan=PLAN,
        )  # fmt: skip
        return out.o, out.lse, out.cache.words

    return run


@pytest.mark.parametrize("devices,implementation", [(4, "reference"), (2, "interpret")])
def test_keys_over_devices(devices, implementation):
    lengths = [48 * devices - 5, 30, 50]
    batch = random_batch(6, lengths, [9, 1, 7], num_pages=24 * devices, indices=24 * devices)
    wanted, wanted_lse, size = oracle.exact(batch)
    q, k, v, _, kv_lens, cu, _, _ = batch.args()
    shape = (devices, 16, 16)  # every device has 16 pages, 3 for each request
    keys, values = (np.zeros((*shape, 1, 128), ml_dtypes.bfloat16) for _ in range(2))
    for r in range(3):
        listed = batch.pages[batch.offsets[r] : batch.offsets[r + 1]]
        for i, page in enumerate(listed):
            keys[i // 3, 3 * r + i % 3] = batch.k_pages[page]
            values[i // 3, 3 * r + i % 3] = batch.v_pages[page]
    layout = CacheLayout(1, 128, 128, "bfloat16", 16)
    flat = [jnp.asarray(x.reshape(-1, 16, 1, 128)) for x in (keys, values)]
    words = ra.pack_pages(*flat, layout).words
    pages = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (devices, 9))
    offsets = jnp.arange(4, dtype=jnp.int32) * 3
    args = (q, k, v, words, kv_lens, cu, pages, offsets)
    if implementation == "interpret":
        with interpret.strict():
            o, lse, words = jax.tree.map(np.asarray, spread(devices, implementation)(*args))
    else:
        o, lse, words = jax.tree.map(np.asarray, spread(devices, implementation)(*args))
    limit = bound(batch, wanted, size) + 2.0**-8 * size
    assert (np.abs(o.astype(float) - wanted) <= limit).all()
    finite = np.isfinite(wanted_lse)
    assert np.allclose(lse[finite], wanted_lse[finite], atol=4e-3)
    new_keys, _, _ = oracle.written(batch)
    found, _ = ra.KVCache(jnp.asarray(words), layout).unpack()
    found = np.asarray(found).reshape(*shape, 1, 128)
    for r, length in enumerate(lengths):
        listed = batch.pages[batch.offsets[r] : batch.offsets[r + 1]]
        for i, page in enumerate(listed):
            live = min(16, length - 16 * i)
            mine = found[i // 3, 3 * r + i % 3][:live]
            assert oracle.same_bits(mine, new_keys[page][:live])


def test_latent_attention_is_attention_over_its_latents():
    batch = random_batch(7, [40, 33], [1, 5], key_dim=192, value_dim=128, latent=True, sm_scale=0.1)
    q, k, _, cache, *rest = batch.args()
    out = ra.mla_ragged_paged_attention(
        q[:, :, :128], q[:, :, 128:], k[:, 0, :128], k[:, 0, 128:], cache, *rest, sm_scale=0.1
    )
    wanted, _, size = oracle.exact(batch)
    assert (np.abs(np.asarray(out.o, float) - wanted) <= bound(batch, wanted, size)).all()
    cache = ra.allocate_mla_cache(40, 16, 128, 64)
    assert cache.words.shape == batch.cache.words.shape and cache.layout == batch.layout


def test_a_page_table_is_a_list_of_pages():
    batch = random_batch(8, [40, 33, 20], [1, 5, 2])
    table = np.full((3, 4), -1, np.int32)
    for r in range(3):
        listed = batch.pages[batch.offsets[r] : batch.offsets[r + 1]]
        table[r, : len(listed)] = listed
    *front, _, _ = batch.args()
    a = ra.ragged_paged_attention(*front, jnp.asarray(table))
    b = ra.ragged_paged_attention(*batch.args())
    assert oracle.same_bits(a.o, b.o) and oracle.same_bits(a.cache.words, b.cache.words)


def records(kv_lens, q_lens, **limits):
    """All records of a batch."""
    offsets = np.cumsum([0, *(-(-n // 16) for n in kv_lens)])
    scalars = (kv_lens, np.cumsum([0, *q_lens]), offsets, [0], [0], [len(kv_lens)])
    batch = Batch(*(jnp.asarray(x, jnp.int32) for x in scalars))
    options = {
        "num_tokens": sum(q_lens), "num_indices": int(offsets[-1]), "block": 16, "tile": 64,
        "page_size": 16, "group": 16, "causal": True, "windowed": False,
        "update": True, "placed": False,
    }  # fmt: skip
    walk = Walk(batch, Limits(**(options | limits)))
    step, cursor, found = jax.jit(walk.record), walk.start(), []
    while True:
        record, cursor = step(cursor)
        record = Record(*map(int, record))
        if record.kind & END:
            return found
        found.append(record)


def test_the_schedule_covers_a_batch_once():
    kv_lens, q_lens = [100, 5, 40, 0, 70], [1, 5, 0, 3, 50]
    found = records(kv_lens, q_lens)
    rows = np.zeros(sum(q_lens), int)
    for record in found:
        if record.kind & FIRST:
            rows[record.row : record.row + record.count] += 1
    assert (rows == 1).all()
    assert sum(bool(r.kind & FIRST) for r in found) == sum(bool(r.kind & LAST) for r in found)
    writes = [r for r in found if r.kind & WRITES]
    written = [p for r in writes for p in range(r.key + r.cached, r.key + r.span)]
    assert written == list(range(20, 70))  # the request of 50 tokens, written before it is read
    fences = [i for i, r in enumerate(found) if r.kind & FENCE]
    assert len(fences) == 1 and max(i for i, r in enumerate(found) if r in writes) < fences[0]
    assert all(r.cached == r.span for r in found[fences[0] :])


def test_positions_of_a_million_tokens():
    found = records([1_048_576], [1], tile=4096)
    first, *_, last = (record for record in found if record.span)
    assert first.key == 0 and last.key + last.span == 1_048_576
    assert last.position == 1_048_575 and last.page == (1_048_576 - 4096) // 16


def test_a_window_skips_to_its_page():
    window = jnp.array([40], jnp.int32)
    batch = Batch(
        jnp.array([1000], jnp.int32), jnp.array([0, 1], jnp.int32), jnp.array([0, 63], jnp.int32),
        window, jnp.zeros(1, jnp.int32), jnp.array([1], jnp.int32),
    )  # fmt: skip
    limits = Limits(1, 63, 16, 64, 16, 16, True, True, True, False)
    walk = Walk(batch, limits)
    record, cursor = walk.record(walk.start())  # the rows before the first request: none
    record, cursor = walk.record(cursor)
    assert (int(record.key), int(record.span), int(record.page)) == (960, 40, 60)
    assert schedule.NEW == -1
