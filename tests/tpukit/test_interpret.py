"""The strict harness catches every seeded fault, says what it was, and lets right kernels pass."""

import time

import jax
import numpy as np
import pytest

from tests.tpukit import faulty_kernels
from tpukit import _private, interpret

pytestmark = pytest.mark.timeout(60)

CAUGHT = [(name, mode) for name, (_, modes, _) in faulty_kernels.FAULTS.items() for mode in modes]


def test_nothing_private_has_moved():
    assert _private.self_test() == []


@pytest.mark.needs("SparseCore simulator")
def test_nothing_private_of_traced_kernels_has_moved():
    assert _private.self_test(traced=True) == []


def test_self_test_names_what_moved(monkeypatch):
    monkeypatch.delattr(_private.interpreter, "DMA")
    assert any("DMA is gone" in line for line in _private.self_test())
    with pytest.raises(RuntimeError, match="DMA is gone"), interpret.strict():
        pass


@pytest.mark.parametrize("mode", interpret.MODES, ids=lambda mode: mode.dma)
@pytest.mark.parametrize("name", faulty_kernels.GOOD)
def test_right_kernels_pass(name, mode, strict_interpret):
    run = faulty_kernels.GOOD[name]()
    with strict_interpret(mode) as findings:
        out = np.asarray(run())
    assert not findings.problems
    assert np.isfinite(out).all()
    if name == "ring of 4":
        np.testing.assert_array_equal(out, faulty_kernels.expected_ring(4))


@pytest.mark.needs("interpreted faults")
@pytest.mark.parametrize("case", CAUGHT, ids=lambda case: f"{case[0]}-{case[1].dma}")
def test_faults_are_caught(case, strict_interpret):
    name, mode = case
    build, _, expected = faulty_kernels.FAULTS[name]
    run = build()
    with pytest.raises(expected), strict_interpret(mode):
        jax.block_until_ready(run())
    with strict_interpret():  # one failure does not disturb the next kernel
        jax.block_until_ready(faulty_kernels.good_local()())


@pytest.mark.needs("interpreted faults")
@pytest.mark.parametrize("name", ["waits twice", "wait for each other", "one device waits"])
def test_a_deadlock_is_reported_in_under_a_second(name, strict_interpret):
    run = faulty_kernels.FAULTS[name][0]()
    for _ in range(2):  # the second time without compiling
        begin = time.monotonic()
        with pytest.raises(interpret.Deadlock) as caught, strict_interpret():
            jax.block_until_ready(run())
        elapsed = time.monotonic() - begin
    text = str(caught.value)
    assert "semaphore" in text and "needs" in text
    if name == "waits twice":  # the interpreter knows the line of a DMA's wait only
        assert "faulty_kernels.py" in text
    assert elapsed < 1.0 + 0.5 * ("each" in name or "one" in name)  # collectives retrace in 0.5 s


@pytest.mark.needs("interpreted faults")
def test_reports_name_the_source_line(strict_interpret):
    with (
        pytest.raises(interpret.UnawaitedDma, match=r"faulty_kernels\.py"),
        strict_interpret(faulty_kernels.LATE),
    ):
        jax.block_until_ready(faulty_kernels.forgotten_dma()())


def test_other_exceptions_pass_unchanged(strict_interpret):
    with pytest.raises(KeyError, match="mine"), strict_interpret():
        raise KeyError("mine")


def test_contexts_do_not_nest():
    with interpret.strict(), pytest.raises(RuntimeError, match="nest"), interpret.strict():
        pass


def test_uninitialised_names_the_element():
    array = np.zeros((2, 3), np.float32)
    interpret.assert_initialised("x", array)
    array[1, 2] = np.nan
    with pytest.raises(interpret.Uninitialised, match=r"x is NaN at \(1, 2\), 1 element"):
        interpret.assert_initialised("x", array)
