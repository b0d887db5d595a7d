"""Latents of which two tokens share a row: nothing of one may reach the other."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import ragged_attention as ra
from ragged_attention import chunks, row_scales, tiles
from ragged_attention.layout import CacheLayout
from tests.ragged_attention import oracle
from tests.ragged_attention.oracle import random_batch
from tests.ragged_attention.test_mutations import passes
from tests.ragged_attention.test_nonfinite import stays
from tests.ragged_attention.test_ragged_attention import (
    EAGER,
    LATE,
    PLAN,
    check_gates,
    compiled,
    legal,
    run,
    tree,
)
from tests.ragged_attention.test_row_scales import scaled
from tpukit import interpret

pytestmark = pytest.mark.needs("interpreted faults")

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
SHAPE = {"key_dim": 192, "value_dim": 128, "latent": True}
SINKS = np.linspace(-2, 3, 4).astype(np.float32)
WINDOWS = np.array([5, 0, 40, 1, 300, 8], np.int32)
DRAFTS = np.array([tree([-1, *(i // 2 for i in range(31))])] * 4, np.uint32).reshape(-1, 1)
LENGTHS = [70, 33, 60, 0, 300, 1], [1, 2, 60, 0, 5, 1]
# The smallest page of each type in which two tokens share a row.
KINDS = {
    "bf16, page of 32, sinks": {"page_size": 32, "sinks": SINKS},
    "bf16, page of 256, 16 rotated lanes, not causal": {
        "page_size": 256, "num_pages": 8, "key_dim": 144, "causal": False,
    },
    "f32, page of 16, soft cap": {
        "cache": np.float32, "dtype": np.float32, "page_size": 16, "soft_cap": 3.0,
    },
    "e4m3, page of 64, windows": {"cache": E4M3, "page_size": 64, "window": WINDOWS},
    "e5m2, page of 128, no update": {
        "cache": E5M2, "page_size": 128, "num_pages": 12, "update": False,
    },
    "int8, page of 64, rank 256": {
        "cache": np.int8, "page_size": 64, "key_dim": 320, "value_dim": 256,
    },
}  # fmt: skip


def batch_of(kind="bf16, page of 32, sinks", seed=50, **more):
    return random_batch(seed, *LENGTHS, tokens=80, gap=1, **SHAPE | KINDS[kind] | more)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    batch = batch_of(kind)
    assert batch.layout.words_per_row == 2
    check_gates(batch, run(batch))


@pytest.mark.parametrize("keys", [1024, 4096])
def test_tiles_and_chunks_behind_each_other(keys):
    """With new rows and windows on both sides of where a tile ends."""
    windows = np.array([0, 1200, 0], np.int32)
    shape = {"page_size": 32, "num_pages": 160, "indices": 160, "window": windows}
    batch = random_batch(52, [1040, 1300, 2500], [30, 20, 1], **SHAPE, **shape)
    check_gates(batch, run(batch, plan=ra.Plan(queries=32, keys=keys, tiles=4, blocks=2)))


def test_blocks_smaller_than_a_group():
    """Prefill in blocks of 8 tokens, rows written 64 at a time; the whole batch in VMEM or not."""
    shape = {"page_size": 64, "num_pages": 12, "cache": E4M3}
    batch = random_batch(53, [100, 33, 70], [60, 1, 3], **SHAPE, **shape)
    plan = ra.Plan(queries=8, keys=1024, tiles=2, blocks=2)
    out, resident = run(batch, plan=plan), run(batch, plan=plan, return_lse=False)
    check_gates(batch, out)
    assert oracle.same_bits(out.o, resident.o)
    assert oracle.same_bits(out.cache.words, resident.cache.words)


def test_bytes_of_a_token():
    def token_bytes(dtype, page_size, rank=512, rope=64):
        return CacheLayout(1, rank + rope, rank, dtype, page_size, latent=True).token_bytes

    assert token_bytes("bfloat16", 32) == 1152 and token_bytes("bfloat16", 16) == 1280
    assert token_bytes("float8_e4m3fn", 64) == 576 and token_bytes("float8_e4m3fn", 32) == 640
    assert token_bytes("bfloat16", 128, rope=32) == 1152
    assert token_bytes("bfloat16", 128, rope=96) == 1280  # two do not fit 128 lanes
    assert token_bytes("bfloat16", 128, rank=448) == 1024  # no lane is free
    assert token_bytes("bfloat16", 128, rope=0) == 1024


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn", "float4_e2m1fn"])
def test_pages_survive_packing(dtype):
    layout = CacheLayout(1, 192, 128, dtype, 128, latent=True)
    assert layout.words_per_row == 2
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.standard_normal((3, 128, 1, 192)) * 9).astype(dtype)
    cache = ra.pack_pages(keys, None, layout)
    assert cache.words.shape == (3 * layout.page_rows, 384)
    found = cache.unpack()
    assert oracle.same_bits(found[0], keys) and oracle.same_bits(found[1], keys[..., :128])
    order = np.asarray(layout.place(jnp.arange(1024)))
    assert sorted(order) == list(range(1024))
    words = layout.place(jnp.arange(1024 // layout.pack), layout.pack)
    assert (np.asarray(words) == order[:: layout.pack] // layout.pack).all()


@pytest.mark.parametrize("kind", ["bf16, page of 32, sinks", "e4m3, page of 64, windows"])
def test_rows_are_written_without_attending(kind):
    batch = batch_of(kind)
    found = ra.update_kv_cache(*batch.args()[1:])
    keys, _, live = oracle.written(batch)
    before, after = (np.asarray(cache.unpack()[0]) for cache in (batch.cache, found))
    assert oracle.same_bits(after[live], keys[live])
    assert oracle.same_bits(after[~live], before[~live])


def test_trees():
    batch = batch_of(ancestors=np.resize(DRAFTS, (80, 1)))
    batch = dataclasses.replace(batch, cu=np.array([0, 1, 3, 35, 35, 40, 41], np.int32))
    check_gates(batch, run(batch, plan=legal(dataclasses.replace(PLAN, queries=64), batch)))


def scaled_batch(page_size, **more):
    shape = {"page_size": page_size, "num_pages": 20, "cache": E4M3}
    return scaled(51, ([300, 520, 60, 90], [1, 3, 30, 1]), **SHAPE, **shape, **more)


@pytest.mark.parametrize("page_size", [64, 128])
def test_scales_of_rows(page_size):
    batch = scaled_batch(page_size, window=WINDOWS[:4])
    check_gates(batch, run(batch))


@pytest.mark.parametrize("kind", ["bf16, page of 32, sinks", "e4m3, page of 64, windows"])
def test_races_and_both_dma_modes(kind):
    batch = batch_of(kind)
    plan = legal(ra.Plan(queries=32, keys=512, tiles=2, blocks=2), batch)
    late, eager = run(batch, LATE), run(batch, EAGER, plan)
    check_gates(batch, late)
    assert oracle.same_bits(late.o, eager.o)
    assert oracle.same_bits(late.cache.words, eager.cache.words)


def test_pages_that_are_not_in_the_pool():
    batch = batch_of()
    batch.pages[1], batch.pages[6] = -5, 10**9
    check_gates(batch, run(batch))


def contained():
    """Whether what is not finite stays with the queries that see it, and not its row's other."""
    lengths = [40, 70, 60, 75, 90], [1, 4, 20, 40, 6]
    batch = random_batch(21, *lengths, tokens=96, indices=40, gap=1, page_size=32, **SHAPE)
    compiled.cache_clear()
    try:
        return stays(batch, "interpret")
    finally:
        compiled.cache_clear()


