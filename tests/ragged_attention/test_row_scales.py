"""Scales of every cached row: against float64 and the reference; who may read them."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ragged_attention as ra
from ragged_attention.plan import style_of
from tests.ragged_attention import oracle
from tests.ragged_attention.oracle import random_batch
from tests.ragged_attention.test_ragged_attention import (
    EAGER,
    LATE,
    PLAN,
    bound,
    check_cache,
    check_gates,
    run,
    tree,
)
from tpukit.chips import chip
from tpukit.errors import ArgumentError

V7 = chip("tpu7x")
E4M3, E5M2, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn
BOTH = ("k_scale", "v_scale")
SINKS = np.linspace(-2, 3, 4).astype(np.float32)
WINDOWS = np.array([5, 0, 40, 1, 300, 8], np.int32)
DRAFTS = np.array([tree([-1, *(i // 2 for i in range(31))])] * 4, np.uint32).reshape(-1, 1)
LATENT = {"key_dim": 192, "value_dim": 128, "latent": True}
# A decode, drafts, a prefill that is written ahead, nothing, more drafts, one token.
LENGTHS = [70, 33, 60, 0, 100, 1], [1, 2, 36, 0, 5, 1]


def small(seed, kv_lens, q_lens):
    """Six requests of one shape, whose compiled kernel several tests have in common."""
    missing = [0] * (6 - len(kv_lens))
    return scaled(seed, (kv_lens + missing, q_lens + missing), cache=E4M3)


def scaled(seed, lengths, names=BOTH, **more):
    """A batch with scales of rows; NaN in every row that belongs to no request."""
    batch = random_batch(seed, *lengths, **more)
    rng, shape = np.random.default_rng(seed), batch.k_pages.shape[:3]
    low, high = (0.02, 0.1) if batch.layout.dtype == "int8" else (0.5, 2)
    live = oracle.written(batch)[2]
    for name in names:
        drawn = rng.uniform(low, high, shape)
        if batch.layout.pack <= 2:  # wide types show how a quotient was rounded
            drawn = 2.0 ** np.rint(np.log2(drawn))
        batch.options[name] = drawn.astype(np.float32)
        batch.options[name][~live] = np.nan
    return batch


KINDS = {
    "e4m3, two heads": {"cache": E4M3, "kv_heads": 2},
    "int8, page of 8, windows, sinks": {
        "cache": np.int8, "page_size": 8, "num_pages": 60, "window": WINDOWS, "sinks": SINKS,
    },
    "f32 over bf16, page of 128, dim 80, 3 heads, soft cap": {
        "dtype": np.float32, "page_size": 128, "num_pages": 8, "key_dim": 80, "q_heads": 6,
        "kv_heads": 3, "soft_cap": 3.0,
    },
    "e5m2, page of 256, values only, not causal, no update": {
        "cache": E5M2, "page_size": 256, "num_pages": 8, "names": ["v_scale"], "causal": False,
        "update": False,
    },
    "bf16, page of 64, keys only, a window": {
        "page_size": 64, "num_pages": 16, "names": ["k_scale"], "window": np.int32(17),
    },
    "e2m1, page of 32, scale of queries": {
        "cache": E2M1, "page_size": 32, "kv_heads": 2, "q_scale": np.float32(0.7),
    },
    "latents, e4m3, page of 128": {**LATENT, "cache": E4M3, "page_size": 128, "num_pages": 8},
    "latents, int8, windows": {**LATENT, "cache": np.int8, "window": WINDOWS},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    batch = scaled(1, LENGTHS, gap=1, **KINDS[kind])
    check_gates(batch, run(batch))


def test_tiles_begin_anywhere_in_a_block():
    """Pages of 16 put the first key of a request anywhere; windows that of a tile."""
    lengths = [700, 1300, 520, 1100], [1, 3, 30, 1]
    windows = np.array([613, 0, 30, 1000], np.int32)
    batch = scaled(2, lengths, num_pages=240, indices=230, cache=E4M3, window=windows)
    check_gates(batch, run(batch))


def test_trees():
    batch = scaled(3, ([90, 100], [32, 7]), tokens=128, cache=E4M3, ancestors=DRAFTS)
    check_gates(batch, run(batch, plan=dataclasses.replace(PLAN, queries=64)))


def test_blocks_of_many_queries_are_rows():
    shape = {"q_heads": 8, "kv_heads": 2, "tokens": 256, "num_pages": 60, "indices": 60}
    batch = scaled(4, ([600, 150], [90, 150]), cache=E4M3, **shape)
    plan = dataclasses.replace(PLAN, queries=64)
    problem = ra.explain(*batch.args(), **batch.options, chip="tpu7x", plan=plan).problem
    without = dataclasses.replace(problem, k_scales=False, v_scales=False)
    assert style_of(without, 64, V7).columns and not style_of(problem, 64, V7).columns
    check_gates(batch, run(batch, plan=plan))


@pytest.mark.parametrize("page_size", [16, 128])
def test_races_and_both_dma_modes(page_size):
    """As late as possible with four tiles, and as early as possible, watched, with two."""
    batch = small(5, [40, 5, 60, 0, 300, 20], [3, 0, 36, 0, 1, 2])
    if page_size != 16:
        more = {"page_size": page_size, "num_pages": 8, "cache": E4M3, "kv_heads": 2}
        batch = scaled(5, ([40, 5, 600, 20], [3, 0, 30, 1]), **more)
    plan = ra.Plan(queries=32, keys=512, tiles=2, blocks=2)
    late = run(batch, LATE, dataclasses.replace(PLAN, queries=plan.queries))
    eager = run(batch, EAGER, plan)
    check_gates(batch, late)
    assert oracle.same_bits(late.o, eager.o) and oracle.same_bits(late.lse, eager.lse)
    assert oracle.same_bits(late.cache.words, eager.cache.words)


@pytest.mark.parametrize("page_size", [16, 256])
def test_hostile_pages_are_never_addresses(page_size):
    """Pages that are not in the pool read as zeros, though the ones at its ends have NaN scales."""
    batch, last = small(6, [70, 60, 40], [1, 20, 3]), 39
    if page_size != 16:
        more = {"page_size": page_size, "num_pages": 30, "kv_heads": 2, "cache": E4M3}
        batch, last = scaled(6, ([1120, 60, 40], [1, 20, 3]), **more), 29
    for name in BOTH:
        batch.options[name][[0, last]] = np.nan
    batch.pages[(batch.pages == 0) | (batch.pages == last)] = -1
    for place, page in ((0, -5), (3, 10**9), (5, last + 1), (6, -(2**31))):
        batch.pages[place] = page
    check_gates(batch, run(batch))
    offsets = np.resize(batch.offsets, len(batch.offsets))
    offsets[:4], offsets[4:] = (0, 3, 4, 4), 4
    check_gates(short := dataclasses.replace(batch, offsets=offsets), run(short))


def test_requests_with_pages_in_common():
    """Bounds of pages in disorder: each place of the list has its scales, whoever reads it."""
    batch = small(10, [70, 60, 40], [1, 20, 3])
    options = {name: np.nan_to_num(batch.options[name], nan=1.0) for name in BOTH}
    offsets = np.array([2, 7, 1, 6, 6, 6, 6], np.int32)
    batch = dataclasses.replace(batch, offsets=offsets, k=None, v=None, options=options)
    check_gates(batch, run(batch))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_stays_with_the_queries_that_see_it(name, value):
    clean = small(7, [40, 70, 60, 75], [1, 4, 20, 36])
    bad = dataclasses.replace(clean, options=clean.options | {name: clean.options[name].copy()})
    for r, back in ((1, 2), (2, 19), (3, 8)):  # so many positions before the end
        page, row = divmod(int(clean.kv_lens[r]) - back, 16)
        bad.options[name][clean.pages[clean.offsets[r] + page], row] = value
    with np.errstate(invalid="ignore"):
        wanted, _, _ = oracle.exact(bad)
    sees = ~np.isfinite(wanted).all(axis=(1, 2))
    assert sees.sum() > 20 and (~sees).sum() > 20
    before, after = run(clean).o, run(bad).o
    assert not np.isfinite(after[sees].astype(np.float32)).all(axis=2).any()
    assert oracle.same_bits(after[~sees], before[~sees])


@pytest.mark.parametrize(("kv_len", "q_len"), [(60, 1), (60, 6), (77, 40)])
def test_batch_invariance(kv_len, q_len):
    alone = small(8, [kv_len], [q_len])
    wanted = run(alone).o[:q_len]
    for seed, before, after in ((1, 2, 1), (2, 0, 3)):
        kv_lens = [30] * before + [kv_len] + [20] * after
        others = small(seed, kv_lens, [5] * before + [q_len] + [3] * after)
        row = 5 * before
        for name in ("q", "k", "v"):
            getattr(others, name)[row : row + q_len] = getattr(alone, name)[:q_len]
        pools = ((others.k_pages, alone.k_pages), (others.v_pages, alone.v_pages))
        pools += tuple((others.options[name], alone.options[name]) for name in BOTH)
        for i in range(-(-kv_len // 16)):
            target, source = others.pages[others.offsets[before] + i], alone.pages[i]
            for theirs, mine in pools:
                theirs[target] = mine[source]
        assert oracle.same_bits(run(others).o[row : row + q_len], wanted)


def test_scales_of_heads_are_those_of_all_their_rows():
    batch = random_batch(9, *LENGTHS, gap=1, cache=E5M2, kv_heads=2)  # e4m3 has other products
    pair = np.array([0.5, 2.0], np.float32)  # powers of two round nothing
    heads = run(dataclasses.replace(batch, options=dict.fromkeys(BOTH, pair)))
    rows = np.broadcast_to(pair, (*batch.k_pages.shape[:2], 2))
    found = run(dataclasses.replace(batch, options=dict.fromkeys(BOTH, rows)))
    assert oracle.same_bits(found.o, heads.o) and oracle.same_bits(found.lse, heads.lse)
    assert oracle.same_bits(found.cache.words, heads.cache.words)


def test_validate_names_a_bad_scale_of_a_row_that_a_request_has():
    batch = small(11, [40, 33], [1, 2])
    options = {name: batch.options[name].copy() for name in BOTH}
    page = batch.pages[batch.offsets[1] + 2]  # of whose rows the request has the first

    def validate():
        arrays = {name: jnp.asarray(scale) for name, scale in options.items()}
        ra.ragged_paged_attention(*batch.args(), **arrays, validate=True)

    validate()  # NaN in rows of nobody
    options["v_scale"][page, 1] = 0.0
    validate()
    options["v_scale"][page, 0] = 0.0
    with pytest.raises(ArgumentError, match=rf"v_scale has 0.0 at index \[{page}, 0, 0\]"):
        validate()


@settings(max_examples=10)
@example(q_lens=[0] * 6, more=[0] * 6, seed=0)
@example(q_lens=[1] * 6, more=[0] * 6, seed=1)
@example(q_lens=[60, 0, 1, 0, 0, 3], more=[0, 0, 15, 3, 0, 31], seed=2)
@given(
    q_lens=st.lists(st.sampled_from([0, 1, 1, 2, 5, 10]), min_size=6, max_size=6),
    more=st.lists(st.integers(0, 50), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_drawn_batches(q_lens, more, seed):
    batch = small(seed, [q + m for q, m in zip(q_lens, more, strict=True)], q_lens)
    out = run(batch)
    wanted, _, size = oracle.exact(batch)
    assert (np.abs(out.o.astype(float) - wanted) <= bound(batch, wanted, size)).all()
    check_cache(batch, out.cache)
