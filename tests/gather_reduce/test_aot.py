"""The real compiler accepts it for every chip with a SparseCore, and the schedule stays as short.

All of it is compiled in processes of their own: a bad SparseCore program can end the process.
"""

import functools
import math

import pytest

import gather_reduce
from gather_reduce.api import problem_of
from gather_reduce.plan import plan_for, work_of
from tests.gather_reduce import targets
from tests.gather_reduce.oracle import FORMATS
from tpukit import aot
from tpukit.chips import chip

pytestmark = pytest.mark.timeout(240)
TARGETS = "tests.gather_reduce.targets"


@pytest.mark.parametrize("rows", FORMATS)
@pytest.mark.parametrize("name", gather_reduce.SUPPORTED_CHIPS)
def test_everything_compiles(name, rows, tmp_path):
    found = aot.compile_and_dump(f"{TARGETS}:matrix", name, tmp_path, rows=rows)
    assert len(found["sparse_kernels"]) == len(targets.SHAPES)
    assert not found["kernels"]


@functools.cache
def report(name, **options):
    return aot.static_report(f"{TARGETS}:one", name, **options)


def subcores(found):
    (kernel,) = found.sparse_kernels
    assert kernel.name == "gather_reduce"
    return next(section for section in kernel.sections if section.name == "subcores")


def inner_loops(found):
    """Bundles of the loops over columns, without and with rows that are selected away."""
    masked, clean = (loop for loop in subcores(found).loops[-2:])
    assert not masked.streams and not clean.streams
    return clean.bundles, masked.bundles


def bundles(name, **options):
    """At most what a subcore issues: everything outside loops counts for every step."""
    found = report(name, **options)
    _, (x, *arrays) = targets.one(name, **options)
    weights = arrays[1] if options.get("weighted", True) else None
    problem = problem_of("test", x, arrays[0], weights, None, None, None)
    sparse = chip(name).sparse
    plan = plan_for(problem, chip(name)).plan
    assert plan.engine == "sparsecore"
    work = work_of(problem, plan, sparse)
    code = subcores(found)
    once = code.bundles - sum(loop.bundles for loop in code.loops if not is_schedule(loop))
    vectors = plan.chunk // sparse.lanes  # the first and last are outside the loop, overlapped
    clean, _ = inner_loops(found)
    return work.steps * work.chunks * (once + (vectors - 1) * clean)


def is_schedule(loop):
    """Loops over steps hold transfers; the others are over columns or over indices."""
    return bool(loop.streams)


@pytest.mark.parametrize(
    ("name", "options", "clean", "masked"),
    [
        ("tpu7x", {}, 32, 38),
        ("tpu7x", {"weighted": False}, 21, 27),
        ("tpu7x", {"top_k": 6}, 24, 29),
        ("tpu7x", {"rows": "float32", "out": "float32"}, 16, 22),
        ("tpu7x", {"rows": "bfloat16"}, 32, 38),
        ("v6e", {}, 32, 38),
        ("v5p", {}, 32, 38),
    ],
    ids=lambda v: str(v),
)
def test_bundles_of_a_vector_of_columns(name, options, clean, masked):
    """For 16 rows; packed bfloat16 has two columns per word."""
    found = inner_loops(report(name, **options))
    assert 10 < found[0] <= clean and found[0] < found[1] <= masked


@pytest.mark.parametrize(("weighted", "most"), [(True, 240_000), (False, 160_000)])
def test_bundles_of_a_whole_problem(weighted, most):
    found = bundles("tpu7x", weighted=weighted)
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
