"""The kernel, interpreted: accuracy gates, bit-exact gates, and drawn batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ragged_attention as ra
from ragged_attention import plan as plan_module
from reference import ragged_attention as reference
from tests.ragged_attention import oracle
from tests.ragged_attention.oracle import random_batch
from tpukit import interpret

LATE, EAGER = interpret.MODES
PLAN = ra.Plan(queries=16, keys=512, tiles=4, blocks=2)
ARRAYS = ("window", "ancestors", "sinks", "q_scale", "k_scale", "v_scale", "query_starts")


@functools.cache
def compiled(mode, plan, statics):
    """A jitted call per static choice: the reference without a plan, else the kernel.

    The mode only keeps traces apart.
    """
    how = {"implementation": "interpret", "plan": plan} if plan else {"implementation": "reference"}

    @jax.jit
    def call(args, arrays):
        return ra.ragged_paged_attention(*args, **dict(statics), **arrays, **how)

    return call


def split(batch, more):
    """Static options, and those that are arrays."""
    options = {"return_lse": True} | batch.options | more
    arrays = {n: jnp.asarray(options.pop(n)) for n in ARRAYS if options.get(n) is not None}
    return tuple(sorted(options.items())), arrays


def legal(plan, batch):
    """The plan with the least changes that the layout needs."""
    return dataclasses.replace(plan, keys=plan.keys * batch.layout.words_per_row)


def run(batch, mode=LATE, plan=None, **more):
    """The kernel's results under the strict harness, as numpy arrays."""
    if plan is None:
        plan = legal(PLAN, batch)
    statics, arrays = split(batch, more)
    with interpret.strict(mode):
        return jax.tree.map(np.asarray, compiled(mode, plan, statics)(batch.args(), arrays))


def plain(batch):
    """The reference's results."""
    statics, arrays = split(batch, {})
    return compiled(None, None, statics)(batch.args(), arrays)


# Gate A. Weights are rounded once (2^-9 of each, above and below the line of the quotient), the
# output once. Queries in two halves are short of f32 by 2^-16 of a logit. Nothing else rounds.
def bound(batch, wanted, size):
    if batch.q.dtype == np.float32:
        return 2e-6 * size + 1e-6
    unit = 2.0**-9
    queries = 3 * unit if np.ndim(batch.options.get("q_scale", 1.0)) else 0  # rounded to bf16
    queries += 3 * unit if "temperature_len" in batch.options else 0
    return (2 * unit + queries + 2e-3) * size + unit * np.abs(wanted) + 1e-6


def check_gates(batch, out):
    """Gates A and B, and the cache bit for bit."""
    wanted, lse, size = oracle.exact(batch)
    o = out.o.astype(np.float64)
    assert not np.isnan(o).any()
    assert (np.abs(o - wanted) <= bound(batch, wanted, size)).all()
    finite = np.isfinite(lse)
    assert (np.isneginf(out.lse) == ~finite).all()
    tolerance = 1e-5 if batch.q.dtype == np.float32 else 4e-3
    assert np.abs(out.lse[finite] - lse[finite]).max(initial=0) <= tolerance
    own = np.linalg.norm(np.asarray(plain(batch).o, np.float64) - wanted)
    assert np.linalg.norm(o - wanted) <= 1.1 * own + 1e-6 * np.linalg.norm(wanted)
    check_cache(batch, out.cache)


def check_cache(batch, cache):
    """Rows of requests are what was written; others untouched, or 0 in a request's last group."""
    keys, values, live = oracle.written(batch)
    before, after = (oracle.unpack(words, batch.layout) for words in (batch.cache, cache))
    for wanted, old, new in zip((keys, values), before, after, strict=True):
        old, new = np.asarray(old), np.asarray(new)
        assert oracle.same_bits(new[live], wanted.astype(new.dtype)[live])
        same = new.view(np.uint8) == old.view(np.uint8)
        untouched = same.reshape(*live.shape, -1).all(axis=2)
        zero = (new == 0).reshape(*live.shape, -1).all(axis=2) & in_last_group(batch, live)
        assert (live | untouched | zero).all()


