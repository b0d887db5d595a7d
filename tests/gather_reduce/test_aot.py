"""The real compiler accepts it for every chip with a SparseCore, and the schedule stays as short.

All of it is compiled in processes of their own: a bad SparseCore program can end the process.
"""

import functools
import math

import pytest

import gather_reduce
from gather_reduce.api import problem_of
from gather_reduce.plan import bundles as model_bundles
from gather_reduce.plan import plan_for, work_of
from microbench.case import Case
from microbench.cases import gather_reduce as cases
from tests.gather_reduce import targets
from tests.gather_reduce.oracle import FORMATS
from tpukit import aot
from tpukit.chips import chip

pytestmark = pytest.mark.timeout(240)
TARGETS = "tests.gather_reduce.targets"


@pytest.mark.parametrize("name", gather_reduce.SUPPORTED_CHIPS)
def test_everything_compiles(name, tmp_path):
    found = aot.compile_and_dump(f"{TARGETS}:matrix", name, tmp_path)
    assert len(found["sparse_kernels"]) == len(targets.SHAPES) * len(FORMATS)
    assert not found["kernels"]


@pytest.mark.parametrize("target", ["on_devices", "many"])
def test_compiles_inside_shard_map_and_vmap(target, tmp_path):
    found = aot.compile_and_dump(f"{TARGETS}:{target}", "tpu7x", tmp_path)
    assert len(found["sparse_kernels"]) == 1


@pytest.mark.parametrize(("name", "count"), [("tpu7x", 1), ("v6e", 1), ("v5e", 0)])
def test_the_grouped_layer_sums_on_the_sparsecores_that_there_are(name, count, tmp_path):
    found = aot.compile_and_dump(f"{TARGETS}:layer", name, tmp_path)
    kernels = [k for k in found["sparse_kernels"] if k.startswith("gather_reduce")]
    assert len(kernels) == count


@functools.cache
def report(name, **options):
    return aot.static_report(f"{TARGETS}:one", name, **options)


@pytest.mark.parametrize(
    ("name", "options", "clean", "masked"),
    [
        ("tpu7x", {}, 32, 38),
        ("tpu7x", {"weighted": False}, 21, 27),
        ("tpu7x", {"top_k": 6}, 24, 29),
        ("tpu7x", {"rows": "float32", "out": "float32"}, 16, 22),
        ("tpu7x", {"rows": "bfloat16"}, 21, 28),
        ("tpu7x", {"rows": "packed float8_e4m3fn"}, 43, 49),
        ("v6e", {}, 32, 38),
        ("v5p", {}, 32, 38),
    ],
    ids=lambda v: str(v),
)
def test_bundles_of_a_vector_of_columns_and_what_the_cost_model_makes_of_it(
    name, options, clean, masked
):
    """For 16 rows; packed bfloat16 has two columns per word."""
    found = cases.column_loops(report(name, **options))
    assert 10 < found.clean <= clean and found.clean < found.masked <= masked
    assert found.few is None

    sizes = {"tokens": 2048, "top_k": 8, "rows": "packed bfloat16", **usual(options)}
    x, indices, *rest = cases.Shape(**sizes).specs()
    problem = problem_of("test", x, indices, rest[0] if rest else None, None, None, None)
    plan = plan_for(problem, chip(name), sparse_only=True).plan
    counted = cases.bundles(Case("gather_reduce", "test", sizes), report(name, **options))
    assert model_bundles(problem, plan, chip(name)) == pytest.approx(counted, rel=0.12)


def usual(options):
    """The parameters of a case for the options of a target."""
    kept = {key: value for key, value in options.items() if key != "out"}
    return {"hidden_size": 7168, "weighted": True, "devices_sharing": 1} | kept


@pytest.mark.parametrize("name", gather_reduce.SUPPORTED_CHIPS)
def test_tokens_with_few_valid_rows_take_few_bundles(name):
    found = cases.column_loops(report(name, ragged=True))
    assert found.few is not None and 4 < found.few <= 10
    assert found.clean <= 32 and found.masked <= 40


@pytest.mark.parametrize(
    ("case", "most"),
    [("dense", 240_000), ("pre-weighted", 160_000), ("ragged 16", 110_000)],
)
def test_bundles_of_a_whole_problem(case, most):
    (case,) = (c for c in cases.CASES if c.name == f"deepseek-v3/{case}")
    target, arguments = cases.aot_target(case)
    found = cases.bundles(case, aot.static_report(target, "tpu7x", **arguments))
    assert most / 2 < found <= most


def test_nothing_of_the_size_of_rows_is_moved_beside_the_kernel():
    for options in ({}, {"ragged": True}, {"rows": "bfloat16"}):
        found = report("tpu7x", **options)
        assert found.temp_bytes < 4 * 2**20
        shapes = [op.shape for op in found.other_ops]
        assert not [shape for shape in shapes if "7168" in shape or "3584" in shape], shapes
        assert not [op for op in found.other_ops if op.opcode == "sort"]


@pytest.mark.parametrize("tokens", [64, 100])
def test_small_batches_are_spread_over_all_subcores(tokens):
    problem = problem_of("test", *targets.one("tpu7x", tokens=tokens)[1], None, None, None)
    plan = plan_for(problem, chip("tpu7x"), sparse_only=True).plan
    work = work_of(problem, plan, chip("tpu7x").sparse)
    assert math.ceil(problem.num_groups / work.steps) * plan.parts >= 16
