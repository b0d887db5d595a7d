"""Blocks of many queries, which are columns: no logit is kept, and late large ones are caught."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import ragged_attention as ra
from ragged_attention import blocks, columns, flash
from ragged_attention.plan import style_of
from tests.ragged_attention import oracle
from tests.ragged_attention.oracle import random_batch
from tests.ragged_attention.test_nonfinite import stays
from tests.ragged_attention.test_ragged_attention import PLAN, check_gates, compiled, run
from tpukit.chips import chip

V7 = chip("tpu7x")
WIDE = dataclasses.replace(PLAN, queries=64)
LENGTHS = [600, 90, 64, 40, 700], [64, 90, 64, 1, 9]
WINDOWS = np.array([30, 0, 300, 7, 64], np.int32)
SINKS = np.linspace(-2, 3, 4).astype(np.float32)
CHAIN = np.array([[(1 << min(i + 1, 32)) - 1, (1 << max(i - 31, 0)) - 1] for i in range(64)])
KINDS = {
    "bf16, two heads": {"kv_heads": 2},
    "e4m3, sinks, soft cap": {
        "cache": ml_dtypes.float8_e4m3fn, "sinks": SINKS, "soft_cap": 3.0,
    },
    "dims 64 and 80, windows": {
        "key_dim": 64, "value_dim": 80, "kv_heads": 2, "window": WINDOWS,
    },
    "16 heads": {"q_heads": 16, "kv_heads": 2, "key_dim": 64, "value_dim": 80},
    "not causal, dim 256": {"causal": False, "key_dim": 256},
    "latents, windows": {  # in rows
        "key_dim": 192, "value_dim": 128, "latent": True, "window": WINDOWS,
    },
}  # fmt: skip


def batch_of(kind="bf16, two heads", lengths=LENGTHS, **more):
    more = KINDS[kind] | more
    return random_batch(40, *lengths, tokens=256, num_pages=100, indices=100, **more)


def tree():
    """A request with 64 drafts, others with few."""
    words = np.tile(CHAIN, (4, 1)).astype(np.uint32)
    words[1::3] = words[1::3] & 0x5B6DB6DB  # some drafts are no ancestors
    lengths = [600, 90, 64, 40, 700], [64, 60, 64, 1, 9]
    return random_batch(41, *lengths, tokens=256, num_pages=100, indices=100, ancestors=words)


def late_batch():
    """Logits far above those before them: of keys in a first, a middle and a last chunk."""
    batch = batch_of(lengths=([1100, 90], [64, 64]))
    for r, position, size in ((0, 100, 40.0), (0, 700, 120.0), (0, 1030, 300.0), (1, 70, 90.0)):
        page, row = divmod(position, batch.layout.page_size)
        batch.k_pages[batch.pages[batch.offsets[r] + page], row, 0] *= size
    return batch


def passes(batch):
    """Whether the gates are green."""
    compiled.cache_clear()
    try:
        check_gates(batch, run(batch, plan=WIDE))
    except AssertionError:
        return False
    finally:
        compiled.cache_clear()
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    check_gates(batch_of(kind), run(batch_of(kind), plan=WIDE))


def in_words():
    """Heads that are laid out two in a word, in windows of others; blocks of several sections."""
    batch = batch_of("16 heads", ([600, 150], [140, 90]))
    return batch, dataclasses.replace(PLAN, queries=128)


def test_heads_in_words():
    batch, plan = in_words()
    problem = ra.explain(*batch.args(), **batch.options, chip="tpu7x", plan=plan).problem
    assert blocks.in_words(problem, style_of(problem, plan.queries, V7))
    check_gates(batch, run(batch, plan=plan))


def test_trees():
    check_gates(tree(), run(tree(), plan=WIDE))


def test_the_blocks_are_columns():
    """That is, these tests are of what they say; float32 stays in rows."""
    batch = batch_of()
    problem = ra.explain(*batch.args(), **batch.options, chip="tpu7x", plan=WIDE).problem
    assert [style_of(problem, n, V7).columns for n in WIDE.query_sizes] == [False, False, True]
    exact = dataclasses.replace(problem, dtype=np.float32)
    assert not style_of(exact, 64, V7).columns


def test_a_request_is_the_same_whatever_its_neighbours_need():
    """A neighbour that has to catch up changes no bit."""
    batch = late_batch()
    calm = dataclasses.replace(batch, k_pages=batch.k_pages.copy())
    mine = batch.pages[batch.offsets[0] : batch.offsets[1]]
    calm.k_pages[mine] = np.clip(calm.k_pages[mine], -1, 1)
    here, there = run(batch, plan=WIDE), run(calm, plan=WIDE)
    own = slice(batch.cu[1], batch.cu[2])
    assert oracle.same_bits(here.o[own], there.o[own])
    assert not oracle.same_bits(here.o[: batch.cu[1]], there.o[: batch.cu[1]])


def always(function):
    """`flash.select` that takes what was added, however far it was."""
    return lambda chosen, new, old: function(chosen | True, new, old)


def never_far(function):
    """`flash.add` that says that no logit is far above."""
    return lambda *args: (function(*args)[0], 0 * function(*args)[1])


def top(state, s):
    """The largest logit."""
    return jnp.maximum(state.top, jnp.max(s, axis=0, keepdims=True))


FAULTS = {
    "nobody catches up": (columns.Columns, "catch_up", lambda *args: None),
    "what overflows is kept": (flash, "select", always(flash.select)),
    "far is not noticed": (flash, "add", never_far(flash.add)),
    "a look changes no sum": (flash, "look", lambda state, s: state._replace(top=top(state, s))),
}


def test_late_large_logits():
    assert passes(late_batch())


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_seen(name, monkeypatch):
    place, attribute, fault = FAULTS[name]
    assert hasattr(place, attribute)
    monkeypatch.setattr(place, attribute, fault)
    assert not passes(late_batch())


def test_what_is_not_finite_stays_with_the_queries_that_see_it():
    assert stays(batch_of(), "interpret", WIDE)
