"""Seeded faults: the gates or the harness have to be red on every one of them."""

import dataclasses

import jax.numpy as jnp
import pytest
from jax import lax

from fused_moe import (
    api,
    bulk,
    combine,
    dispatch,
    experts,
    ffn,
    kernel,
    rows,
    scatter,
    slices,
    tiles,
)
from tests.fused_moe import oracle
from tests.fused_moe.test_fused_moe import (
    BULK,
    EAGER,
    LATE,
    PLAN,
    QUANTISED,
    check_gates,
    compiled,
    run,
)
from tpukit import buffers, interpret

pytestmark = pytest.mark.needs("interpreted faults")

# Many tokens have several experts on a device, and there are too few partials for one pass.
LAYER = oracle.random_layer(7, 40, 4, 3, biased=True, masked=0.05, **QUANTISED)
FEW = dataclasses.replace(PLAN, partials=32)


def passes(mode=LATE, *, bulk=False):
    """Whether gates and harness are green, on two devices or on one in bulk."""
    devices, plan = (1, BULK) if bulk else (2, FEW)
    compiled.cache_clear()
    try:
        check_gates(LAYER, run(LAYER, devices, mode, plan), devices, bulk=bulk)
    except (AssertionError, interpret.InterpretError):
        return False
    finally:
        compiled.cache_clear()
    return True


@pytest.mark.parametrize("bulk", [False, True], ids=["one by one", "in bulk"])
@pytest.mark.parametrize("mode", [LATE, EAGER], ids=["late", "eager"])
def test_the_kernel_passes(mode, bulk):
    assert passes(mode, bulk=bulk)


def bfloat16_sums(x, weight, scale, bias, factor):
    parts = []
    for k in range(0, x.shape[1], 128):
        inputs = slice(k, k + 128)
        parts.append(good_product(x[:, inputs], weight[inputs], scale, None, factor))
    total = parts[0]
    for part in parts[1:]:
        total = lax.reduce_precision(total + part, exponent_bits=8, mantissa_bits=7)
    return total if bias is None else total + bias


good_product = ffn.product
good_scale = rows.row_scale
good_describe = dispatch.describe
good_brought = combine.Combine.brought_by
good_factors = experts.Visits.routed_factors


def without_bias(x, weight, scale, bias, factor):
    del bias
    return good_product(x, weight, scale, None, factor)


def without_scale(x, weight, scale, bias, factor):
    return good_product(x, weight, jnp.ones_like(scale), bias, factor)


def other_factors(change):
    def routed_factors(self, expert):
        good = good_factors(self, expert)
        return lambda tail: change(*good(tail))

    return routed_factors


def other_lists(change):
    def describe(*args):
        lists, tails = good_describe(*args)
        return lists._replace(entries=change(lists.entries)), tails

    return describe


def nothing(*args, **kwargs):
    del args, kwargs


VALUES = {
    "sums in bfloat16": (ffn, "product", bfloat16_sums),
    "no bias": (ffn, "product", without_bias),
    "no scale of weights": (ffn, "product", without_scale),
    "scales half a percent too large": (
        experts,
        "row_scale",
        lambda amax, dtype: 1.005 * good_scale(amax, dtype),
    ),
    "no scale of rows": (
        experts.Visits,
        "routed_factors",
        other_factors(lambda scale, weight, resumes: (jnp.ones_like(scale), weight, resumes)),
    ),
    "no routing weight": (
        experts.Visits,
        "routed_factors",
        other_factors(lambda scale, weight, resumes: (scale, jnp.ones_like(weight), resumes)),
    ),
    "sums start anew": (
        experts.Visits,
        "routed_factors",
        other_factors(lambda scale, weight, resumes: (scale, weight, 0 * resumes)),
    ),
    "the activation of another model": (
        experts,
        "gated",
        lambda gate, up, activation, limit: jnp.tanh(gate) * up,
    ),
    "what no slot brought is added": (
        combine.Combine,
        "brought_by",
        lambda self, tail, j: good_brought(self, tail, j) | True,
    ),
    "one token less": (
        api,
        "describe",
        other_lists(lambda entries: entries.at[0, 3].set(entries[0, 4])),
    ),
    "no token is the last": (
        api,
        "describe",
        other_lists(lambda entries: entries & ~dispatch.LAST),
    ),
}


@pytest.mark.parametrize(("where", "name", "fault"), VALUES.values(), ids=VALUES)
def test_wrong_values_are_seen(where, name, fault, monkeypatch):
    monkeypatch.setattr(where, name, fault)
    assert not passes()


class Careless(buffers.Stream):
    """A stream that never waits."""

    def wait(self, index):
        del index


def careless_streams(self, experts_, names):
    good = good_stream(self, experts_, names)
    return Careless(good.copies, good.depth, good.exists)


good_stream = slices.Rings.stream
PROTOCOL = {
    "no barrier": (scatter.Scatter, "enter", nothing),
    "slices are not awaited": (slices.Rings, "stream", careless_streams),
    "rows from other devices are not awaited": (tiles.Tiles, "wait_arrived", nothing),
    "results on their way are overwritten": (experts.Visits, "wait_leaving", nothing),
    "sums are read before they are stored": (tiles.Tiles, "wait_storing", nothing),
    "lists from other devices are not awaited": (
        scatter,
        "wait_rows",
        nothing,
    ),
    "results from other devices are not awaited": (combine, "wait_rows", nothing),
    "sent rows are not awaited": (scatter.Scatter, "finish", nothing),
    "rows of a tile are not awaited": (experts, "wait_rows", nothing),
    "windows are not awaited": (tiles, "wait_rows", nothing),
}


@pytest.mark.parametrize(("where", "name", "fault"), PROTOCOL.values(), ids=PROTOCOL)
def test_careless_transfers_are_seen(where, name, fault, monkeypatch):
    monkeypatch.setattr(where, name, fault)
    assert not (passes(LATE) and passes(EAGER))


good_sort = bulk.sort_rows
good_combine = bulk.combine
good_rows = tiles.Tiles.sorted_rows
good_fetch = tiles.Tiles.fetch_rows


def other_rows(change):
    def sorted_rows(self, visit):
        return change(*good_rows(self, visit))

    return sorted_rows


def places_of_neighbours(*args):
    found = good_sort(*args)
    return found._replace(places=jnp.roll(found.places, 1, axis=1))


def all_known(results, places, known, problem):
    return good_combine(results, places, known | True, problem)


def early(self, visit):
    good_fetch(self, visit)
    good_fetch(self, visit + 1)


IN_BULK = {
    "tiles begin too late": (tiles.Tiles, "sorted_rows", other_rows(lambda a, n: (a + 32, n))),
    "tiles end too early": (tiles.Tiles, "sorted_rows", other_rows(lambda a, n: (a, n - 32))),
    "results of other tokens": (bulk, "sort_rows", places_of_neighbours),
    "what no expert gave is added": (bulk, "combine", all_known),
    "rows are fetched before there is room": (tiles.Tiles, "fetch_rows", early),
    "rows of a tile are not awaited": (experts, "wait_rows", nothing),
    "results on their way are overwritten": (experts.Visits, "wait_leaving", nothing),
    "bounds are not awaited": (kernel, "wait", nothing),
}


@pytest.mark.parametrize(("where", "name", "fault"), IN_BULK.values(), ids=IN_BULK)
def test_faults_in_bulk_are_seen(where, name, fault, monkeypatch):
    monkeypatch.setattr(where, name, fault)
    assert not (passes(LATE, bulk=True) and passes(EAGER, bulk=True))
