"""Seeded faults: bit-exactness on the simulator has to be red on every one of them."""

import dataclasses
import functools

import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gather_reduce import Plan, kernel, plan, rows
from tests.gather_reduce.oracle import Shape, check, draw
from tpukit.sparsecore.faults import SimulationError

pytestmark = pytest.mark.needs("SparseCore simulator")

PACKED = Shape(tokens=70, top_k=5, rows=64, hidden_size=512)
PLAIN = dataclasses.replace(PACKED, format="bfloat16", tokens=9)
NARROW = dataclasses.replace(PACKED, format="packed float8_e4m3fn", tokens=9)
SPARSE = dataclasses.replace(PACKED, tokens=33, top_k=6)
TWO_PARTS = Plan("sparsecore", 2, 128)


def passes(shape, used=None):
    """Whether the gate is green, with terms that do not count and NaN behind them."""
    data = draw(shape, holes=0.1, invalid=0.8 if shape == SPARSE else 0.1)
    data.weights[0, 0] = 0
    data.indices[1, 1] = shape.rows + 5
    data.x[7] = float("nan")
    data.valid &= data.indices != 7
    try:
        check(shape, data, plan=used)
    except (AssertionError, SimulationError):
        return False
    return True


@pytest.mark.parametrize("shape", [PACKED, PLAIN, NARROW, SPARSE], ids=str)
def test_the_kernel_passes(shape):
    assert passes(shape)
    assert shape != PACKED or passes(shape, TWO_PARTS)


def never(self, *args):
    """Instead of something that the kernel must do."""


def step_without(what):
    """`Walk.step` that leaves out one of its waits."""

    def step(self, first, at):
        if what != "rows":
            for copy in self.row_copies(at):
                copy.wait()
        self.reduce(at)
        for copy in self.out_copies(first, at):
            copy.start()

    return step


def raw_entries(self, first):
    """`Walk.bring_entries` that cleans nothing."""
    count = self.work.window * self.problem.entries
    here = pl.ds(pl.multiple_of(first * self.problem.entries, 8), count)
    pltpu.sync_copy(self.refs.indices.at[here], self.refs.ids.at[pl.ds(0, count)])
    pltpu.sync_copy(self.refs.factors.at[here], self.refs.scales.at[pl.ds(0, count)])


def bf16_products(terms, factors):
    """`weighted_sum` with products in bfloat16."""

    def narrow(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    products = zip(terms, factors, strict=True)
    return good_sum([[narrow(x * f) for x in parts] for parts, f in products], None)


def sum_in_a_row(terms, factors):
    """`weighted_sum` from first to last."""
    terms = [[x * f for x in t] for t, f in zip(terms, factors, strict=True)]
    return [functools.reduce(jnp.add, part) for part in zip(*terms, strict=True)]


def of_the_next(self, ref, group, entry):
    """`Walk.splat` that is off by one where it is of factors."""
    return good_splat(self, ref, group, entry + (ref is self.refs.scales))


def first_twice(self, group):
    """`Walk.pairs` whose second entry is the first one."""
    found, few = good_pairs(self, group)
    return [[one, one] for one, _ in found], few


def always_few(self, group):
    """`Walk.pairs` that forgets what comes third."""
    return good_pairs(self, group)[0], jnp.bool_(True)


def truncated(first, second):
    """`as_pair` that does not round."""
    bits = [pltpu.bitcast(x, jnp.int32, dim=-1) for x in (first, second)]
    return lax.shift_right_logical(bits[0], 16) | (bits[1] & rows.HIGH)


def moved(**places):
    """`Walk.place` with something added to group, word or slot."""

    def place(self, step):
        group, word, slot = good_place(self, step)
        return (
            group + places.get("group", 0),
            word + places.get("word", 0),
            slot * places.get("slot", 1),
        )

    return place


def one_step_less(self, first, count):
    """`Walk.walk` that leaves out the last step of a window."""
    good_walk(self, first, count - 1)


def more_teams(problem, used, sparse):
    """`work_of` in which subcores that share tokens share columns as well."""
    work = good_work(problem, used, sparse)
    return dataclasses.replace(work, chunks=work.chunks * used.parts)


good_sum, good_place = rows.weighted_sum, kernel.Walk.place
good_splat, good_pairs = kernel.Walk.splat, kernel.Walk.pairs
good_walk, good_work, good_decode = kernel.Walk.walk, plan.work_of, rows.decode

MUTANTS = {
    "rows not awaited": (kernel.Walk, "step", step_without("rows"), PACKED),
    "sums not awaited": (kernel.Walk, "step", step_without("sums"), PACKED),
    "last sums not awaited": (kernel.Walk, "wait_sums", never, PACKED),
    "nothing selected away": (kernel.Walk, "all_count", lambda *_: jnp.bool_(True), PACKED),
    "entries not cleaned": (kernel.Walk, "bring_entries", raw_entries, PACKED),
    "bfloat16 products": (kernel, "weighted_sum", bf16_products, PACKED),
    "another order of the sum": (kernel, "weighted_sum", sum_in_a_row, PACKED),
    "factor of another row": (kernel.Walk, "splat", of_the_next, PACKED),
    "one of two rows twice": (kernel.Walk, "pairs", first_twice, SPARSE),
    "a third row forgotten": (kernel.Walk, "pairs", always_few, PACKED),
    "not rounded": (kernel, "as_pair", truncated, PACKED),
    "pairs swapped": (kernel, "as_pair", lambda a, b: rows.as_pair(b, a), PACKED),
    "halves swapped": (kernel, "decode", lambda *a: good_decode(*a)[::-1], PACKED),
    "parity ignored": (kernel, "decode", lambda k, w, s: good_decode(k, w, 0 * s), PLAIN),
    "parts in the wrong order": (
        kernel,
        "decode",
        lambda k, w, s: good_decode(k, w, 24 - s),
        NARROW,
    ),
    "one buffer for two steps": (kernel.Walk, "place", moved(slot=0), PACKED),
    "rows of the next step": (kernel.Walk, "place", moved(group=1), PACKED),
    "a step forgotten": (kernel.Walk, "walk", one_step_less, PACKED),
    "columns of another subcore": (kernel, "work_of", more_teams, PACKED),
    "no exponent bias": (rows, "E4M3_BIAS", rows.E4M3_BIAS / 2, NARROW),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_fault_is_caught(name, monkeypatch):
    owner, attribute, fault, shape = MUTANTS[name]
    assert hasattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, fault)
    assert not passes(shape, TWO_PARTS if shape == PACKED else None)
