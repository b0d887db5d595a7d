"""The real compiler accepts it for every chip with a SparseCore, and the schedule stays as short.

All of it is compiled in processes of their own: a bad SparseCore program can end the process.
"""

import functools
import math

import pytest

import gather_reduce
from gather_reduce.plan import bundles as model_bundles
from gather_reduce.plan import work_of
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


def test_compiles_inside_shard_map_and_vmap(tmp_path):
    found = aot.compile_and_dump(f"{TARGETS}:on_devices", "tpu7x", tmp_path)
    assert len(found["sparse_kernels"]) == 1


def test_packing_is_one_pass(tmp_path):
    found = aot.compile_and_dump(f"{TARGETS}:packing", "tpu7x", tmp_path)
    opcodes = [op["opcode"] for op in found["other_ops"]]
    assert [code for code in opcodes if not code.startswith("copy-")] == ["fusion"] * 3
    assert found["temp_bytes"] < 2**20


@pytest.mark.parametrize(
    ("target", "name", "count"), [("layer", "tpu7x", 1), ("anywhere", "v5e", 0)]
)
def test_sums_are_on_the_sparsecores_that_there_are(target, name, count, tmp_path):
    found = aot.compile_and_dump(f"{TARGETS}:{target}", name, tmp_path)
    kernels = [k for k in found["sparse_kernels"] if k.startswith("gather_reduce")]
    assert len(kernels) == count


@pytest.mark.parametrize("scaled", [False, True])
def test_the_grouped_layer_packs_rows_where_they_are_scaled_anyhow(scaled, tmp_path):
    """One pass from products to packed rows; where there is nothing to scale there is none."""
    found = aot.compile_and_dump(f"{TARGETS}:layer_sums", "tpu7x", tmp_path, scaled=scaled)
    passes = [op["shape"] for op in found["other_ops"] if op["opcode"] in ("fusion", "multiply")]
    wide = [shape for shape in passes if shape.startswith("f32[3072,1024]")]
    packed = [shape for shape in passes if shape.startswith("s32[3072,512]")]
    assert (len(wide), len(packed)) == (0, int(scaled))


def case_of(**changes):
    """A case with the sizes of DeepSeek-V3."""
    (usual,) = (c for c in cases.CASES if c.name == "deepseek-v3/dense")
    return Case("gather_reduce", "test", {**usual.params, **changes})


@functools.cache
def report(name, **changes):
    """Of a case; several tests look at the same program."""
    target, arguments = cases.aot_target(case_of(**changes))
    return aot.static_report(target, name, **arguments)


@pytest.mark.parametrize(
    ("name", "changes", "clean", "masked"),
    [
        ("tpu7x", {}, 32, 38),
        ("tpu7x", {"weighted": False}, 21, 27),
        ("tpu7x", {"top_k": 6}, 24, 29),
        ("tpu7x", {"rows": "float32"}, 16, 22),
        ("tpu7x", {"rows": "bfloat16"}, 21, 28),
        ("tpu7x", {"rows": "packed float8_e4m3fn", "scaled": True}, 43, 49),
        ("v6e", {}, 32, 38),
        ("v6e", {"rows": "bfloat16"}, 21, 28),
        ("v5p", {}, 32, 38),
    ],
    ids=lambda v: str(v),
)
def test_bundles_of_a_vector_of_columns_and_what_the_cost_model_makes_of_it(
    name, changes, clean, masked
):
    """For 16 rows; packed bfloat16 has two columns per word."""
    case, compiled = case_of(**changes), report(name, **changes)
    found = cases.column_loops(compiled)
    assert 10 < found.clean <= clean and found.clean < found.masked <= masked
    assert found.few is None
    modelled = model_bundles(cases.problem_in(case), cases.explain(case, name).plan, chip(name))
    assert modelled == pytest.approx(cases.bundles(case, compiled), rel=0.12)


@pytest.mark.parametrize("name", ["v6e", "tpu7x"])
def test_tokens_with_few_valid_rows_take_few_bundles(name):
    found = cases.column_loops(report(name, devices_sharing=16))
    assert found.few is not None and 4 < found.few <= 10
    assert found.clean <= 32 and found.masked <= 40


@pytest.mark.parametrize(
    ("changes", "most"),
    [({}, 240_000), ({"weighted": False}, 160_000), ({"devices_sharing": 16}, 110_000)],
    ids=str,
)
def test_bundles_of_a_whole_problem(changes, most):
    found = cases.bundles(case_of(**changes), report("tpu7x", **changes))
    assert most / 2 < found <= most


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 1),
        ({"devices_sharing": 16}, 1),
        ({"rows": "bfloat16"}, 2),  # a row comes with its neighbour, whose words it shares
        ({"rows": "packed float8_e4m3fn", "scaled": True}, 1),
    ],
    ids=str,
)
def test_streams_of_a_step_bring_each_row_and_write_each_sum_once(changes, share):
    case, compiled = case_of(**changes), report("tpu7x", **changes)
    problem, plan = cases.problem_in(case), cases.explain(case, "tpu7x").plan
    chunks = work_of(problem, plan, chip("tpu7x").sparse).chunks
    streams = cases.subcores(compiled).streams
    rows = [x for x in streams if x.kind == "indirect_vreg"]
    assert {x.direction for x in rows} == {"gather"}
    itemsize = cases.shape_of(case).dtype.itemsize
    # Of 16 rows, each of which is a lane's.
    assert chunks * sum(x.row_size for x in rows) == share * 7168 * itemsize
    sums = [x.size for x in streams if x.direction == "scatter"]
    assert chunks * sum(sums) == problem.group * 7168 * 2


def test_nothing_of_the_size_of_rows_is_moved_beside_the_kernel():
    narrow = {"rows": "packed float8_e4m3fn", "scaled": True}
    for changes in ({}, {"devices_sharing": 16}, {"rows": "bfloat16"}, narrow):
        found = report("tpu7x", **changes)
        assert found.temp_bytes < 4 * 2**20
        shapes = [op.shape for op in found.other_ops]
        assert not [s for s in shapes if any(n in s for n in ("7168", "3584", "1792"))], shapes
        assert not [op for op in found.other_ops if op.opcode == "sort"]


def test_few_rows_on_the_tensorcore_are_unpacked_alone(tmp_path):
    found = aot.compile_and_dump(f"{TARGETS}:few_on_xla", "tpu7x", tmp_path)
    assert not found["sparse_kernels"] and found["temp_bytes"] < 2**20


@pytest.mark.parametrize("tokens", [64, 100])
def test_small_batches_are_spread_over_all_subcores(tokens):
    case = case_of(tokens=tokens)
    problem, plan = cases.problem_in(case), cases.explain(case, "tpu7x").plan
    work = work_of(problem, plan, chip("tpu7x").sparse)
    assert math.ceil(problem.num_groups / work.steps) * plan.parts >= 16