def in_last_group(batch, live):
    """Rows behind a request's last key in the group that is written with it."""
    group = min(batch.layout.group, batch.layout.page_size)
    grouped = live.reshape(live.shape[0], -1, group).any(axis=2)
    return np.repeat(grouped, group, axis=1) & ~live


MIXES = {
    "decode": ([40, 1, 100, 16, 33], [1] * 5),
    "empty requests among others": ([40, 5, 60, 0, 70, 20], [3, 0, 20, 0, 0, 2]),
    "prefill from nothing": ([16, 33, 1, 7], [16, 33, 1, 7]),
    "drafts and chunks": ([100, 90, 64], [4, 8, 40]),
    "one token": ([1], [1]),
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix):
    batch = random_batch(
        0, *(MIXES[mix][i] + [0] * (6 - len(MIXES[mix][i])) for i in (0, 1)), gap=2
    )
    check_gates(batch, run(batch))


E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
SINKS = np.linspace(-2, 3, 4).astype(np.float32)
WINDOWS = np.array([5, 0, 40, 1, 300, 8], np.int32)
# Each option stands in several combinations, so that it is tested and not only with its neighbours.
KINDS = {
    "f32, windows, sinks": {
        "dtype": np.float32,
        "cache": np.float32,
        "window": WINDOWS,
        "sinks": SINKS,
    },
    "f32 over bf16, dim 96, soft cap": {
        "dtype": np.float32,
        "key_dim": 96,
        "kv_heads": 2,
        "soft_cap": 3.0,
    },
    "bf16 over f32, GQA 3, not causal": {
        "cache": np.float32,
        "q_heads": 12,
        "kv_heads": 4,
        "causal": False,
    },
    "int8, its scales, page of 8, dim 64": {
        "cache": np.int8,
        "k_scale": np.float32(2**-5),
        "v_scale": np.float32(2**-6),
        "page_size": 8,
        "key_dim": 64,
    },
    "e4m3, page of 32, dims 192 and 128, sm_scale": {
        "cache": E4M3,
        "page_size": 32,
        "num_pages": 20,
        "key_dim": 192,
        "value_dim": 128,
        "sm_scale": -0.1,
    },
    "e2m1, scales, page of 64": {
        "cache": ml_dtypes.float4_e2m1fn,
        "k_scale": np.float32(0.5),
        "v_scale": np.array([0.5, 0.25], np.float32),
        "kv_heads": 2,
        "page_size": 64,
        "num_pages": 20,
    },
    "e5m2, dim 80, 3 heads, a window": {
        "cache": E5M2,
        "key_dim": 80,
        "kv_heads": 3,
        "q_heads": 6,
        "window": np.int32(17),
    },
    "page of 8, MQA, 5 heads, not causal, a window": {
        "page_size": 8,
        "q_heads": 5,
        "causal": False,
        "window": np.int32(30),
    },
    "page of 256, dim 112, sinks, temperature": {
        "page_size": 256,
        "num_pages": 8,
        "key_dim": 112,
        "kv_heads": 2,
        "sinks": SINKS,
        "temperature_len": 20,
    },
    "dim 256, q scale per head, soft cap": {
        "key_dim": 256,
        "q_scale": np.array([0.5, 1, 2, 0.7], np.float32),
        "soft_cap": 5.0,
    },
    "latent, q scale per token": {
        "key_dim": 192,
        "value_dim": 128,
        "latent": True,
        "q_scale": np.linspace(0.5, 2, 64, dtype=np.float32)[:, None],
    },
    "latent, e4m3, windows": {
        "key_dim": 192,
        "value_dim": 128,
        "latent": True,
        "cache": E4M3,
        "window": WINDOWS,
    },
    "dim 64, sinks, scales per head": {
        "key_dim": 64,
        "kv_heads": 2,
        "sinks": SINKS,
        "q_scale": np.float32(1.7),
        "k_scale": np.array([0.5, 2.0], np.float32),
        "v_scale": np.array([3.0, 0.25], np.float32),
    },
    "no update": {"update": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    batch = random_batch(1, [70, 33, 60, 0, 100, 1], [1, 2, 36, 0, 5, 1], gap=1, **KINDS[kind])
    check_gates(batch, run(batch))


def test_a_tile_is_not_all_of_a_context():
    batch = random_batch(2, [700, 1300, 520], [1, 3, 30], num_pages=200, indices=180, page_size=16)
    check_gates(batch, run(batch))


def test_adjacent_pages():
    """Pages in order, but for one: some groups of them move together, some do not."""
    batch = random_batch(17, [700, 1300, 520], [1, 3, 30], num_pages=200, indices=180)
    batch.pages[:160] = np.arange(20, 180)
    batch.pages[50] = 3
    check_gates(batch, run(batch))


def test_a_window_skips_pages():
    batch = random_batch(
        3, [1300, 1200], [1, 20], num_pages=200, indices=180, window=np.array([30, 100], np.int32)
    )
    poisoned = batch.k_pages.copy()
    for r, last in ((0, 1300 - 30), (1, 1180 - 100 + 1)):
        for page in batch.pages[batch.offsets[r] :][: last // 16]:
            poisoned[page] = np.nan  # pages before the window are never read
    out, other = run(batch), run(dataclasses.replace(batch, k_pages=poisoned))
    check_gates(batch, out)
    assert oracle.same_bits(out.o, other.o)


def chain(length):
    return [(1 << (i + 1)) - 1 for i in range(length)]


def tree(parents):
    words = []
    for i, parent in enumerate(parents):
        words.append((words[parent] if parent >= 0 else 0) | 1 << i)
    return words


@pytest.mark.parametrize("words", [1, 2])
def test_tree_masks(words):
    longest = 32 * words
    rng = np.random.default_rng(4)
    parents = [-1, *(int(rng.integers(-1, i)) for i in range(1, longest))]
    masks = tree([-1, 0, 0, 1, 1, 2]) + tree(parents) + chain(3)
    tokens = 128
    bits = np.zeros((tokens, words), np.uint32)
    for i, mask in enumerate(masks):
        bits[i] = [mask >> 32 * w & 0xFFFFFFFF for w in range(words)]
    kv_lens, q_lens = [50, 40 + longest, 3], [6, longest, 3]
    batch = random_batch(5, kv_lens, q_lens, tokens=tokens, ancestors=bits)
    plan = dataclasses.replace(PLAN, queries=64)
    check_gates(batch, run(batch, plan=plan))
    causal = bits.copy()
    for begin, count in ((0, 6), (6, longest), (6 + longest, 3)):
        for i, mask in enumerate(chain(count)):
            causal[begin + i] = [mask >> 32 * w & 0xFFFFFFFF for w in range(words)]
    as_tree = run(dataclasses.replace(batch, options={"ancestors": causal}), plan=plan)
    untreed = run(dataclasses.replace(batch, options={}), plan=plan)
    assert oracle.same_bits(as_tree.o, untreed.o)


@pytest.mark.parametrize("queries", [32, 64])
def test_large_blocks(queries):
    """The style of prefill: halves of queries, sums by the matrix unit, heads in a loop."""
    batch = random_batch(
        6, [600, 150], [90, 150], q_heads=8, kv_heads=4, tokens=256, num_pages=60, indices=60
    )
    check_gates(batch, run(batch, plan=dataclasses.replace(PLAN, queries=queries)))


def test_races_and_both_dma_modes():
    batch = random_batch(7, [40, 5, 60, 0, 70, 20], [3, 0, 20, 0, 1, 2])
    plan = dataclasses.replace(PLAN, tiles=2)
    late, eager, again = (run(batch, mode, plan) for mode in (LATE, EAGER, LATE))
    for other in (eager, again):
        assert oracle.same_bits(late.o, other.o) and oracle.same_bits(late.lse, other.lse)
        assert oracle.same_bits(late.cache.words, other.cache.words)


def test_records_that_write_to_one_page_do_not_race():
    batch = random_batch(7, [180, 30], [75, 1], page_size=128, num_pages=4, indices=4, tokens=128)
    plan = dataclasses.replace(PLAN, tiles=2)
    for mode in (LATE, EAGER):
        check_gates(batch, run(batch, mode, plan))


def test_rings_and_checks_change_no_bit():
    batch = random_batch(
        8, [700, 20, 600, 90, 33, 1], [1, 2, 40, 8, 1, 1], num_pages=120, indices=120
    )
    wanted = run(batch)
    for tiles, blocks in ((2, 2), (8, 4)):
        out = run(batch, plan=dataclasses.replace(PLAN, tiles=tiles, blocks=blocks))
        assert oracle.same_bits(out.o, wanted.o)
        assert oracle.same_bits(out.cache.words, wanted.cache.words)
    unchecked = run(batch, bounds_checks=False)
    assert oracle.same_bits(unchecked.o, wanted.o)


RESIDENT = {  # with requests that write ahead, and of one token each
    "all kinds": ([700, 0, 20, 600, 90, 33], [1, 0, 2, 40, 8, 1], EAGER, {"tokens": 64}),
    "decode": ([40, 520, 0, 16, 0, 1], [1, 1, 0, 1, 1, 1], LATE, {"tokens": 16}),
}


@pytest.mark.parametrize("kind", RESIDENT)
def test_what_stays_on_the_chip_changes_no_bit(kind):
    """Queries and outputs of a small batch do, but for where logarithms are wanted."""
    kv_lens, q_lens, mode, more = RESIDENT[kind]
    batch = random_batch(18, kv_lens, q_lens, num_pages=120, indices=120, gap=2, **more)
    wanted, out = run(batch), run(batch, mode, return_lse=False)
    assert oracle.same_bits(out.o, wanted.o)
    assert oracle.same_bits(out.cache.words, wanted.cache.words)


def test_a_streamed_list_of_pages_changes_no_bit(monkeypatch):
    batch = random_batch(
        9, [700, 20, 600, 90, 33, 1], [1, 2, 40, 8, 1, 1], num_pages=140, indices=300
    )
    batch.pages = np.roll(batch.pages, 125)
    batch.offsets = batch.offsets + 125
    wanted = run(batch)
    check_gates(batch, wanted)
    monkeypatch.setattr(plan_module, "RESIDENT_PAGES", 10)
    compiled.cache_clear()
    out = run(batch)
    compiled.cache_clear()
    assert oracle.same_bits(out.o, wanted.o)
    assert oracle.same_bits(out.cache.words, wanted.cache.words)


@pytest.mark.parametrize("kv_len,q_len", [(60, 1), (60, 6), (77, 40)])
def test_batch_invariance(kv_len, q_len):
    alone = random_batch(10, [kv_len], [q_len], tokens=64)
    wanted = run(alone).o[:q_len]
    for seed, before, after in ((1, 2, 1), (2, 0, 3)):
        others = random_batch(
            seed, [30] * before + [kv_len] + [20] * after, [5] * before + [q_len] + [3] * after
        )
        n, row = before, 5 * before
        for name in ("q", "k", "v"):
            getattr(others, name)[row : row + q_len] = getattr(alone, name)[:q_len]
        for i in range(-(-kv_len // 16)):
            target, source = others.pages[others.offsets[n] + i], alone.pages[i]
            others.k_pages[target], others.v_pages[target] = (
                alone.k_pages[source],
                alone.v_pages[source],
            )
        others = padded(others, 6)
        assert oracle.same_bits(run(others).o[row : row + q_len], wanted)


def padded(batch, requests):
    """The batch with empty requests behind it."""
    more = requests - len(batch.kv_lens)
    return dataclasses.replace(
        batch,
        kv_lens=np.pad(batch.kv_lens, (0, more)),
        cu=np.pad(batch.cu, (0, more), mode="edge"),
        offsets=np.pad(batch.offsets, (0, more), mode="edge"),
    )


@pytest.mark.parametrize("where", ["q", "k", "v", "k_pages", "v_pages"])
def test_nan_stays_in_its_request(where):
    clean = random_batch(11, [40, 70, 20], [1, 5, 20])
    wanted = run(clean)
    bad = dataclasses.replace(clean, **{where: getattr(clean, where).copy()})
    row = clean.pages[clean.offsets[1]] if "pages" in where else clean.cu[1]
    getattr(bad, where)[row] = np.nan
    o = run(bad).o.astype(np.float32)
    mine = slice(clean.cu[1], clean.cu[2])
    assert np.isnan(o[mine]).any()
    others = np.r_[0 : mine.start, mine.stop : len(o)]
    assert oracle.same_bits(run(bad).o[others], wanted.o[others])


def test_garbage_behind_the_keys_is_not_seen():
    batch = random_batch(12, [5, 17, 40], [1, 1, 6])
    wanted = run(batch)
    for name in ("k_pages", "v_pages"):
        _, _, live = oracle.written(batch)
        getattr(batch, name)[~live] = np.nan
    assert oracle.same_bits(run(batch).o, wanted.o)


def test_hostile_pages_are_never_addresses():
    batch = random_batch(13, [70, 60, 40], [1, 20, 3])
    for place, page in ((1, -5), (4, 10**9), (6, 40), (8, -(2**31))):
        batch.pages[place] = page
    check_gates(batch, run(batch))
    short = dataclasses.replace(batch, offsets=np.array([0, 3, 4, 4], np.int32))
    check_gates(short, run(short))


def test_bounds_in_disorder_are_made_monotone():
    batch = random_batch(14, [40, 20, 30], [4, 3, 2])
    for cu in ([4, 2, 9, 7], [-3, 5, 70, 99], [0, 0, 0, 0]):
        bad = dataclasses.replace(batch, cu=np.array(cu, np.int32))
        out = run(bad)
        error = out.o.astype(np.float32) - np.asarray(plain(bad).o, np.float32)
        assert np.abs(error).max() <= 0.03


def test_the_number_of_requests_is_a_value():
    batch = random_batch(15, [40, 20, 30], [4, 3, 2])
    kernel = compiled(LATE, PLAN, (("return_lse", True),))
    for count in (0, 1, 3, 7, -1):
        with interpret.strict():
            out = jax.tree.map(np.asarray, kernel((*batch.args(), jnp.int32(count)), {}))
        live = min(max(count, 0), 3)
        part = dataclasses.replace(
            batch,
            kv_lens=batch.kv_lens[:live],
            cu=batch.cu[: live + 1],
            offsets=batch.offsets[: live + 1],
        )
        wanted, _, size = oracle.exact(part)
        assert (np.abs(out.o.astype(float) - wanted) <= bound(part, wanted, size)).all()
        check_cache(part, out.cache)


@settings(max_examples=12)
@example(q_lens=[0] * 6, more=[0] * 6, seed=0)
@example(q_lens=[1] * 6, more=[0] * 6, seed=1)
@example(q_lens=[60, 0, 1, 0, 0, 3], more=[0, 0, 15, 3, 0, 31], seed=2)
@given(
    q_lens=st.lists(st.sampled_from([0, 1, 1, 2, 5, 16, 17]), min_size=6, max_size=6),
    more=st.lists(st.integers(0, 50), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_drawn_batches(q_lens, more, seed):
    kv_lens = [q + m for q, m in zip(q_lens, more, strict=True)]
    batch = random_batch(seed, kv_lens, q_lens, tokens=112, num_pages=60, indices=60)
    out = run(batch)
    wanted, _, size = oracle.exact(batch)
    assert (np.abs(out.o.astype(float) - wanted) <= bound(batch, wanted, size)).all()
    check_cache(batch, out.cache)


def test_auto_is_the_reference_here_and_interpret_is_not(monkeypatch):
    batch = random_batch(16, [20, 9], [3, 1])
    auto = ra.ragged_paged_attention(*batch.args())
    plain = ra.ragged_paged_attention(*batch.args(), implementation="reference")
    assert oracle.same_bits(auto.o, plain.o)

    def refuse(*args, **kwargs):
        raise AssertionError("the fallback ran")

    monkeypatch.setattr(reference, "attend", refuse)
    run(batch)
