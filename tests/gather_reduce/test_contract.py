"""What the public functions accept, refuse and explain."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gather_reduce
from gather_reduce import PackedRows, Plan, api, plan
from reference import gather_reduce as reference
from tests.gather_reduce import oracle
from tests.gather_reduce.oracle import Shape, draw
from tpukit import versions
from tpukit.chips import chip
from tpukit.errors import ArgumentError, UnsupportedError

Spec = jax.ShapeDtypeStruct


def call(**changes):
    """A call that is right but for the changes."""
    given = {
        "x": jnp.ones((8, 128), jnp.bfloat16),
        "indices": jnp.zeros((4, 2), jnp.int32),
        "weights": jnp.ones((4, 2)),
    } | changes
    return gather_reduce.dense_gather_reduce(**given)


def ragged(**changes):
    given = {"x": jnp.ones((8, 128)), "indices": jnp.zeros((4, 2), jnp.int32), "weights": None}
    return gather_reduce.ragged_gather_reduce(**given | {"valid": jnp.ones((4, 2), bool)} | changes)


@pytest.mark.parametrize(
    ("function", "changes", "words"),
    [
        (call, {"x": jnp.ones((8, 128), jnp.float16)}, "x has dtype float16; needs float32 or"),
        (
            call,
            {"x": jnp.ones((8, 128), jnp.float8_e4m3fn)},
            "x has dtype float8_e4m3fn; needs float32, bfloat16 or PackedRows. Pack it with "
            "gather_reduce.pack_columns(x).",
        ),
        (call, {"x": jnp.ones(8)}, "x has shape (8,); needs 2 dimensions (rows, hidden_size)"),
        (call, {"indices": jnp.zeros((4, 2))}, "indices has dtype float32; needs int32"),
        (call, {"indices": jnp.zeros((4, 0), jnp.int32)}, "top_k is 0; needs at least 1"),
        (call, {"weights": jnp.ones((4, 3))}, "weights has shape (4, 3); needs 2 in dimension 1"),
        (call, {"weights": jnp.ones((4, 2), jnp.int32)}, "weights has dtype int32; needs"),
        (call, {"row_scales": jnp.ones(7)}, "row_scales has shape (7,); needs 8"),
        (call, {"row_scales": jnp.ones(8, jnp.bfloat16)}, "row_scales has dtype bfloat16"),
        (call, {"out_dtype": jnp.float16}, "out_dtype is 'float16'; needs 'float32' or 'bfloat16'"),
        (call, {"implementation": "fast"}, "implementation is 'fast'; needs 'auto', "),
        (
            call,
            {"x": PackedRows(jnp.ones((8, 100), jnp.int32), 200, "bfloat16")},
            "words of x is 100; needs a multiple of 128. Make it with pack_columns.",
        ),
        (call, {"x": PackedRows(jnp.ones((8, 128)), 200, "bfloat16")}, "x.words has dtype float32"),
        (
            call,
            {"x": PackedRows(jnp.ones((8, 128), jnp.int32), 257, "bfloat16")},
            "x.hidden_size is 257; needs 0 to 256",
        ),
        (
            call,
            {"x": PackedRows(jnp.ones((8, 128), jnp.int32), 9, "float8_e5m2")},
            "x.dtype is 'float8_e5m2'; needs 'bfloat16' or 'float8_e4m3fn'",
        ),
        (ragged, {"valid": jnp.ones((4, 1), bool)}, "valid has shape (4, 1); needs 2"),
        (ragged, {"valid": jnp.ones((4, 2))}, "valid has dtype float32; needs bool"),
    ],
)
def test_wrong_arguments(function, changes, words):
    with pytest.raises(ArgumentError) as caught:
        function(**changes)
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_result_has_the_type_of_rows_unless_told(dtype):
    x = jnp.ones((8, 128), dtype)
    assert call(x=x).dtype == ragged(x=x).dtype == dtype
    assert call(x=gather_reduce.pack_columns(x.astype(jnp.bfloat16))).dtype == jnp.bfloat16
    for out in (jnp.float32, jnp.bfloat16):
        assert call(x=x, out_dtype=out).dtype == ragged(x=x, out_dtype=out).dtype == out


def test_values_are_checked_on_request():
    bad = jnp.array([[0, 1], [-1, 0], [8, 0], [9, 0]], jnp.int32)
    call(indices=bad)
    with pytest.raises(ArgumentError, match=r"indices has 8 at index \[2, 0\]; needs -1 to 7"):
        call(indices=bad, validate=True)
    with pytest.raises(ArgumentError, match=r"weights has nan at index \[0, 0\]; needs finite"):
        call(weights=jnp.full((4, 2), jnp.nan), validate=True)
    call(validate=True)


def test_without_a_tpu_auto_is_the_reference():
    shape = Shape(tokens=6, top_k=3)
    data = draw(shape, holes=0.2)
    out = gather_reduce.dense_gather_reduce(
        oracle.operand(shape, data.x), data.indices, data.weights
    )
    np.testing.assert_array_equal(np.asarray(out), oracle.exact(data, "bfloat16"))


@pytest.mark.parametrize(("fences", "runs"), [(True, "pallas"), (False, "reference")])
def test_without_fences_auto_is_the_reference(fences, runs, monkeypatch):
    """On an older JAX on a TPU; who asks for the SparseCore gets it."""
    monkeypatch.setattr(api, "current_chip", lambda: chip("tpu7x"))
    monkeypatch.setattr(versions, "has", lambda _: fences)
    x = PackedRows(Spec((16384, 3584), jnp.int32), 7168, "bfloat16")
    options = [None] * 4
    problem = api.problem_of("test", x, Spec((2048, 8), jnp.int32), *options)
    assert api.choose("test", "auto", problem, None)[0] == runs
    assert api.choose("test", "pallas", problem, None)[0] == "pallas"


def test_the_sparsecore_is_refused_where_there_is_none(monkeypatch):
    with pytest.raises(UnsupportedError, match="cannot run on cpu: the kernel runs on the Sparse"):
        call(implementation="pallas")
    x, indices = Spec((64, 128), jnp.bfloat16), Spec((8, 2), jnp.int32)
    with pytest.raises(UnsupportedError, match="cannot run on v5e: it has no SparseCore"):
        gather_reduce.explain(x, indices, chip="v5e", plan=Plan("sparsecore"))
    assert not gather_reduce.supports(x, indices, chip="v5e")
    assert gather_reduce.explain(x, indices, chip="v5e").plan == Plan("xla")
    for name in gather_reduce.SUPPORTED_CHIPS:
        assert gather_reduce.supports(x, indices, chip=name)
        assert chip(name).sparse is not None
    monkeypatch.setattr(api, "current_chip", lambda: chip("v5e"))
    with pytest.raises(UnsupportedError, match="cannot run on v5e: the kernel runs on the Sparse"):
        call(implementation="pallas")
    with pytest.raises(UnsupportedError, match="cannot run on v5e: it has no SparseCore"):
        call(plan=Plan("sparsecore"))
    assert (call() == 2).all()


@pytest.mark.parametrize("rows", ["float32", "bfloat16", "packed bfloat16"])
@pytest.mark.parametrize("name", gather_reduce.SUPPORTED_CHIPS)
def test_the_cost_model_decides(name, rows, monkeypatch):
    """By sizes, whatever they are divisible by."""
    monkeypatch.setattr(api, "current_chip", lambda: chip(name))

    def engine(tokens, top_k):
        shape = Shape(tokens, top_k, 16384, 7168, rows, weighted=False)
        found = plan.plan_for(oracle.problem(shape), chip(name))
        assert found.why.startswith("predicted") and str(found.plan.engine) in str(found)
        chosen = {"xla": "reference", "sparsecore": "pallas"}[found.plan.engine]
        assert api.choose("test", "auto", oracle.problem(shape), None)[0] == chosen
        return found.plan.engine

    assert engine(1, 8) == "xla"
    for tokens, top_k in ((512, 8), (513, 5), (1000, 6), (2047, 10), (2048, 8)):
        assert engine(tokens, top_k) == "sparsecore"


def test_a_large_top_k_is_for_the_tensorcore():
    x, indices = jnp.ones((64, 128)), jnp.zeros((5, 33), jnp.int32)
    assert gather_reduce.explain(x, indices, chip="v6e").why == "top_k is too large"
    assert not gather_reduce.supports(x, indices, chip="v6e")
    assert (gather_reduce.dense_gather_reduce(x, indices) == 33).all()
    with pytest.raises(UnsupportedError, match=r"top_k of 33 cannot run on the SparseCores of tpu"):
        gather_reduce.dense_gather_reduce(x, indices, implementation="interpret")


def test_wrong_plans():
    x, indices = Spec((64, 1024), jnp.float32), Spec((64, 8), jnp.int32)

    def explain(*sizes, chip="tpu7x"):
        return gather_reduce.explain(x, indices, chip=chip, plan=Plan("sparsecore", *sizes))

    assert explain(2, 512).source == "argument"
    with pytest.raises(ArgumentError, match=r"plan\.parts is 3; needs a divisor of 32 and of 8"):
        explain(3, 128)
    with pytest.raises(ArgumentError, match=r"plan\.chunk is 384; needs a multiple of 128 that"):
        explain(1, 384)
    wide = Spec((64, 16384), jnp.float32)
    with pytest.raises(UnsupportedError, match=r"a subcore has 260096\. Use a smaller chunk"):
        big = Plan("sparsecore", 1, 8192)
        gather_reduce.explain(wide, indices, chip="v6e", plan=big)
    assert not gather_reduce.supports(wide, indices, chip="v6e", plan=big)


@pytest.mark.needs("SparseCore simulator")
@pytest.mark.parametrize("shape", [Shape(), Shape(tokens=3, top_k=5, format="bfloat16")])
@pytest.mark.parametrize("name", gather_reduce.SUPPORTED_CHIPS)
def test_the_memory_of_a_plan_is_what_the_kernel_allocates(shape, name):
    shape = dataclasses.replace(shape, chip=name)
    (kernel,) = oracle.simulate(shape, draw(shape))[1]
    x = jax.eval_shape(lambda: oracle.operand(shape, jnp.zeros((96, 256), jnp.bfloat16)))
    size = (shape.tokens, shape.top_k)
    weights = Spec(size, jnp.float32)
    found = plan.plan_for(oracle.problem(shape), chip(name), sparse_only=True)
    assert 0 <= found.vmem_bytes - kernel.vmem_bytes <= 512
    again = gather_reduce.explain(x, Spec(size, jnp.int32), weights, chip=name, plan=found.plan)
    assert again.vmem_bytes == found.vmem_bytes


def test_the_public_names_of_the_specification_are_its_own():
    assert gather_reduce.pack_columns is reference.pack_columns
    assert gather_reduce.PackedRows is reference.PackedRows
