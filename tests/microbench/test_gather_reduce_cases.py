"""The gather_reduce cases: what they describe, and that their check can fail."""

import json

import jax
import numpy as np
import pytest

from gather_reduce import kernel
from microbench import cli
from microbench.cases import gather_reduce as cases

BY_NAME = {case.name: case for case in cases.CASES}


@pytest.mark.parametrize("name", ["deepseek-v3/small", "deepseek-v2-lite/dense"])
def test_inputs_have_the_shapes_that_are_compiled(name):
    case = cases.timed(BY_NAME[name])
    _, arguments = cases.aot_target(case)
    _, specs = cases.build("tpu7x", **json.loads(json.dumps(arguments)))
    inputs = cases.inputs(case, seed=0)
    leaves = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (inputs, specs)]
    assert leaves[0] == leaves[1]


def test_cost_counts_what_is_valid():
    whole, half = (cases.cost(BY_NAME[f"deepseek-v3/{n}"]) for n in ("dense", "ragged 2"))
    assert whole.hbm_bytes == 2048 * 9 * 7168 * 2 + 2 * 4 * 2048 * 8
    assert whole.hbm_bytes - half.hbm_bytes == 2048 * 4 * 7168 * 2


@pytest.mark.parametrize("name", ["deepseek-v3/dense", "deepseek-v3/ragged 16"])
def test_the_check_passes_and_can_fail(name, monkeypatch):
    case = BY_NAME[name]
    assert [check for check in cases.check(case, seed=1) if not check.ok] == []
    monkeypatch.setattr(kernel, "as_pair", lambda a, b: good(b, a))
    assert [check.name for check in cases.check(case, 1) if not check.ok] == [
        "elements that differ"
    ]
    monkeypatch.setattr(kernel.Walk, "wait_sums", lambda *args: None)
    (failed,) = cases.check(case, 1)
    assert not failed.ok and "Error" in failed.name


good = kernel.as_pair


def test_schedules_are_not_replayed(capsys):
    command = ["predict", "--kernel", "gather_reduce", "--case", "small", "--chip", "tpu7x"]
    assert cli.main(command) == 0
    assert "not replayed" in capsys.readouterr().out


def test_timing_on_a_cpu_is_of_fewer_tokens():
    assert cases.timed(BY_NAME["deepseek-v3/dense"]).params["tokens"] == 256
    run = cases.reference_fn(cases.timed(BY_NAME["deepseek-v2-lite/dense"]))
    small = cases.dataclasses.replace(
        cases.Shape(**BY_NAME["deepseek-v2-lite/dense"].params), tokens=3
    )
    assert np.isfinite(np.asarray(run(*cases._inputs(small, 0)), np.float32)).all()
