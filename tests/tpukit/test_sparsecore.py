"""The SparseCore simulator: right kernels give right results, seeded faults are all caught."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tpukit import sparse_kernels
from tpukit import sparsecore
from tpukit.errors import UnsupportedError
from tpukit.sparsecore import memory

pytestmark = pytest.mark.needs("SparseCore simulator")

TIMINGS = ("eager", "lazy", "random")


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("name", sparse_kernels.GOOD)
def test_right_kernels_give_right_results(name, timing):
    run, expected = sparse_kernels.GOOD[name]
    for seed in range(3):
        x, ids = sparse_kernels.arrays()
        found = sparsecore.simulate(run, x, ids, timing=timing, seed=seed)
        np.testing.assert_array_equal(found.out, expected(x, ids))


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("name", sparse_kernels.FAULTS)
def test_faults_are_caught(name, timing):
    run, expected = sparse_kernels.FAULTS[name]
    with pytest.raises(expected) as caught:
        sparsecore.simulate(run, *sparse_kernels.arrays(), timing=timing)
    assert type(caught.value) is expected


def test_a_fault_says_who_and_where():
    run, _ = sparse_kernels.FAULTS["read before wait"]
    with pytest.raises(sparsecore.faults.InFlightError) as caught:
        sparsecore.simulate(run, *sparse_kernels.arrays())
    text = str(caught.value)
    assert "subcore" in text and "sparse_kernels.py" in text and "scratch 0" in text


def test_counts_are_what_was_moved():
    run, _ = sparse_kernels.GOOD["gather"]
    (kernel,) = sparsecore.simulate(run, *sparse_kernels.arrays()).kernels
    assert kernel.name == "small" and len(kernel.cores) == 2
    rows = sparse_kernels.ROWS * sparse_kernels.WIDTH * 4
    assert kernel.total("hbm_read") == 2 * (rows + sparse_kernels.ROWS * 4)
    assert kernel.total("hbm_written") == 2 * rows
    assert kernel.total("transfers") == 6
    assert kernel.vmem_bytes == rows + sparse_kernels.ROWS * 4


def test_counts_are_of_each_subcore():
    run, _ = sparse_kernels.GOOD["gather"]
    (kernel,) = sparsecore.simulate(run, *sparse_kernels.arrays()).kernels
    rows, ids = sparse_kernels.ROWS * sparse_kernels.WIDTH * 4, sparse_kernels.ROWS * 4
    for counts in kernel.cores.values():
        assert (counts.transfers, counts.hbm_read, counts.hbm_written) == (3, rows + ids, rows)


def test_fresh_memory_is_nan_and_minus_one():
    out = sparsecore.simulate(sparse_kernels.fresh, *sparse_kernels.arrays()).out
    first = slice(None, None, sparse_kernels.ROWS), slice(None, sparse_kernels.LANES)
    assert (out[first] == -1).all()
    out[first] = np.nan
    assert np.isnan(out).all()


def test_parallel_iterations_are_shuffled(monkeypatch):
    """The order alone betrays what one iteration takes from another."""
    monkeypatch.setattr(memory.Iterations, "conflict", lambda *_: False)
    run, _ = sparse_kernels.FAULTS["carried dependence"]
    x, ids = sparse_kernels.arrays()
    in_order = x[:1].reshape(-1, sparse_kernels.LANES).copy()
    for c in range(1, len(in_order)):
        in_order[c] = in_order[c] * 2 + in_order[c - 1]
    for seed in range(3):
        out = sparsecore.simulate(run, x, ids, seed=seed).out
        assert not np.array_equal(out[:1], in_order.reshape(1, -1))


def test_ignored_rows_are_not_counted():
    run, _ = sparse_kernels.GOOD["additions"]
    (kernel,) = sparsecore.simulate(run, *sparse_kernels.arrays()).kernels
    rows, ids = sparse_kernels.ROWS * sparse_kernels.WIDTH * 4, sparse_kernels.ROWS * 4
    assert kernel.total("hbm_read") == 2 * (rows + rows // 2 + ids)
    assert kernel.total("shared_written") == 3 * rows


@pytest.mark.parametrize("chip", ["v5p", "v6e", "tpu7x"])
def test_scalar_subcores(chip):
    x, ids = sparse_kernels.arrays()
    expected = ids.copy()
    expected[[0, sparse_kernels.ROWS]] += 1
    found = sparsecore.simulate(sparse_kernels.on_scalar_cores, x, ids, chip=chip)
    np.testing.assert_array_equal(found.out, expected)


@pytest.mark.parametrize("timing", TIMINGS)
def test_scalar_and_vector_subcores_together(timing):
    x, ids = sparse_kernels.arrays()
    found = sparsecore.simulate(sparse_kernels.on_both_kinds_of_cores, x, ids, timing=timing)
    np.testing.assert_array_equal(found.out, x[: 2 * sparse_kernels.ROWS])
    assert len(found.kernels[0].cores) == 3
    silent = functools.partial(sparse_kernels.on_both_kinds_of_cores, signal=False)
    with pytest.raises(sparsecore.faults.DeadlockError, match="waits for scratch 1 to be 1"):
        sparsecore.simulate(silent, x, ids, timing=timing)


def test_the_program_around_kernels_is_evaluated():
    run, _ = sparse_kernels.GOOD["gather"]
    x, ids = sparse_kernels.arrays()

    def around(x, ids):
        return {"twice": run(jnp.sin(x), ids) * 2, "again": run(x, ids[::-1])}

    found = sparsecore.simulate(around, x, ids)
    np.testing.assert_allclose(found.out["twice"], 2 * np.sin(x)[ids], rtol=1e-6)
    np.testing.assert_array_equal(found.out["again"], x[ids[::-1]])
    assert len(found.kernels) == 2


def test_a_chip_without_sparsecore_is_refused():
    run, _ = sparse_kernels.GOOD["gather"]
    with pytest.raises(UnsupportedError, match="v5e: it has none"):
        sparsecore.simulate(run, *sparse_kernels.arrays(), chip="v5e")


def test_loads_from_hbm_are_refused():
    with pytest.raises(sparsecore.faults.SimulationError, match="cannot reach input 0"):
        sparsecore.simulate(sparse_kernels.loads_from_hbm, *sparse_kernels.arrays())


def test_what_is_not_modelled_is_an_error():
    def body(me, x, ids, out, rows, mine, sem):
        rows[0, :] = jnp.sin(rows[0, :])

    run = sparse_kernels.kernel(body, *sparse_kernels.BUFFERS)
    with pytest.raises(sparsecore.faults.UnmodelledError, match="'sin'"):
        sparsecore.simulate(run, *sparse_kernels.arrays())
