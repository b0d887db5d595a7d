"""Seeded faults: the gates have to be red on every one of them."""

import dataclasses

import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from ragged_attention import flash, kernel, plumbing, schedule, tiles
from tests.ragged_attention import oracle
from tests.ragged_attention.oracle import random_batch
from tests.ragged_attention.test_ragged_attention import PLAN, check_gates, compiled, run
from tpukit import interpret

MODE = interpret.MODES[1]  # eager, with races
LATE = interpret.MODES[0]
TIGHT = dataclasses.replace(PLAN, tiles=2)


def mixed():
    return random_batch(30, [40, 530, 60, 600, 9], [3, 1, 2, 40, 1], num_pages=90, indices=90)


def passes(mode, batch=None):
    """Whether the gates are green: values, the cache, and the strict harness."""
    compiled.cache_clear()
    batch = mixed() if batch is None else batch
    try:
        check_gates(batch, run(batch, mode, TIGHT))
    except (AssertionError, interpret.InterpretError):
        return False
    finally:
        compiled.cache_clear()
    return True


def changed(function, change):
    """`function` with its result changed."""
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def nothing(*args, **kwargs):
    """Does nothing."""


def field(**changes):
    """A change of fields of a record."""

    def change(found):
        record, cursor = found
        values = {name: of(record) for name, of in changes.items()}
        return record._replace(**values), cursor

    return change


def narrow_sums(function):
    """Products with sums of 8 bits."""
    return changed(function, lambda x: x.astype(jnp.bfloat16).astype(jnp.float32))


def forgets_the_past(state, s, v, compute, sum_by_matmul):
    return flash_fold(state._replace(o=jnp.zeros_like(state.o)), s, v, compute, sum_by_matmul)


def never_fades(state, s, v, compute, sum_by_matmul):
    new = flash_fold(state, s, v, compute, sum_by_matmul)
    return new._replace(total=new.total + 0.01 * state.total)


flash_fold = flash.fold
attend_record, write_record = schedule.Walk.attend_record, schedule.Walk.write_record
Pass, Plumbing = kernel.Pass, plumbing.Plumbing


# What is broken, where, and what is there instead; and in which mode it has to show.
FAULTS = {
    "narrow sums": (flash, "dot", narrow_sums(flash.dot), LATE),
    "tiles before this one are forgotten": (flash, "fold", forgets_the_past, LATE),
    "weights do not fade": (flash, "fold", never_fades, LATE),
    "later keys are seen": (
        schedule.Walk,
        "attend_record",
        changed(attend_record, field(position=lambda r: r.position + 1)),
        LATE,
    ),
    "a key is missing": (
        schedule.Walk,
        "attend_record",
        changed(attend_record, field(span=lambda r: jnp.maximum(r.span - 1, 0))),
        LATE,
    ),
    "new rows one token late": (
        Plumbing,
        "shift",
        changed(Plumbing.shift, lambda shift: shift + 1),
        LATE,
    ),
    "new rows are not written": (tiles.Tiles, "store_groups", nothing, LATE),
    "new rows are not seen": (Pass, "mend", nothing, LATE),
    "a tile is not awaited": (Pass, "await_tile", nothing, MODE),
    "late: a tile is not awaited": (Pass, "await_tile", nothing, LATE),
    "stores are not awaited": (Pass, "await_store", nothing, MODE),
    "the fence is ignored": (
        schedule.Walk,
        "attend_record",
        changed(attend_record, field(kind=lambda r: r.kind & ~schedule.FENCE)),
        LATE,
    ),
    "outputs are not awaited": (Pass, "await_out", nothing, MODE),
    "the next page": (
        Plumbing,
        "entries_of",
        changed(Plumbing.entries_of, lambda of: lambda place: of(place + 1)),
        LATE,
    ),
    "writing ends early": (
        schedule.Walk,
        "write_record",
        changed(write_record, field(span=lambda r: jnp.maximum(r.span - 1, r.cached))),
        LATE,
    ),
    "logits are a little large": (Pass, "factor", changed(Pass.factor, lambda x: 1.02 * x), LATE),
}


@pytest.mark.parametrize("mode", [LATE, MODE], ids=["late", "eager"])
def test_the_kernel_passes(mode):
    assert passes(mode)


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_seen(name, monkeypatch):
    place, attribute, fault, mode = FAULTS[name]
    assert hasattr(place, attribute)
    monkeypatch.setattr(place, attribute, fault)
    assert not passes(mode)


def test_pages_out_of_the_pool_that_are_not_erased_are_seen(monkeypatch):
    batch = mixed()
    batch.pages[1] = 10**6
    assert passes(LATE, batch)
    monkeypatch.setattr(Pass, "erase_pages", nothing)
    assert not passes(LATE, batch)


def test_garbage_behind_the_keys_is_seen(monkeypatch):
    batch = mixed()
    _, _, live = oracle.written(batch)
    batch.k_pages[~live] = batch.v_pages[~live] = float("nan")
    assert passes(LATE, batch)
    monkeypatch.setattr(Pass, "values_of", careless_values)
    assert not passes(LATE, batch)


def careless_values(self, record, head, tile):
    """Values whose last group may hold anything."""
    words = self.words(self.layout.vals, head, tile)
    return flash.unpacked(words, self.layout.dtype, self.problem.compute_dtype)


def test_another_tokens_resident_queries_are_seen(monkeypatch):
    batch = random_batch(31, [40, 30, 60], [1, 1, 1], tokens=16)
    wanted = run(batch, LATE, TIGHT).o
    assert oracle.same_bits(run(batch, LATE, TIGHT, return_lse=False).o, wanted)
    compiled.cache_clear()
    monkeypatch.setattr(Plumbing, "queries_of", late_queries)
    assert not oracle.same_bits(run(batch, LATE, TIGHT, return_lse=False).o, wanted)
    compiled.cache_clear()


def late_queries(self, record, tokens):
    """The queries of the token behind."""
    return self.vmem.queries.at[0, pl.ds(record.row + 1, tokens)]