def test_what_is_not_finite_stays_with_the_queries_that_see_it(monkeypatch):
    assert contained()
    monkeypatch.setattr(chunks.Chunks, "own_rotated", both_rotated)
    assert not contained()


def both_rotated(self, words, half):
    """Rotated parts of both tokens of a row; queries have zeros beside their own."""
    return chunks.pltpu.roll(words, 64, 1) if half else words


FAULTS = {
    "keys in another order": (CacheLayout, "place", lambda self, index, tokens=1: index),
    "the other's rotated part": (
        chunks.Chunks, "own_rotated", lambda self, words, half: own_rotated(self, words, 1 - half),
    ),
    "new rows go to both halves": (
        tiles.Tiles, "joined", lambda self, halves: joined(self, halves[:1] * 2),
    ),
}  # fmt: skip
own_rotated, joined = chunks.Chunks.own_rotated, tiles.Tiles.joined


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_seen(name, monkeypatch):
    batch = batch_of()
    place, attribute, fault = FAULTS[name]
    monkeypatch.setattr(place, attribute, fault)
    assert not passes(interpret.MODES[0], batch)


def test_scales_in_the_order_of_tokens_are_seen(monkeypatch):
    batch = scaled_batch(128, window=WINDOWS[:4])  # whose gates are green above
    monkeypatch.setattr(row_scales.RowScales, "half_of", lambda self, pair, half: pair[half])
    assert not passes(interpret.MODES[0], batch)
