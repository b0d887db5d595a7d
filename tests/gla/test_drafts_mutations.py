"""Seeded faults in what is done for drafts and snapshots: the gates have to be red on every one."""

# ruff: noqa: E501  (a row of a table is a line)

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import gla
from gla import api, plumbing, schedule, tree
from reference import gla_drafts as reference
from tests.gla import drafts_oracle, oracle
from tests.gla.test_drafts import arrays, commit, committed, mixed, wanted
from tests.gla.test_gla import compiled, run
from tests.gla.test_mutations import stream_with, without_wait
from tpukit import interpret

pytestmark = pytest.mark.needs("interpreted faults")

PLAN = gla.Plan(heads=1, interleave=1, window=128, inputs=2, states=2, lookahead=1)
LENGTHS, DRAFT = (6, 25, 1, 9, 8), [True, False, False, True, False]
BATCH, WORDS = mixed(30, per_token=True, lengths=LENGTHS, qk_heads=1, heads=1, strongest=0.5)
ROWS, SLOTS = (10, 15, 20, 25, 36), (0, 6, BATCH.slots[2], 7, 6)
ACCEPTED = np.array([[5], [0], [1], [2**9 - 1], [3]], np.uint32)


def near(found, exact):
    return oracle.error(found, exact, axis=tuple(range(1, found.ndim))) < 1e-5


def passes():
    """Whether the gates are green: values, states, other slots, and the strict harness."""
    compiled.cache_clear()
    try:
        options = {"drafts": arrays(DRAFT, WORDS), "snapshots": wanted(ROWS, SLOTS)}
        o, pool = run(BATCH, plan=PLAN, **options)
        exact, states = drafts_oracle.run(BATCH, DRAFT, WORDS, (ROWS, SLOTS))
        return near(o, exact) and near(pool, states)
    except interpret.InterpretError:
        return False
    finally:
        compiled.cache_clear()


def commits():
    """Whether the gates of `commit` are green."""
    committed.cache_clear()
    try:
        pool = commit(BATCH, ACCEPTED, PLAN)
        return near(pool, oracle.exact(drafts_oracle.accepted(BATCH, ACCEPTED))[1])
    except interpret.InterpretError:
        return False
    finally:
        committed.cache_clear()


def test_the_kernel_passes():
    assert passes() and commits()


good_open, good_decays = tree.Tree.open, tree.Tree.decays
good_scalars, good_part = api.Call.scalars, schedule.list_segment
good_rows, good_bits = reference.accepted_rows, reference.rows_of


def unrefused(batch, listed):
    """Every snapshot is written, whoever has the slot."""

    def number(c, count):
        @schedule.pl.when(listed.place[c] >= 0)
        def _():
            listed.kind[listed.place[c]] += schedule.SNAPSHOT
            listed.snapshot[listed.place[c]] = count
            listed.target[count] = batch.snapshot_slots[c]

        return count + (listed.place[c] >= 0).astype(jnp.int32)

    count = batch.snapshot_rows.shape[0]
    listed.counts[2] = lax.fori_loop(0, count, number, jnp.int32(0))


def later_rows(self, num_tokens):
    found = good_scalars(self, num_tokens)
    return found._replace(snapshot_rows=found.snapshot_rows + 1)


def siblings_seen(self, words, begin, steps, scale):
    good_open(self, jnp.full_like(words, -1), begin, steps, scale)


def next_row(self, words, begin, steps, scale):
    good_open(self, words, begin + 1, steps, scale)


MUTANTS = {
    "drafts stored": (schedule, "DRAFTS", 4),
    "a tree read as a chain": (tree.Tree, "open", siblings_seen),
    "bits counted from the next row": (tree.Tree, "open", next_row),
    "no decay between drafts": (tree.Tree, "decays", lambda self, h, size, scale: good_decays(self, h, size, scale)._replace(within=self.seen[:size, :size])),
    "no decay since the state": (tree.Tree, "decays", lambda self, h, size, scale: good_decays(self, h, size, scale)._replace(since=jnp.full((size, 1), scale))),
    "words not awaited": (plumbing.Plumbing, "words", without_wait("words")),
    "snapshots not awaited": (plumbing.Plumbing, "snapshots", without_wait("snapshots")),
    "snapshots in the slots of requests": (schedule, "keep_snapshots", unrefused),
    "snapshots a row late": (api.Call, "scalars", later_rows),
    "snapshots never written": (plumbing.Plumbing, "snapshots", stream_with("snapshots", exists=lambda self, s: lambda n: n < 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_every_fault_is_caught(name, monkeypatch):
    owner, attribute, fault = MUTANTS[name]
    assert hasattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, fault)
    assert not passes()


COMMIT_MUTANTS = {
    "everything accepted": (reference, "accepted_rows", lambda accepted, *args: good_rows(jnp.full_like(accepted, -1), *args)),
    "decays of other rows": (reference, "rows_of", lambda decay, rows: decay),
    "an early row": (reference, "accepted_rows", lambda *args: (good_rows(*args)[0] - 1, good_rows(*args)[1])),
    "state never stored": (plumbing.Plumbing, "stores", stream_with("stores", exists=lambda self, s: lambda r: r < 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMIT_MUTANTS)
def test_every_fault_of_commit_is_caught(name, monkeypatch):
    owner, attribute, fault = COMMIT_MUTANTS[name]
    monkeypatch.setattr(owner, attribute, fault)
    assert not commits()
