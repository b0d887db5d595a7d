"""What bad and unusual input leads to: an error that names it, or a defined result."""

# ruff: noqa: E501  (a row of a table is a line)

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ragged_attention as ra
from ragged_attention import api
from tests.ragged_attention import oracle
from tests.ragged_attention.oracle import random_batch
from tpukit import planning
from tpukit.chips import chip as chip_named
from tpukit.errors import ArgumentError, UnsupportedError

NAMES = ("q", "k", "v", "cache", "kv_lens", "cu_q_lens", "page_indices", "page_offsets")
SMALL = {"q_heads": 4, "kv_heads": 2, "num_pages": 12, "tokens": 8, "indices": 8}
GOOD = dict(zip(NAMES, random_batch(0, [40, 20], [1, 5], **SMALL).args(), strict=True))
LATENT = {"q_heads": 4, "key_dim": 192, "value_dim": 128, "latent": True, "num_pages": 12}
LATENT_CACHE = random_batch(1, [40, 20], [1, 5], **LATENT).cache


def call(**changes):
    """The good call with some arguments replaced."""
    return ra.ragged_paged_attention(**{**GOOD, **changes})


def explain(**changes):
    """What the kernel would do with it on a chip."""
    return ra.explain(**{"chip": "tpu7x", **GOOD, **changes})


def array(name, **changes):
    return jnp.asarray(GOOD[name], **changes)


def cache(**changes):
    """The good cache saying something else of itself."""
    words = changes.pop("words", GOOD["cache"].words)
    return ra.KVCache(words, dataclasses.replace(GOOD["cache"].layout, **changes))


def ints(*values):
    return jnp.array(values, jnp.int32)


