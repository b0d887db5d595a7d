"""What bad and unusual drafts and snapshots lead to: an error that names it, or a defined result."""

# ruff: noqa: E501  (a row of a table is a line)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gla
from tests.gla import drafts_oracle, oracle
from tests.gla.test_drafts import arrays, mixed, wanted
from tpukit.errors import ArgumentError, UnsupportedError

BATCH, WORDS = mixed(1, lengths=(4, 1, 7), heads=2)
DRAFT = [True, False, True]
TREE = jnp.asarray(WORDS)


def call(**options):
    return gla.gla(*BATCH.args(), decay=BATCH.decay, **options)


def commit(accepted, **options):
    return gla.commit(*BATCH.args()[1:], accepted, decay=BATCH.decay, **options)


BAD = {
    "drafts of another kind": (dict(drafts=jnp.zeros(3, bool)), r"drafts is a .*; needs Drafts or None"),
    "snapshots of another kind": (dict(snapshots=(1, 2)), r"snapshots is a tuple; needs Snapshots or None"),
    "too few flags": (dict(drafts=arrays([True])), r"drafts.requests has shape \(1,\); needs 3"),
    "integer flags": (dict(drafts=gla.Drafts(jnp.zeros(3, jnp.int32))), "drafts.requests has dtype int32; needs bool"),
    "words of fewer tokens": (dict(drafts=gla.Drafts(jnp.zeros(3, bool), TREE[:5])), r"drafts.ancestors has shape \(5, 2\); needs 12"),
    "three words": (dict(drafts=gla.Drafts(jnp.zeros(3, bool), jnp.zeros((12, 3), jnp.uint32))), "words of drafts.ancestors is 3; needs 1 or 2"),
    "signed words": (dict(drafts=gla.Drafts(jnp.zeros(3, bool), TREE.astype(jnp.int32))), "drafts.ancestors has dtype int32; needs uint32"),
    "rows without slots": (dict(snapshots=wanted([1, 2], [1])), r"snapshots.slots has shape \(1,\); needs 2"),
    "float rows": (dict(snapshots=gla.Snapshots(jnp.zeros(1), jnp.zeros(1, jnp.int32))), "snapshots.rows has dtype float32"),
    "a window that holds no tree": (dict(drafts=arrays(DRAFT, WORDS), implementation="interpret", plan=gla.Plan(heads=2, interleave=1, window=64)), "plan.window is 64; needs 128 or 256 for trees"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    options, message = BAD[name]
    with pytest.raises(ArgumentError, match=message):
        call(**options)


BAD_ACCEPTED = {
    "of fewer requests": (jnp.zeros((2, 1), jnp.uint32), r"commit: accepted has shape \(2, 1\); needs 3"),
    "counts": (jnp.zeros(3, jnp.int32), "commit: accepted has shape .* needs 2 dimensions"),
    "signed": (jnp.zeros((3, 1), jnp.int32), "commit: accepted has dtype int32; needs uint32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ACCEPTED)
def test_bad_acceptance_is_named(name):
    accepted, message = BAD_ACCEPTED[name]
    with pytest.raises(ArgumentError, match=message):
        commit(accepted)


def test_commit_names_itself():
    with pytest.raises(ArgumentError, match=r"commit: v has dtype float64|commit: v has dtype bf"):
        args = list(BATCH.args()[1:])
        args[1] = args[1].astype(jnp.bfloat16)
        gla.commit(*args, jnp.zeros((3, 1), jnp.uint32), decay=BATCH.decay)
    with pytest.raises(UnsupportedError, match="implementation='reference'"):
        commit(jnp.zeros((3, 1), jnp.uint32), implementation="pallas")


ORPHAN = np.array([[1], [2], [7], [9], [0]] + [[1]] * 7, np.uint32)
BAD_VALUES = {
    "many drafts": (65, dict(drafts=[True]), r"drafts.requests has True at index \[0\]; needs at most 64"),
    "a path through no parent": (12, dict(drafts=DRAFT, words=ORPHAN), r"drafts.ancestors has 7 at index \[2, 0\]; needs a draft's own bit"),
    "slot past the pool": (12, dict(rows=[1], slots=[99]), r"snapshots.slots has 99 at index \[0\]; needs -1 to"),
    "rows that descend": (12, dict(rows=[6, 2], slots=[4, 5]), r"snapshots.rows has 2 at index \[1\]; needs ascending rows"),
    "row of no request": (12, dict(rows=[12], slots=[4]), r"snapshots.rows has 12 at index \[0\]"),
    "row of a tree": (12, dict(drafts=DRAFT, words=WORDS, rows=[1], slots=[4]), r"snapshots.rows has 1 at index \[0\]; .* but of no tree"),
    "slot of a request": (12, dict(rows=[1], slots=[BATCH.slots[1]]), r"snapshots.slots has . at index \[0\]; needs a slot that no request has"),
    "the same slot": (12, dict(rows=[1, 6], slots=[4, 4]), r"snapshots.slots has 4 at index \[0\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VALUES)
def test_validate_names_the_value_and_its_place(name):
    tokens, values, message = BAD_VALUES[name]
    batch = BATCH if tokens == 12 else mixed(2, lengths=(tokens,))[0]
    options = {}
    if "drafts" in values:
        options["drafts"] = arrays(values["drafts"], values.get("words"))
    if "rows" in values:
        options["snapshots"] = wanted(values["rows"], values["slots"])
    with pytest.raises(ArgumentError, match=message):
        gla.gla(*batch.args(), decay=batch.decay, validate=True, **options)


def test_validate_accepts_good_values():
    own = wanted([0, 9], [-1, BATCH.slots[2]])
    call(validate=True, drafts=arrays(DRAFT, WORDS), snapshots=wanted([4], [0]))
    call(validate=True, drafts=arrays(DRAFT), snapshots=own)
    commit(jnp.asarray([[15], [0], [127]], jnp.uint32), validate=True)
    with pytest.raises(ArgumentError, match=r"commit: accepted has 2 at index \[1, 0\]"):
        commit(jnp.asarray([[15], [2], [127]], jnp.uint32), validate=True)
    with pytest.raises(ArgumentError, match=r"is traced.*outside jax.jit"):
        jax.jit(lambda a: commit(a, validate=True))(jnp.zeros((3, 1), jnp.uint32))


@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_nothing_to_do(implementation):
    none = jnp.zeros(0, jnp.int32)
    q, k, v, pool, slots, cu, known = BATCH.args()
    empty = (q[:0], k[:0], v[:0], pool, slots, jnp.zeros_like(cu), known)
    options = {"decay": BATCH.decay, "implementation": implementation}
    more = {"drafts": gla.Drafts(jnp.ones(3, bool), TREE[:0]), "snapshots": wanted([0], [4])}
    o, after = gla.gla(*empty, **options, **more)
    assert o.shape == (0, 2, 128) and oracle.same_bits(after, pool)
    after = gla.commit(*empty[1:], jnp.ones((3, 1), jnp.uint32), **options)
    assert oracle.same_bits(after, pool)
    more = {"drafts": gla.Drafts(none.astype(bool)), "snapshots": wanted([], [])}
    o, after = gla.gla(q, k, v, pool, none, cu[:1], none.astype(bool), **options, **more)
    assert not np.asarray(o).any() and oracle.same_bits(after, pool)


def test_explain_and_supports_know_options():
    more = {"drafts": arrays(DRAFT, WORDS), "snapshots": wanted([4], [0])}
    plain = gla.explain(*BATCH.args(), decay=BATCH.decay, chip="v6e")
    found = gla.explain(*BATCH.args(), decay=BATCH.decay, chip="v6e", **more)
    assert plain.plan.window == 64 and found.plan.window == 128
    assert found.vmem_bytes > plain.vmem_bytes
    assert gla.supports(*BATCH.args(), decay=BATCH.decay, chip="v5e", **more)
    small = gla.Plan(heads=2, interleave=1, window=64)
    assert not gla.supports(*BATCH.args(), decay=BATCH.decay, chip="v5e", plan=small, **more)


def test_words_are_those_of_paged_attention():
    parents = [[-1, 0, 0, 1, 3], [-1, -1]]
    assert drafts_oracle.words_of(parents)[:, 0].tolist() == [1, 3, 5, 11, 27, 1, 2]
