"""The ragged_attention cases: what they describe, and that their check can fail."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ragged_attention as ra
from microbench.cases import ragged_attention as cases
from tpukit.predict import predict

BY_NAME = {case.name: case for case in cases.CASES}
SHAPES = {name: cases.Shape(**case.params) for name, case in BY_NAME.items()}


def test_batches_are_the_published_ones():
    mixed = SHAPES["decode/mean-1.5k"]
    assert len(mixed.kv_lens) == 128 and sum(mixed.kv_lens) == 200_092
    assert list(mixed.kv_lens) not in (sorted(mixed.kv_lens), sorted(mixed.kv_lens)[::-1])
    assert SHAPES["decode/page-16"].pages == (512,) * 128
    assert SHAPES["mla/8k"].layout.values == 576


@pytest.mark.parametrize("name", BY_NAME)
def test_reduced_batches_stay_small_and_of_their_kind(name):
    full, small = SHAPES[name], SHAPES[name].reduced()
    assert small.tokens <= 256 and sum(small.kv_lens) <= 1500
    assert all(0 < q <= k for q, k in zip(small.q_lens, small.kv_lens, strict=True))
    assert (max(small.q_lens) > 1) == (max(full.q_lens) > 1)
    assert small.layout == full.layout and bool(small.window) == bool(full.window)
    assert not small.window or small.window < max(small.kv_lens)


@pytest.mark.parametrize("name", ["decode/100", "mla/8k-float8", "drafts/tree"])
def test_inputs_have_the_shapes_that_are_compiled(name):
    case = cases.timed(BY_NAME[name])
    _, arguments = cases.aot_target(case)
    _, specs = cases.build("v5e", **json.loads(json.dumps(arguments)))
    inputs = cases.inputs(case, seed=0)
    leaves = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (inputs, specs)]
    assert leaves[0] == leaves[1]
    assert len(set(np.asarray(inputs.page_indices))) == len(inputs.page_indices)


def test_cost_counts_what_is_seen_once():
    decode, half = (cases.cost(BY_NAME[f"decode/{n}"]) for n in ("8k", "float8"))
    assert decode.flops == 128 * 8192 * 8 * 4 * 128
    new, io = 256 * 2, 8 * 256 * 2
    assert decode.hbm_bytes == 128 * (8191 * 512 + 512 + new + io)
    assert decode.hbm_bytes - half.hbm_bytes == 128 * 8192 * 256
    rows = cases.cost(BY_NAME["decode/float8-rows"])
    assert rows.hbm_bytes - half.hbm_bytes == 128 * 8192 * 8
    prefill = cases.cost(BY_NAME["prefill/8k"])
    assert prefill.flops == 8192 * 8193 // 2 * 32 * 4 * 128
    assert prefill.hbm_bytes == 8192 * (2 * 8 * 512 + 32 * 512)
    window = cases.cost(BY_NAME["window/128-of-8k"])
    assert window.flops == 128 * 128 * 8 * 4 * 128
    assert window.hbm_bytes == 128 * (127 * 512 + 512 + new + io)


def test_plan_says_where_it_comes_from():
    for case in cases.CASES:
        for chip in cases.chips(case):
            assert "VMEM" in str(cases.explain(case, chip)) and "keys=" in str(
                cases.explain(case, chip)
            )


@pytest.mark.parametrize("name", ["window/128-of-8k", "mla/4k"])
def test_check_is_green_on_the_kernel(name):
    assert [check for check in cases.check(BY_NAME[name], seed=1) if not check.ok] == []


@pytest.mark.parametrize(
    "fault", [None, "output", "one token", "nan", "key", "stale", "other page", "mask"]
)
def test_check_is_red_on_each_fault(monkeypatch, fault):
    real = ra.ragged_paged_attention

    def faulty(*args, implementation, ancestors, **options):
        if implementation == "interpret":  # the arithmetic of the reference stands in
            ancestors = ancestors | jnp.uint32(fault == "mask") << jnp.uint32(7)
        o, cache, lse = real(*args, implementation="reference", ancestors=ancestors, **options)
        if implementation == "reference":
            return ra.Attention(o, cache, lse)
        words = cache.words
        match fault:
            case "output":
                o = o * jnp.asarray(1.01, o.dtype)
            case "one token":
                o = o.at[70].set(o[71])
            case "nan":
                o = o.at[0, 0, 0].set(jnp.nan)
            case "key":
                words = words.at[args[6][1] * cache.layout.page_rows].set(words[0] + 1)
            case "stale":
                words = args[3].words
            case "other page":
                unused = np.setdiff1d(np.arange(cache.num_pages), np.asarray(PAGES))[0]
                words = words.at[unused * cache.layout.page_rows, 0].set(7)
        return ra.Attention(o, ra.KVCache(words, cache.layout), lse)

    case = BY_NAME["drafts/tree"]
    PAGES = cases._steering(SHAPES[case.name].reduced(), 1).page_indices
    monkeypatch.setattr(ra, "ragged_paged_attention", faulty)
    assert all(check.ok for check in cases.check(case, seed=1)) == (fault is None)


@pytest.mark.parametrize("name", ["decode/100", "window/128-of-8k"])
def test_the_replayed_schedule_moves_few_bytes_more_than_it_must(name):
    """Counted transfer by transfer: a request's last group of 16 rows moves whole, both ways."""
    fn, args = cases.steered(BY_NAME[name], 0)
    kernel = predict(fn, *args, chip="tpu7x").kernels[0]
    excess = kernel.hbm_bytes - cases.cost(BY_NAME[name]).hbm_bytes
    assert 0 <= excess <= 128 * 4 * 16 * 512