TABLE = jnp.zeros((2, 4), jnp.int32)
WORDS = jnp.zeros((8, 2), jnp.uint32)
BAD = {
    "rank of q": (dict(q=array("q")[0]), "q", r"has shape .* 3 dimensions"),
    "width of q": (dict(q=array("q")[..., :64]), "q", "key_dim 128"),
    "heads of q": (dict(q=array("q")[:, :3]), "q_heads", "is 3; needs a multiple of 2"),
    "no heads of q": (dict(q=array("q")[:, :0]), "q_heads", "is 0; needs at least 1"),
    "half q": (dict(q=array("q", dtype=jnp.float16)), "q", "has dtype float16; needs bfloat16 or float32. Cast"),
    "tokens of k": (dict(k=array("k")[:5]), "k", r"has shape \(5, 2, 128\); needs 8"),
    "heads of k": (dict(k=array("k")[:, :1]), "k", "needs 2 in dimension 1"),
    "width of k": (dict(k=array("k")[..., :64]), "k", "needs 128 in dimension 2"),
    "tokens of v": (dict(v=array("v")[:5]), "v", r"has shape \(5, 2, 128\); needs 8"),
    "width of v": (dict(v=array("v")[..., :64]), "v", "needs 128 in dimension 2"),
    "k without v": (dict(v=None), "v", "is None; needs an array"),
    "v without k": (dict(k=None), "k", "is None; needs an array"),
    "quantised k": (dict(k=array("k").astype(jnp.int8)), "k", "has dtype int8; needs a float type. Give it unquantised"),
    "an array as cache": (dict(cache=GOOD["cache"].words), "cache", "needs a KVCache. Use allocate_kv_cache"),
    "words of another width": (dict(cache=cache(words=GOOD["cache"].words[:, :128])), "cache.words", r"needs \[pages \* 8, 512\]"),
    "part of a page": (dict(cache=cache(words=GOOD["cache"].words[:12])), "cache.words", "has shape"),
    "words of floats": (dict(cache=cache(words=GOOD["cache"].words.astype(jnp.float32))), "cache.words", "needs int32"),
    "type of the cache": (dict(cache=cache(dtype="float16")), "cache.layout.dtype", "is 'float16'; needs 'bfloat16'"),
    "page size": (dict(cache=cache(page_size=24)), "cache.layout.page_size", "is 24; needs 8, 16"),
    "no heads in the cache": (dict(cache=cache(kv_heads=0)), "cache.layout.kv_heads", "at least 1"),
    "width of keys": (dict(cache=cache(key_dim=4)), "cache.layout.key_dim", "is 4; needs 8 to 1024"),
    "width of values": (dict(cache=cache(value_dim=2048)), "cache.layout.value_dim", "is 2048; needs 8 to 1024"),
    "two latent heads": (dict(cache=cache(latent=True)), "cache.layout", "one head"),
    "rank of kv_lens": (dict(kv_lens=array("kv_lens")[None]), "kv_lens", "1 dimension"),
    "short bounds": (dict(cu_q_lens=ints(0, 6)), "cu_q_lens", r"has shape \(2,\); needs 3"),
    "short lengths": (dict(kv_lens=ints(40)), "cu_q_lens", "needs 2 in dimension 0"),
    "short offsets": (dict(page_offsets=ints(0, 4)), "page_offsets", r"has shape \(2,\); needs 3"),
    "a list without offsets": (dict(page_offsets=None), "page_indices", "2 dimensions"),
    "a table with offsets": (dict(page_indices=TABLE), "page_indices", "1 dimension"),
    "a table of three requests": (dict(page_indices=jnp.zeros((3, 4), jnp.int32), page_offsets=None), "page_indices", "needs 2 in dimension 0"),
    "lengths of 16 bits": (dict(kv_lens=jnp.zeros(2, jnp.int16)), "kv_lens", "has dtype int16; needs int32"),
    "lengths of 64 bits": (dict(kv_lens=np.zeros(2, np.int64)), "kv_lens", "has dtype int64; needs int32"),
    "float bounds": (dict(cu_q_lens=jnp.zeros(3)), "cu_q_lens", "has dtype float32; needs int32"),
    "unsigned pages": (dict(page_indices=jnp.zeros(8, jnp.uint32)), "page_indices", "has dtype uint32"),
    "unsigned offsets": (dict(page_offsets=jnp.zeros(3, jnp.uint32)), "page_offsets", "has dtype uint32"),
    "short starts": (dict(query_starts=ints(0)), "query_starts", r"has shape \(1,\); needs 2"),
    "float starts": (dict(query_starts=jnp.zeros(2)), "query_starts", "has dtype float32"),
    "window of 0": (dict(window=0), "window", "is 0; needs at least 1"),
    "negative window": (dict(window=-3), "window", "is -3; needs at least 1"),
    "windows of three requests": (dict(window=ints(1, 2, 3)), "window", r"has shape \(3,\); needs 2"),
    "float windows": (dict(window=jnp.ones(2)), "window", "has dtype float32; needs int32"),
    "words of fewer tokens": (dict(ancestors=WORDS[:5]), "ancestors", r"has shape \(5, 2\); needs 8"),
    "three words": (dict(ancestors=jnp.zeros((8, 3), jnp.uint32)), "words of ancestors", "is 3; needs 1 or 2"),
    "signed words": (dict(ancestors=WORDS.astype(jnp.int32)), "ancestors", "has dtype int32; needs uint32"),
    "a tree that is not causal": (dict(ancestors=WORDS, causal=False), "ancestors", "needs None where causal=False"),
    "sinks of key/value heads": (dict(sinks=jnp.zeros(2)), "sinks", r"has shape \(2,\); needs 4"),
    "soft cap of 0": (dict(soft_cap=0), "soft_cap", "is 0; needs a finite Python number"),
    "negative soft cap": (dict(soft_cap=-1.0), "soft_cap", "is -1.0; needs at least 0"),
    "soft cap as array": (dict(soft_cap=jnp.ones(())), "soft_cap", "needs a finite Python number"),
    "NaN scale": (dict(sm_scale=float("nan")), "sm_scale", "is nan; needs a finite"),
    "infinite scale": (dict(sm_scale=float("inf")), "sm_scale", "is inf; needs a finite"),
    "scale of truth": (dict(sm_scale=True), "sm_scale", "is True; needs a finite"),
    "scale as array": (dict(sm_scale=jnp.ones(())), "sm_scale", "needs a finite Python number"),
    "temperature from 1 on": (dict(temperature_len=1), "temperature_len", "is 1; needs at least 2"),
    "q_scale of key/value heads": (dict(q_scale=jnp.ones(2)), "q_scale", r"has shape \(2,\); needs shape \(\) or \(4,\) or \(8, 1\) or \(8, 4\)"),
    "k_scale of query heads": (dict(k_scale=jnp.ones(4)), "k_scale", r"has shape \(4,\); needs shape \(\) or \(2,\)"),
    "v_scale of tokens": (dict(v_scale=jnp.ones((8, 1))), "v_scale", r"has shape \(8, 1\)"),
    "no q": (dict(q=None), "q", "is None; needs an array"),
    "a list of lengths": (dict(kv_lens=[40, 20]), "kv_lens", "is a list; needs an array"),
    "a list of windows": (dict(window=[40, 20]), "window", "is a list; needs an array"),
    "causal as array": (dict(causal=jnp.ones((), bool)), "causal", "is a .*Array.*; needs a bool"),
    "causal by number": (dict(causal=1), "causal", "is a int; needs a bool"),
    "logarithms by number": (dict(return_lse=1), "return_lse", "is a int; needs a bool"),
    "temperature of words": (dict(temperature_len="long"), "temperature_len", "is a str; needs an int"),
    "values wider than latent keys": (dict(cache=cache(latent=True, kv_heads=1, value_dim=136)), "cache.layout", "one head whose keys hold its values"),
    "heads of a layout": (dict(cache=cache(kv_heads="2")), "cache.layout.kv_heads", "is a str; needs an int"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, argument, message = BAD[name]
    with pytest.raises(ArgumentError, match=message) as caught:
        call(**changes)
    assert caught.value.argument == argument
    with pytest.raises(ArgumentError, match=message):
        explain(**changes)
    given = {**GOOD, **changes}
    assert not ra.supports(**given, chip="tpu7x")


@pytest.mark.parametrize("name", ["bounds_checks", "validate"])
def test_flags_are_flags(name):
    with pytest.raises(ArgumentError, match=f"{name} is a int; needs a bool"):
        call(**{name: 1})


def test_a_plan_is_a_plan():
    plan = dict(queries=16, keys=512)
    for implementation in ("auto", "interpret"):
        with pytest.raises(ArgumentError, match="plan is a dict; needs a Plan"):
            call(plan=plan, implementation=implementation)
    with pytest.raises(ArgumentError, match="plan is a dict; needs a Plan"):
        explain(plan=plan)
    with pytest.raises(ArgumentError, match=r"plan\.keys is a float; needs an int"):
        explain(plan=dataclasses.replace(PLAN, keys=512.0))


def test_an_unknown_implementation_is_named():
    with pytest.raises(ArgumentError, match="implementation is 'mosaic'; needs 'auto', 'pallas'"):
        call(implementation="mosaic")


PLAN = ra.Plan(queries=16, keys=512, tiles=4, blocks=2)
PLANS = {
    "queries that are no power": (dict(queries=24), "plan.queries is 24; needs a power of two, 8 to 512"),
    "too few queries": (dict(queries=4), "plan.queries is 4"),
    "too many queries": (dict(queries=1024), "plan.queries is 1024"),
    "short tiles": (dict(keys=256), "plan.keys is 256; needs a multiple of 512"),
    "odd tiles": (dict(keys=768), "plan.keys is 768"),
    "no tiles": (dict(tiles=1), "plan.tiles is 1; needs a power of two"),
    "three tiles": (dict(tiles=3), "plan.tiles is 3"),
    "one block": (dict(blocks=1), "plan.blocks is 1"),
    "more blocks than tiles": (dict(blocks=8), "plan.blocks is 8; needs at most plan.tiles = 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_bad_plans_are_named(name):
    changes, message = PLANS[name]
    plan = dataclasses.replace(PLAN, **changes)
    with pytest.raises(ArgumentError, match=message):
        call(plan=plan, implementation="interpret")
    with pytest.raises(ArgumentError, match=message):
        explain(plan=plan)
    assert not ra.supports(**GOOD, chip="tpu7x", plan=plan)


def test_a_tree_needs_its_requests_in_one_block():
    with pytest.raises(ArgumentError, match=r"plan.queries is 16; needs a power of two, 64 to 512"):
        explain(ancestors=WORDS, plan=PLAN)
    assert explain(ancestors=WORDS).plan.queries >= 64


@pytest.mark.parametrize("page_size", [64, 256])
def test_tiles_hold_whole_pages(page_size):
    empty = ra.allocate_kv_cache(4, page_size, 2, 128)
    assert explain(cache=empty, plan=dataclasses.replace(PLAN, keys=1024)).source == "argument"


def test_a_window_that_is_known_bounds_tiles():
    """A number does; an array, and one as long as the longest tile, does not."""
    longest = explain().plan.keys
    assert [explain(window=n).plan.keys for n in (128, 1000, 1010)] == [512, 1024, 2048]
    assert explain(window=2**20).plan.keys == longest == explain(window=jnp.int32(128)).plan.keys


@pytest.mark.parametrize("chip", ra.SUPPORTED_CHIPS)
def test_a_plan_too_big_says_how_big(chip):
    big = dataclasses.replace(PLAN, keys=2**16, tiles=8)
    with pytest.raises(UnsupportedError, match=rf"MiB of VMEM.*{chip}.*MiB.*fewer"):
        explain(plan=big, chip=chip)
    assert not ra.supports(**GOOD, chip=chip, plan=big)


@pytest.mark.parametrize("chip", ra.SUPPORTED_CHIPS)
def test_a_cache_of_float4_is_for_chips_that_know_it(chip):
    empty = ra.allocate_kv_cache(4, 64, 2, 128, dtype=jnp.float4_e2m1fn)
    assert ra.supports(**{**GOOD, "cache": empty}, chip=chip) == (chip == "tpu7x")
    if chip != "tpu7x":
        with pytest.raises(UnsupportedError, match=rf"float4_e2m1fn cannot run on {chip}.*float8"):
            explain(cache=empty, chip=chip)


def test_a_batch_too_long_for_its_lengths_is_refused():
    n = 2**15
    shapes = {"kv_lens": (n,), "cu_q_lens": (n + 1,), "page_offsets": (n + 1,)}
    long = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    with pytest.raises(UnsupportedError, match=r"batch of 32768 requests.*Split the batch"):
        explain(**long)


def test_heads_that_do_not_fit_are_refused():
    wide = ra.KVCache(
        jax.ShapeDtypeStruct((64, 2 * 64 * 1024), jnp.int32),
        ra.CacheLayout(64, 1024, 1024, "bfloat16", 16),
    )
    row = jax.ShapeDtypeStruct((8, 64, 1024), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.bfloat16)
    with pytest.raises(UnsupportedError, match=r"do not fit VMEM. Shard the heads"):
        explain(q=q, k=row, v=row, cache=wide)


def test_explain_and_supports_for_absent_chips():
    for chip in ra.SUPPORTED_CHIPS:
        found = explain(chip=chip)
        assert found.vmem_bytes <= found.vmem_limit and "VMEM" in str(found)
        assert ra.supports(**GOOD, chip=chip)
    assert explain(plan=PLAN).source == "argument"
    with pytest.raises(ArgumentError, match="v5e"):
        explain(chip="v99")


def test_pallas_without_a_tpu_says_what_to_do():
    with pytest.raises(UnsupportedError, match=r"cannot run on cpu.*implementation='reference'"):
        call(implementation="pallas")


@pytest.mark.parametrize("chip", [None, *ra.SUPPORTED_CHIPS])
def test_auto_runs_what_can_run(chip, monkeypatch):
    ran = []
    for name in ("by_reference", "launch"):
        monkeypatch.setattr(api, name, lambda *_, name=name: ran.append(name))
    monkeypatch.setattr(planning, "current_chip", lambda: chip and chip_named(chip))
    call()
    assert ran.pop() == ("launch" if chip else "by_reference")
    call(plan=dataclasses.replace(PLAN, keys=2**16, tiles=8))  # which fits no chip
    assert ran.pop() == "by_reference"


BAD_VALUES = {
    "more requests than there are": (dict(num_requests=jnp.int32(3)), r"num_requests has 3 at index \[\]; needs 0 to 2"),
    "fewer than none": (dict(num_requests=jnp.int32(-1)), "num_requests has -1"),
    "descending bounds": (dict(cu_q_lens=ints(0, 6, 3)), r"cu_q_lens has 3 at index \[2\]; needs ascending"),
    "bounds past the end": (dict(cu_q_lens=ints(0, 1, 9)), r"cu_q_lens has 9 at index \[2\]; needs 0 to 8"),
    "negative bound": (dict(cu_q_lens=ints(-1, 1, 6)), r"cu_q_lens has -1 at index \[0\]"),
    "negative length": (dict(kv_lens=ints(-4, 20)), r"kv_lens has -4 at index \[0\]; needs lengths"),
    "fewer keys than queries": (dict(kv_lens=ints(40, 4)), r"kv_lens has 4 at index \[1\]; needs at least the query"),
    "too few pages": (dict(page_offsets=ints(0, 2, 5)), r"page_offsets has 2 at index \[0\]; needs a page for every"),
    "offsets backwards": (dict(page_offsets=ints(0, 3, 1)), r"page_offsets has 1 at index \[1\]; needs a page"),
    "a page past the pool": (dict(page_indices=ints(0, 1, 12, 3, 4, -1, -1, -1)), r"page_indices has 12 at index \[2\]; needs pages of the pool, 0 to 11"),
    "a negative page": (dict(page_indices=ints(0, 1, 2, -1, 4, -1, -1, -1)), r"page_indices has -1 at index \[3\]"),
    "a page with two writers": (dict(page_indices=ints(0, 1, 2, 3, 2, -1, -1, -1)), r"page_indices has 2 at index \[4\]; needs each page written by one"),
    "a negative first offset": (dict(page_offsets=ints(-1, 3, 5)), r"page_offsets has -1 at index \[0\]; needs 0 to 8"),
    "offsets past the list": (dict(page_offsets=ints(3, 6, 9)), r"page_offsets has 9 at index \[2\]; needs 0 to 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VALUES)
def test_validate_names_the_value_and_its_place(name):
    changes, message = BAD_VALUES[name]
    with pytest.raises(ArgumentError, match=message):
        call(**changes, validate=True)
    found = call(**changes, return_lse=True)  # defined without validation
    assert not np.isnan(np.asarray(found.o, np.float32)).any()
    assert not np.isnan(np.asarray(found.lse)).any()


ABOVE = "needs finite numbers above 0"
BAD_SCALES = {
    "a NaN scale": (dict(k_scale=jnp.array([1.0, jnp.nan])), rf"k_scale has nan at index \[1\]; {ABOVE}"),
    "an infinite scale": (dict(v_scale=jnp.inf), rf"v_scale has inf at index \[\]; {ABOVE}"),
    "a scale of 0": (dict(q_scale=0.0), rf"q_scale has 0.0 at index \[\]; {ABOVE}"),
    "a negative scale": (dict(q_scale=-jnp.ones((8, 4))), rf"q_scale has -1.0 at index \[0, 0\]; {ABOVE}"),
    "a NaN sink": (dict(sinks=jnp.array([0, 1, jnp.nan, 2])), r"sinks has nan at index \[2\]; needs numbers, or -inf"),
    "an infinite sink": (dict(sinks=jnp.array([0, 1, 2, jnp.inf])), r"sinks has inf at index \[3\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SCALES)
def test_validate_names_the_scale_and_its_place(name):
    changes, message = BAD_SCALES[name]
    with pytest.raises(ArgumentError, match=message):
        call(**changes, validate=True)


GOOD_VALUES = {
    "as they are": {},
    "one request of two": dict(num_requests=jnp.int32(1), kv_lens=ints(40, -9)),
    "a page with two readers": dict(page_indices=ints(0, 1, 2, 0, 4, 99, 99, -5)),
    "nothing is written": dict(page_indices=ints(0, 1, 2, 3, 2, -1, -1, -1), k=None, v=None),
    "queries elsewhere": dict(query_starts=ints(-3, 99), kv_lens=ints(40, 4)),
    "requests without keys": dict(kv_lens=ints(0, 0), cu_q_lens=ints(0, 0, 0), page_offsets=ints(0, 0, 0)),
    "scales and sinks": dict(q_scale=jnp.ones((8, 1)), k_scale=0.1, v_scale=jnp.ones(2), sinks=jnp.full(4, -jnp.inf)),
    "offsets of requests that do not count": dict(num_requests=jnp.int32(1), page_offsets=ints(0, 3, -5)),
    "a table": dict(page_indices=jnp.arange(8, dtype=jnp.int32).reshape(2, 4), page_offsets=None),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD_VALUES)
def test_validate_accepts_good_values(name):
    call(**GOOD_VALUES[name], validate=True)


def test_validate_under_jit_says_what_to_do():
    with pytest.raises(ArgumentError, match=r"is traced.*outside jax.jit"):
        jax.jit(lambda lens: call(kv_lens=lens, validate=True).o)(GOOD["kv_lens"])


# Nothing to do.


@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_no_tokens(implementation):
    none = {name: array(name)[:0] for name in ("q", "k", "v")}
    found = call(**none, cu_q_lens=ints(0, 0, 0), return_lse=True, implementation=implementation)
    assert found.o.shape == (0, 4, 128) and found.o.dtype == jnp.bfloat16
    assert found.lse.shape == (0, 4)
    assert oracle.same_bits(found.cache.words, GOOD["cache"].words)


@pytest.mark.parametrize("implementation", ["interpret", "reference"])
@pytest.mark.parametrize("table", [False, True])
def test_no_requests(implementation, table):
    pages = (jnp.zeros((0, 4), jnp.int32), None) if table else (ints(), ints(0))
    found = call(
        kv_lens=ints(),
        cu_q_lens=ints(0),
        page_indices=pages[0],
        page_offsets=pages[1],
        return_lse=True,
        implementation=implementation,
    )
    assert found.o.shape == (8, 4, 128) and not np.asarray(found.o).any()
    assert np.isneginf(found.lse).all()
    assert oracle.same_bits(found.cache.words, GOOD["cache"].words)


# The form for latents.


def latent(**changes):
    q, k = jnp.ones((8, 4, 192), jnp.bfloat16), jnp.ones((8, 192), jnp.bfloat16)
    parts = (q[..., :128], q[..., 128:], k[:, :128], k[:, 128:], LATENT_CACHE)
    names = ("q_latent", "q_rope", "latent", "rope", "cache")
    rest = {name: GOOD[name] for name in NAMES[4:]}
    given = dict(zip(names, parts, strict=True)) | rest | {"sm_scale": 0.1}
    return ra.mla_ragged_paged_attention(**{**given, **changes})


BAD_LATENT = {
    "no cache": (dict(cache=None), "cache", "is None; needs a KVCache"),
    "no queries": (dict(q_latent=None), "q_latent", "is None; needs an array"),
    "a cache of heads": (dict(cache=GOOD["cache"]), "cache", "a latent layout of rank 128. Use allocate_mla_cache"),
    "another rank": (dict(q_latent=jnp.ones((8, 4, 64), jnp.bfloat16), latent=jnp.ones((8, 64), jnp.bfloat16)), "cache", "a latent layout of rank 64"),
    "latent alone": (dict(rope=None), "rope", "both of latent and rope, or neither"),
    "rope alone": (dict(latent=None), "latent", "both of latent and rope, or neither"),
    "heads of the rope": (dict(q_rope=jnp.ones((8, 2, 64), jnp.bfloat16)), "q_rope", "needs 4 in dimension 1"),
    "tokens of the rope": (dict(rope=jnp.ones((5, 64), jnp.bfloat16)), "rope", "needs 8 in dimension 0"),
    "width of the rope": (dict(rope=jnp.ones((8, 32), jnp.bfloat16)), "rope", "needs 64 in dimension 1"),
    "rank of the latents": (dict(latent=jnp.ones((8, 64), jnp.bfloat16)), "latent", "needs 128 in dimension 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LATENT)
def test_bad_latents_are_named(name):
    changes, argument, message = BAD_LATENT[name]
    with pytest.raises(ArgumentError, match=message) as caught:
        latent(**changes)
    assert caught.value.argument == argument


def test_latents_need_their_scale():
    with pytest.raises(ArgumentError, match="sm_scale is nan"):
        latent(sm_scale=float("nan"))


# The helpers.

BAD_CACHES = {
    "page size": (lambda: ra.allocate_kv_cache(4, 24, 2, 128), "page_size is 24; needs 8, 16"),
    "type": (lambda: ra.allocate_kv_cache(4, 16, 2, 128, dtype=jnp.float16), "dtype is 'float16'"),
    "no type": (lambda: ra.allocate_kv_cache(4, 16, 2, 128, dtype="nonsense"), "dtype is 'nonsense'; needs 'bfloat16'"),
    "no value": (lambda: ra.allocate_kv_cache(4, 16, 2, 128, 0), "value_dim is 0; needs 8 to 1024"),
    "heads by name": (lambda: ra.allocate_kv_cache(4, 16, "2", 128), "kv_heads is a str; needs an int"),
    "pages by name": (lambda: ra.allocate_kv_cache("4", 16, 2, 128), "num_pages is a str; needs an int"),
    "rank by name": (lambda: ra.allocate_mla_cache(4, 16, "512", 64), "rank is a str; needs an int"),
    "width": (lambda: ra.allocate_kv_cache(4, 16, 2, 4), "key_dim is 4; needs 8 to 1024"),
    "heads": (lambda: ra.allocate_kv_cache(4, 16, 0, 128), "kv_heads is 0"),
    "pages": (lambda: ra.allocate_kv_cache(-1, 16, 2, 128), "num_pages is -1; needs at least 0"),
    "page size of latents": (lambda: ra.allocate_mla_cache(4, 0, 512, 64), "page_size is 0"),
    "rank": (lambda: ra.allocate_mla_cache(4, 16, 2048, 64), "is 2112; needs 8 to 1024"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CACHES)
def test_impossible_caches_are_refused(name):
    allocate, message = BAD_CACHES[name]
    with pytest.raises(ArgumentError, match=message):
        allocate()


PAGES = jnp.zeros((3, 16, 4, 128), jnp.float32)  # of two heads
BAD_PAGES = {
    "heads of keys": (lambda: ra.pack_pages(PAGES, PAGES[:, :, :2], GOOD["cache"].layout), r"keys has shape .*; needs 2 in dimension 2"),
    "heads of values": (lambda: ra.pack_pages(PAGES[:, :, :2], PAGES, GOOD["cache"].layout), r"values has shape .*; needs 2 in dimension 2"),
    "page size": (lambda: ra.pack_pages(PAGES[:, :8, :2], PAGES[:, :8, :2], GOOD["cache"].layout), "needs 16 in dimension 1"),
    "pages of values": (lambda: ra.pack_pages(PAGES[:, :, :2], PAGES[1:, :, :2], GOOD["cache"].layout), "needs 3 in dimension 0"),
    "no values": (lambda: ra.pack_pages(PAGES[:, :, :2], None, GOOD["cache"].layout), "values is None; needs None for a latent layout"),
    "values of latents": (lambda: ra.pack_pages(jnp.zeros((3, 16, 1, 192)), PAGES[:, :, :1], LATENT_CACHE.layout), "values is given"),
    "too many heads": (lambda: ra.from_interleaved(PAGES[:, :, :, None], 3, 128), r"pages has shape .*; needs \(6, 1, 128\) behind its pages for 3 heads"),
    "too few heads": (lambda: ra.from_interleaved(PAGES[:, :, :, None], 1, 128), r"needs \(2, 1, 128\)"),
    "packing of another type": (lambda: ra.from_interleaved(PAGES.reshape(3, 16, 2, 2, 128), 2, 128), r"needs \(4, 1, 128\)"),
    "too wide": (lambda: ra.from_interleaved(PAGES[:, :, :, None], 2, 256), r"needs \(4, 1, 256\)"),
    "rank of pages": (lambda: ra.from_interleaved(PAGES, 2, 128), "needs 5 dimensions"),
    "type of pages": (lambda: ra.from_interleaved(PAGES[:, :, :, None].astype(jnp.int32), 2, 128), "dtype is 'int32'"),
    "no pages": (lambda: ra.from_interleaved(None, 2, 128), "pages is None; needs an array"),
    "latents": (lambda: ra.to_interleaved(LATENT_CACHE), "cache has layout .*; needs keys and values of one width"),
    "two widths": (lambda: ra.to_interleaved(ra.allocate_kv_cache(2, 16, 2, 192, 128)), "needs keys and values of one width"),
    "no cache": (lambda: ra.to_interleaved(PAGES), "cache is a .*; needs a KVCache"),
    "sets of logarithms": (lambda: ra.merge_attention_states(jnp.zeros((3, 5, 2, 8)), jnp.zeros((2, 5, 2))), "lse has shape .*; needs 3 in dimension 0"),
    "heads of logarithms": (lambda: ra.merge_attention_states(jnp.zeros((3, 5, 2, 8)), jnp.zeros((3, 5, 4))), "lse has shape .*; needs 2 in dimension 2"),
    "rank of logarithms": (lambda: ra.merge_attention_states(jnp.zeros((3, 5, 2, 8)), jnp.zeros((3, 5, 2, 1))), "lse has shape .*; needs 3 dimensions"),
    "nothing to merge": (lambda: ra.merge_attention_states(jnp.zeros((0, 5, 2, 8)), jnp.zeros((0, 5, 2))), "sets is 0; needs at least 1"),
    "no outputs": (lambda: ra.merge_attention_states(None, jnp.zeros((3, 5, 2))), "o is None; needs an array"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PAGES)
def test_what_does_not_fit_together_is_refused(name):
    convert, message = BAD_PAGES[name]
    with pytest.raises(ArgumentError, match=message):
        convert()


def test_update_checks_its_rows():
    rest = [GOOD[name] for name in NAMES[3:]]
    with pytest.raises(ArgumentError, match="k is None; needs an array"):
        ra.update_kv_cache(None, None, *rest)
    with pytest.raises(ArgumentError, match="v is None; needs an array"):
        ra.update_kv_cache(GOOD["k"], None, *rest)
    with pytest.raises(ArgumentError, match="cache is None; needs a KVCache"):
        ra.update_kv_cache(GOOD["k"], GOOD["v"], None, *rest[1:])
    with pytest.raises(ArgumentError, match=r"v has shape \(5, 2, 128\); needs 8"):
        ra.update_kv_cache(GOOD["k"], GOOD["v"][:5], *rest)


def test_context_parallel_attention_checks_its_options():
    for options, message in (
        ({"keys_per_device": 0}, "keys_per_device is 0; needs at least 1"),
        ({"keys_per_device": 8.0}, "keys_per_device is a float; needs an int"),
        ({"keys_per_device": 8, "sinks": jnp.zeros(4)}, "sinks is given; needs nothing"),
        ({"keys_per_device": 8, "query_starts": ints(0, 0)}, "query_starts is given; .* place"),
        ({"keys_per_device": 8, "return_lse": True}, "return_lse is given; .* always returned"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ra.context_parallel_attention(*GOOD.values(), axis_name="x", **options)
