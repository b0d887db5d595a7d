"""Seeded faults: the gates have to be red on every one of them."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl

import ragged_attention as ra
from ragged_attention import (
    api,
    cache,
    chunks,
    flash,
    kernel,
    plumbing,
    problem,
    row_scales,
    schedule,
    tiles,
)
from reference import ragged_attention as reference
from tests.ragged_attention import oracle
from tests.ragged_attention.oracle import random_batch
from tests.ragged_attention.test_ragged_attention import (
    PLAN,
    bound,
    check_gates,
    compiled,
    legal,
    run,
)
from tpukit import interpret

pytestmark = pytest.mark.needs("interpreted faults")

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
        check_gates(batch, run(batch, mode, legal(TIGHT, batch)))
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


def forgets_the_past(state, s, v, scale):
    return flash_fold(state._replace(o=jnp.zeros_like(state.o)), s, v, scale)


def never_fades(state, s, v, scale):
    new = flash_fold(state, s, v, scale)
    return new._replace(total=new.total + 0.01 * state.total)


flash_fold, entries = flash.fold, plumbing.entries
RUN = 1 << plumbing.RUN_BIT
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
        changed(Plumbing.entries_of, lambda of: lambda place, *behind: of(place + 1, *behind)),
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


def test_runs_of_adjacent_pages_move_together_and_others_must_not(monkeypatch):
    batch = random_batch(31, [1100, 530], [1, 3], num_pages=110, indices=110)
    batch.pages[:] = np.roll(np.arange(110), -20)
    batch.pages[64:] = batch.pages[:63:-1]
    assert passes(LATE, batch)
    monkeypatch.setattr(api, "entries", changed(entries, only_runs_begin))
    assert passes(LATE, batch)
    monkeypatch.setattr(api, "entries", changed(entries, lambda found: found | RUN))
    assert not passes(LATE, batch)


def only_runs_begin(found):
    """Pages of a run but its first are said to be the pool's first."""
    begins = found.reshape(-1, plumbing.RUN)
    inner = (begins[:, :1] & RUN != 0) & (jnp.arange(plumbing.RUN) > 0)
    return jnp.where(inner, 0, begins).reshape(-1)


def test_garbage_behind_the_keys_is_seen(monkeypatch):
    batch = mixed()
    _, _, live = oracle.written(batch)
    batch.k_pages[~live] = batch.v_pages[~live] = float("nan")
    assert passes(LATE, batch)
    monkeypatch.setattr(Pass, "values_of", careless_values)
    assert not passes(LATE, batch)


def careless_values(self, record, head, chunk, style):
    """Values whose last group may hold anything."""
    words = self.words(self.layout.vals, head, chunk)
    return flash.unpacked(words, self.layout.dtype, self.operand(style))


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


def scaled():
    """A batch with scales of rows, NaN in those of no request, and pages that are not there."""
    shape = {"num_pages": 90, "indices": 90, "kv_heads": 2, "cache": ml_dtypes.float8_e4m3fn}
    batch = random_batch(32, [40, 530, 60, 600, 9], [3, 1, 2, 40, 1], **shape)
    rng, (_, _, live) = np.random.default_rng(32), oracle.written(batch)
    for name in ("k_scale", "v_scale"):
        batch.options[name] = rng.uniform(0.5, 2, (90, 16, 2)).astype(np.float32)
        batch.options[name][~live] = batch.options[name][0] = np.nan
    batch.pages[batch.pages == 0] = batch.pages[1] = -1
    return batch


scales_of = row_scales.RowScales.scales_of


def careless_scales(self, head, chunk):
    """Scales of values, whatever they are."""
    return self.scales_of(self.vmem.v_scales, head, *chunk[:3])


class Unawaited:
    """A transfer that is started, and whose end nobody waits for."""

    def __init__(self, copy):
        self.start, self.wait = copy.start, nothing


def scaled_sums(state, s, v, scale=None):
    """Scales of values count in the sum of weights too."""
    if scale is None:
        return flash_fold(state, s, v)
    ones = jnp.ones((v.shape[0], 128), v.dtype)
    sums = flash_fold(state._replace(o=0 * state.top), s, ones, scale)
    fade = jnp.exp2(state.top - sums.top)
    new = flash_fold(state, s, v, scale)
    return new._replace(total=sums.o + state.total * fade)


