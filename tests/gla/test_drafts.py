"""Drafts, what is accepted of them, and snapshots, in the kernel interpreted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gla
from reference import gla as base
from reference import gla_drafts as reference
from tests.gla import drafts_oracle, oracle, test_gla
from tests.gla.test_gla import EAGER, FLIPS, LATE, STATE_A
from tpukit import interpret
from tpukit.errors import UnsupportedError

LENGTHS = (4, 1, 7, 40, 1, 30, 13)
DRAFT = (True, False, True, False, True, True, False)
NONE = -1
PLAN = gla.Plan(heads=1, interleave=1)


def mixed(seed, *, per_token=False, tree=True, lengths=LENGTHS, **options):
    """A batch, words and drafts of it."""
    one = {"dtype": np.float32, "known": [True] * len(lengths), "heads": 1, "qk_heads": 1}
    options = one | options
    batch = oracle.random_batch(seed, lengths, per_token=per_token, **options)
    rng = np.random.default_rng(seed)
    words = drafts_oracle.random_words(rng, lengths, len(batch.q)) if tree else None
    return batch, words


def run(batch, mode=LATE, plan=PLAN, **options):
    return test_gla.run(batch, mode, plan, **options)


def arrays(draft, words=None):
    return gla.Drafts(jnp.asarray(draft, bool), None if words is None else jnp.asarray(words))


def wanted(rows, slots):
    return gla.Snapshots(jnp.asarray(rows, jnp.int32), jnp.asarray(slots, jnp.int32))


@pytest.mark.parametrize("per_token,tree", [(False, True), (True, False)])
def test_drafts_beside_decode_and_prefill(per_token, tree):
    batch, words = mixed(1, per_token=per_token, tree=tree)
    o, pool = run(batch, drafts=arrays(DRAFT, words))
    exact, states = drafts_oracle.run(batch, DRAFT, words)
    assert oracle.error(o, exact, axis=(1, 2)) < 1e-5 and oracle.error(o, exact) < 3e-6
    assert oracle.error(pool, states) < 3e-6
    kept = batch.slots[np.asarray(DRAFT)]
    assert oracle.same_bits(pool[kept], batch.pool[kept])


@pytest.mark.parametrize("tree", [False, True])
def test_bf16(tree):
    dtypes = {"dtype": ml_dtypes.bfloat16, "state": ml_dtypes.bfloat16 if tree else np.float32}
    batch, words = mixed(2, tree=tree, **dtypes)
    draft = [True] * 7
    o, pool = run(batch, drafts=arrays(draft, words))
    rounded, _ = drafts_oracle.run(batch, draft, words, window=128)
    exact, _ = drafts_oracle.run(batch, draft, words)
    rounding = oracle.error(oracle.bf16(rounded), rounded)
    assert oracle.error(o, rounded) <= 1.25 * rounding + FLIPS
    worst = oracle.error(oracle.bf16(rounded), rounded, axis=(1, 2))
    assert oracle.error(o, rounded, axis=(1, 2)) <= 2 * worst + FLIPS
    assert oracle.error(o, exact) <= 3.5e-3
    assert oracle.same_bits(pool, batch.pool)


def test_chains_with_a_decay_per_key_channel():
    batch, words = mixed(12, per_channel=True, lengths=(4, 1, 20, 3))
    draft, rows, slots = [True, True, False, True], [1, 15, 27], [batch.slots[0], 0, 5]
    plan = gla.Plan(heads=1, interleave=1, window=32)
    o, pool = run(batch, plan=plan, drafts=arrays(draft), snapshots=wanted(rows, slots))
    exact, states = drafts_oracle.run(batch, draft, None, (rows, slots))
    assert oracle.error(o, exact) < 3e-6 and oracle.error(pool, states) < 3e-6
    accepted = np.array([[3], [1], [0b1011], [0]], np.uint32)
    pool = commit(batch, accepted, plan)
    assert oracle.error(pool, oracle.exact(drafts_oracle.accepted(batch, accepted))[1]) < 3e-6
    with pytest.raises(UnsupportedError, match=r"tree of drafts.*Verify chains"):
        run(batch, drafts=arrays(draft, words))


def test_more_than_64_drafts_are_a_chain():
    lengths = (64, 70)
    batch, words = mixed(3, lengths=lengths)
    o, pool = run(batch, drafts=arrays([True] * 2, words))
    exact, _ = drafts_oracle.run(batch, [True] * 2, words)
    assert oracle.error(o, exact, axis=(1, 2)) < 1e-5
    assert oracle.same_bits(pool, batch.pool)


def test_words_that_are_no_tree_stay_in_their_request():
    batch, words = mixed(4, per_token=True)
    good = run(batch, drafts=arrays(DRAFT, words))
    mine, wild = slice(batch.cu[2], batch.cu[3]), words.copy()
    wild[mine] = np.random.default_rng(4).integers(0, 2**32, words[mine].shape, np.uint32)
    o, pool = run(batch, drafts=arrays(DRAFT, wild))
    assert np.isfinite(o).all() and not np.array_equal(o[mine], good[0][mine])
    others = np.r_[0 : mine.start, mine.stop : len(o)]
    assert oracle.same_bits(o[others], good[0][others]) and oracle.same_bits(pool, good[1])


@settings(max_examples=10)
@example(
    seed=0,
    lengths=[64, 0, 0, 0, 0, 0],
    draft=[True] * 6,
    slots=[1] * 6,
    rows=[3, 2, 63, 64],
    targets=[2, 3, 4, 5],
)
@example(
    seed=1,
    lengths=[9, 9, 9, 9, 9, 9],
    draft=[True, False] * 3,
    slots=[2, 2, 3, 3, 4, 5],
    rows=[8, 13, 26, 35],
    targets=[2, 7, 3, 7],
)
@given(
    seed=st.integers(0, 99),
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 16, 17]), min_size=6, max_size=6),
    draft=st.lists(st.booleans(), min_size=6, max_size=6),
    slots=st.lists(st.integers(-1, 9), min_size=6, max_size=6),
    rows=st.lists(st.integers(-2, 99), min_size=4, max_size=4).map(sorted),
    targets=st.lists(st.integers(-1, 9), min_size=4, max_size=4),
)  # fmt: skip
@pytest.mark.parametrize("tree", [False, True])
def test_drawn_batches(tree, seed, lengths, draft, slots, rows, targets):
    batch, words = mixed(
        seed, per_token=True, tree=tree, lengths=lengths, tokens=96, slots=slots,
        known=[n % 3 > 0 for n in range(6)],
    )  # fmt: skip
    batch = dataclasses.replace(batch, pool=batch.pool[:9])
    o, pool = run(batch, drafts=arrays(draft, words), snapshots=wanted(rows, targets))
    exact, states = drafts_oracle.run(batch, draft, words, (rows, targets))
    assert oracle.error(o, exact) < 3e-6 and oracle.error(pool, states) < 3e-6
    same = [s for s in range(9) if np.array_equal(states[s], batch.pool[s])]
    assert oracle.same_bits(pool[same], batch.pool[same])


@functools.cache
def committed(plan=PLAN):
    return jax.jit(
        lambda *a: gla.commit(*a[:-1], decay=a[-1], implementation="interpret", plan=plan)
    )


def commit(batch, words, plan=PLAN):
    with interpret.strict():
        args = (*batch.args()[1:], jnp.asarray(words), batch.decay)
        return np.asarray(committed(plan)(*args))


@settings(max_examples=8)
@example(seed=0, words=[0] * 7)
@given(
    seed=st.integers(0, 99),
    words=st.lists(
        st.sampled_from([0, 1, 3, 0b1011, 2**40 - 1, 2**64 - 1]), min_size=7, max_size=7
    ),
)
def test_commit_is_the_accepted_tokens_alone(seed, words):
    slots = np.random.default_rng(seed).permutation(9)[:7] - 1
    batch, _ = mixed(seed, per_token=True, tree=False, slots=slots)
    words = np.array([(x & 0xFFFFFFFF, x >> 32) for x in words], np.uint32)
    pool = commit(batch, words)
    alone = drafts_oracle.accepted(batch, words)
    assert oracle.error(pool, oracle.exact(alone)[1]) < 3e-6
    lengths = np.diff(alone.cu)
    same = [s for s in range(len(pool)) if s not in batch.slots[lengths > 0]]
    assert oracle.same_bits(pool[same], batch.pool[same])


def test_verified_and_committed_drafts_are_ordinary_tokens():
    batch, _ = mixed(5, tree=False, lengths=(4, 4, 4))
    counts = np.array([2, 0, 4])
    words = ((1 << counts) - 1).astype(np.uint32)[:, None]
    alone = drafts_oracle.accepted(batch, words)
    exact, states = oracle.exact(alone)
    found = run(batch, drafts=arrays([True] * 3))[0]
    rows = np.concatenate(
        [begin + np.arange(n) for begin, n in zip(batch.cu, counts, strict=False)]
    )
    assert oracle.error(found[rows], exact) < 3e-6
    assert oracle.error(commit(batch, words), states) < 3e-6


def test_a_chain_may_leave_its_accepted_part_in_its_own_slot():
    batch, _ = mixed(6, tree=False, lengths=(6, 5, 1))
    draft, rows = [True, True, True], [1, 8]
    snapshots = (rows, batch.slots[:2])
    o, pool = run(batch, drafts=arrays(draft), snapshots=wanted(*snapshots))
    exact, states = drafts_oracle.run(batch, draft, None, snapshots)
    assert oracle.error(o, exact) < 3e-6 and oracle.error(pool, states) < 3e-6
    assert not np.array_equal(states[batch.slots[1]], batch.pool[batch.slots[1]])
    assert oracle.same_bits(pool[batch.slots[2]], batch.pool[batch.slots[2]])


def test_batch_invariant_snapshots_are_requests_that_end_there_and_resume():
    batch, _ = mixed(11, tree=False, lengths=(100, 0), known=[True, True], slots=[1, 2])
    options = {"batch_invariant": True, "plan": gla.Plan(heads=1, interleave=1, window=32)}
    o, pool = run(batch, snapshots=wanted([40], [3]), **options)
    parts = dataclasses.replace(batch, cu=np.array([0, 41, 100], np.int32), pool=batch.pool.copy())
    parts.pool[2] = pool[3]
    again, after = run(parts, snapshots=wanted([40], [NONE]), **options)
    assert oracle.same_bits(o, again)
    assert oracle.same_bits(after[1], pool[3]) and oracle.same_bits(after[2], pool[1])


SMALL = gla.Plan(heads=1, interleave=1, window=128, inputs=2, states=2, lookahead=1)


def test_races_and_both_dma_modes():
    batch, words = mixed(7, per_token=True, qk_heads=2, heads=2)
    rows, slots = [4, 20, 30, 90, 95], [8, 0, 9, batch.slots[1], 8]
    options = {"drafts": arrays(DRAFT, words), "snapshots": wanted(rows, slots), "plan": SMALL}
    late, eager = run(batch, LATE, **options), run(batch, EAGER, **options)
    exact, states = drafts_oracle.run(batch, DRAFT, words, (rows, slots))
    for a, b in zip(late, eager, strict=True):
        assert oracle.same_bits(a, b)
    assert oracle.error(late[0], exact) < 3e-6 and oracle.error(late[1], states) < 3e-6


@pytest.mark.parametrize("state", [np.float32, ml_dtypes.bfloat16])
def test_snapshots_in_bf16(state):
    lengths, rows, slots = (150, 1, 20), [31, 127, 149, 150, 155], [4, 5, 0, NONE, 6]
    batch, _ = mixed(8, tree=False, lengths=lengths, dtype=ml_dtypes.bfloat16, state=state)
    batch = dataclasses.replace(batch, pool=np.concatenate([batch.pool, batch.pool]))
    o, pool = run(batch, snapshots=wanted(rows, slots))
    rounded, states = drafts_oracle.run(batch, None, None, (rows, slots), window=128)
    rounding = oracle.error(oracle.bf16(rounded), rounded)
    assert oracle.error(o, rounded) <= 1.25 * rounding + FLIPS
    assert oracle.error(pool, states) <= (STATE_A if state == np.float32 else 2.5e-3)


@pytest.mark.parametrize("where", ["q", "k", "v", "g", "pool"])
def test_nan_stays_in_its_drafts(where):
    clean, words = mixed(9, per_token=True)
    options = {"drafts": arrays(DRAFT, words)}
    good = run(clean, **options)
    bad = dataclasses.replace(clean, **{where: getattr(clean, where).copy()})
    row = clean.cu[2]
    getattr(bad, where)[clean.slots[2] if where == "pool" else row] = np.nan
    o, pool = run(bad, **options)
    mine = slice(row, clean.cu[3])
    assert np.isnan(o[mine]).any()
    others = np.r_[0:row, clean.cu[3] : len(o)]
    assert oracle.same_bits(o[others], good[0][others])
    keep = np.setdiff1d(np.arange(len(pool)), [clean.slots[2]])
    assert oracle.same_bits(pool[keep], good[1][keep])


def call(function, batch, **options):
    return function(*batch.args(), decay=batch.decay, **options)


@pytest.mark.parametrize("tree,per_token", [(False, False), (True, True)])
def test_the_specification_is_the_definition(tree, per_token):
    batch, words = mixed(10, per_token=per_token, tree=tree, gap=3)
    words = None if words is None else np.roll(words, 3, axis=0)
    rows, slots = [5, 20, 40, 60, 85], [8, batch.slots[2], batch.slots[0], 8, 9]
    options = {"drafts": arrays(DRAFT, words), "snapshots": wanted(rows, slots)}
    exact, states = drafts_oracle.run(batch, DRAFT, words, (rows, slots))
    for run_by in (base.recurrent, base.chunked):
        o, pool = call(reference.gla, batch, run=run_by, **options)
        assert oracle.error(o, exact) < 2e-6 and oracle.error(pool, states) < 2e-6
    accepted = np.arange(7, dtype=np.uint32)[:, None] * 3
    wanted_pool = oracle.exact(drafts_oracle.accepted(batch, accepted))[1]
    pool = reference.commit(*batch.args()[1:], jnp.asarray(accepted), decay=batch.decay)
    assert oracle.error(pool, wanted_pool) < 2e-6


def test_copies_of_slots():
    pool = jnp.arange(6.0)[:, None] * jnp.ones((6, 3))
    source, target = [0, 1, 9, 2, -1, 5, 3], [1, 0, 2, 4, 3, 9, 4]
    found = jax.jit(gla.copy_slots)(pool, *(jnp.asarray(x, jnp.int32) for x in (source, target)))
    assert found[:, 0].tolist() == [1, 0, 2, 3, 3, 5]
    none = jnp.zeros(0, jnp.int32)
    assert oracle.same_bits(gla.copy_slots(pool, none, none), pool)
    assert gla.copy_slots(pool[:0], *(jnp.zeros(2, jnp.int32),) * 2).shape == (0, 3)
