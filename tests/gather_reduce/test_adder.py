"""The plan whose streams add rows up on their way: bit for bit the sum in the order of k."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from gather_reduce import Plan, adder
from gather_reduce import plan as plan_module
from tests.gather_reduce import oracle
from tests.gather_reduce.oracle import Shape, draw
from tpukit import aot
from tpukit.errors import ArgumentError
from tpukit.sparsecore.faults import SimulationError

pytestmark = pytest.mark.needs("SparseCore simulator")

SHAPE = Shape(tokens=300, top_k=5, format="float32", weighted=False, out="float32")
PLAN = Plan("adder", 2, 128)


def check(shape, data, **options):
    out, (kernel,) = oracle.simulate(shape, data, **{"plan": PLAN} | options)
    terms, counted = oracle.terms(data)
    expected = functools.reduce(np.add, np.moveaxis(terms, 1, 0), np.zeros_like(out))
    np.testing.assert_array_equal(out, expected)
    return kernel, counted


@pytest.mark.parametrize("timing", ["eager", "lazy", "random"])
def test_the_order_is_that_of_k(timing, monkeypatch):
    monkeypatch.setattr(plan_module, "WINDOW_ENTRIES", 80)  # several windows
    kernel, counted = check(SHAPE, draw(SHAPE, holes=0.1, invalid=0.2), timing=timing)
    entries = 2 * 4 * 5 * 304  # of two subcores per team; whole steps
    assert kernel.total("hbm_read") <= counted.sum() * 1024 + entries
    assert kernel.total("hbm_written") == 304 * 1024


@pytest.mark.parametrize("chip", ["v5p", "v6e"])
@pytest.mark.parametrize("tokens", [1, 17])
def test_chips_and_few_tokens(tokens, chip):
    shape = dataclasses.replace(SHAPE, tokens=tokens, chip=chip)
    check(shape, draw(shape, holes=0.1))


def test_errors_are_those_of_rounding():
    shape = dataclasses.replace(SHAPE, tokens=20, top_k=12)
    data = draw(shape)
    right, size = oracle.float64(data)
    out, _ = oracle.simulate(shape, data, plan=PLAN)
    assert (np.abs(out - right) <= 11 * 2.0**-24 * size).all()


@pytest.mark.parametrize(
    "changes", [{"weighted": True}, {"out": "bfloat16"}, {"format": "bfloat16"}], ids=str
)
def test_it_is_for_float32_only(changes):
    shape = dataclasses.replace(SHAPE, tokens=2, **changes)
    with pytest.raises(ArgumentError, match=r"plan\.engine is adder; needs 'sparsecore'"):
        oracle.simulate(shape, draw(shape), plan=PLAN)


MUTANTS = {
    "not cleared": ("clear", lambda self, first, step: None),
    "cleared too early": ("wait_sums", lambda self, first, step: None),
    "another token's row": (
        "add_copy",
        lambda self, step, k: good_copy(self, step, jnp.maximum(k - 1, 0)),
    ),
}
good_copy = adder.AdderWalk.add_copy


@pytest.mark.parametrize("name", MUTANTS)
def test_faults_are_caught(name, monkeypatch):
    attribute, fault = MUTANTS[name]
    monkeypatch.setattr(adder.AdderWalk, attribute, fault)
    with pytest.raises((AssertionError, SimulationError)):
        check(SHAPE, draw(SHAPE))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("chip", ["v5p", "v6e", "tpu7x"])
def test_it_compiles_and_takes_few_bundles(chip):
    options = {"rows": "float32", "out": "float32", "weighted": False, "plan": ("adder", 1, 1792)}
    found = aot.static_report("tests.gather_reduce.targets:one", chip, **options)
    (kernel,) = found.sparse_kernels
    (code,) = (section for section in kernel.sections if section.name == "subcores")
    adding = [loop for loop in code.loops if loop.streams and "add" in loop.streams[0].direction]
    assert len(adding) == 1 and adding[0].bundles <= 110  # 28 streams of two steps
    clearing = [loop.bundles for loop in code.loops if not loop.streams]
    assert max(clearing) <= 16