RowScales, Chunks = row_scales.RowScales, chunks.Chunks
copies, place_of_scales = RowScales.scale_copies, RowScales.scale_place
SCALE_FAULTS = {
    "the neighbour's": (
        RowScales,
        "scales_of",
        changed(RowScales.scales_of, lambda x: jnp.roll(x, 1, axis=1)),
        LATE,
    ),
    "the other head's": (
        RowScales,
        "scales_of",
        lambda self, ring, head, *rest: scales_of(self, ring, 1 - head, *rest),
        LATE,
    ),
    "keys' are forgotten": (Chunks, "key_factor", lambda self, head, _: self.factor(head), LATE),
    "values' count in the sum": (flash, "fold", scaled_sums, LATE),
    "products are rounded": (
        flash,
        "halves",
        changed(flash.halves, lambda x: (x[0], 0 * x[1])),
        LATE,
    ),
    "a value's may be NaN": (Chunks, "value_scales", careless_scales, LATE),
    "they begin at lane 0": (
        RowScales,
        "scale_place",
        changed(place_of_scales, lambda found: (found[0], 0 * found[1], found[2])),
        LATE,
    ),
    "they are not awaited": (
        RowScales,
        "scale_copies",
        changed(copies, lambda found: [Unawaited(copy) for copy in found]),
        MODE,
    ),
    "those of pages out of the pool stay": (RowScales, "erase_scales", nothing, LATE),
}


@pytest.mark.parametrize("mode", [LATE, MODE], ids=["late", "eager"])
def test_scales_of_rows_pass(mode):
    assert passes(mode, scaled())


@pytest.mark.parametrize("name", SCALE_FAULTS)
def test_every_fault_of_scales_of_rows_is_seen(name, monkeypatch):
    place, attribute, fault, mode = SCALE_FAULTS[name]
    assert hasattr(place, attribute)
    monkeypatch.setattr(place, attribute, fault)
    assert not passes(mode, scaled())


def specified(scales):
    """Whether the reference is right, over more keys than it computes together."""
    batch = random_batch(31, [40, 530, 9], [3, 20, 1], num_pages=50, **scales)
    reference.attend_blocks.clear_cache()
    o = np.asarray(ra.ragged_paged_attention(*batch.args(), **batch.options).o, float)
    reference.attend_blocks.clear_cache()
    wanted, _, size = oracle.exact(batch)
    return bool((np.abs(o - wanted) <= bound(batch, wanted, size)).all())


visible, page_of = reference.visible, reference.page_of
REFERENCE_FAULTS = {
    "a window on all": (reference, "visible", lambda t, k, m: visible(t, k, m) & (k >= 2)),
    "later blocks of keys": (reference, "visible", lambda t, k, m: visible(t, k, m) & (k < 256)),
    "keys of other requests": (reference, "page_of", lambda b, r, k, s: page_of(b, 0 * r, k, s)),
    "scales of rows": (problem.Call, "row_scales", lambda self: {}),
}


def test_the_reference_and_every_fault_of_it(monkeypatch):
    rng = np.random.default_rng(3)
    names = ("k_scale", "v_scale")
    scales = {name: rng.uniform(0.5, 2, (50, 16, 1)).astype(np.float32) for name in names}
    assert specified(scales)
    for place, attribute, fault in REFERENCE_FAULTS.values():
        with monkeypatch.context() as changed:
            changed.setattr(place, attribute, fault)
            assert not specified(scales), attribute
    reference.attend_blocks.clear_cache()


def test_sets_that_are_weighed_alike_are_seen(monkeypatch):
    """Merged results follow the logarithms."""
    rng = np.random.default_rng(5)
    o = jnp.asarray(rng.standard_normal((2, 3, 1, 8)), jnp.float32)
    lse = jnp.log(jnp.array([[[1.0]] * 3, [[3.0]] * 3]))
    wanted = np.asarray(o[0] + 3 * o[1]) / 4
    assert np.allclose(ra.merge_attention_states(o, lse)[0], wanted, atol=1e-6)
    alike = cache._merged
    monkeypatch.setattr(cache, "_merged", lambda o, lse, *rest: alike(o, 0 * lse, *rest))
    assert not np.allclose(ra.merge_attention_states(o, lse)[0], wanted, atol=1e-6)
