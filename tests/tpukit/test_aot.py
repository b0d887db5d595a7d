"""Compiling ahead of time: what passes, what is refused in which words, what the report holds."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.tpukit import aot_targets
from tpukit import aot, errors
from tpukit.chips import CHIPS, chip, current_chip

TARGETS = "tests.tpukit.aot_targets"
MIB = 1024 * 1024


def compile_target(builder, name, *, options=None, **kwargs):
    fn, args = builder(name, **kwargs)
    return aot.compile_for(fn, *args, chip=name, **(options or {}))


@pytest.mark.parametrize("name", CHIPS)
def test_good_kernel_compiles(name):
    compiled = compile_target(aot_targets.nested, name)
    assert compiled.kernels == ("nested.1",)
    assert compiled.code_bytes > 10_000
    assert compiled.argument_bytes >= (1 << 27) + (1 << 25)
    assert compiled.output_bytes == 128 * 128 * 4
    assert compiled.lower_seconds > 0
    assert compiled.compile_seconds > 0


def test_chip_is_known_while_tracing():
    seen = []

    def fn(x):
        seen.append(current_chip())
        return x + 1

    for name in CHIPS:
        aot.compile_for(lambda x: fn(x), aot_targets.TILE, chip=name)
    assert seen == list(CHIPS.values())


def test_copies_around_a_kernel_show():
    clean = compile_target(aot_targets.nested, "v6e")
    copied = compile_target(aot_targets.nested, "v6e", transposed=True)
    names = [op.opcode for op in clean.other_ops if op.shape.count("65536")]
    assert names == []
    moved = [op.opcode for op in copied.other_ops if op.shape.count("65536")]
    assert moved in (["copy"], ["transpose"])


def test_operations_inside_fusions_do_not_show():
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    compiled = aot.compile_for(lambda x: jnp.exp(x) * 2 + 1, x, chip="v5e")
    assert [op.opcode for op in compiled.other_ops] == ["fusion"]


@pytest.mark.parametrize(
    ("kib", "limit_kib", "asked", "limit"),
    [
        (256 * 1024, None, 256 * MIB, 128 * MIB),  # more than there is
        (40 * 1024, None, 40 * MIB, 32 * MIB),  # more than the default limit
        (40 * 1024, 36 * 1024, 40 * MIB, 36 * MIB),  # more than an explicit limit
    ],
)
def test_too_much_vmem(kib, limit_kib, asked, limit):
    offered = []

    def fits(there_is):
        offered.append(there_is)
        return "half the plan"

    with pytest.raises(errors.KernelResourceError) as caught:
        compile_target(
            aot_targets.scratch,
            "v6e",
            kib=kib,
            limit_kib=limit_kib,
            options={"plan": "the plan", "fits": fits},
        )
    error = caught.value
    assert (error.kernel, error.chip, error.space) == ("scratch", "v6e", "vmem")
    assert asked <= error.asked < asked + MIB
    assert error.limit == limit
    assert offered == [limit]
    assert error.plan == "the plan"
    assert error.fits == "half the plan"
    assert "the plan" in str(error)
    assert "half the plan" in str(error)
    assert error.__cause__ is not None


@pytest.mark.parametrize("name", CHIPS)
def test_default_vmem_limit_is_the_tables(name):
    limit = chip(name).scoped_vmem_bytes
    with pytest.raises(errors.KernelResourceError) as caught:
        compile_target(aot_targets.scratch, name, kib=limit // 1024 + 2048)
    assert caught.value.limit == limit


def test_vmem_below_an_explicit_limit_fits():
    compiled = compile_target(aot_targets.scratch, "v6e", kib=40 * 1024, limit_kib=48 * 1024)
    assert compiled.kernels == ("scratch.1",)


@pytest.mark.parametrize(
    ("builder", "kwargs", "space", "asked"),
    [
        (aot_targets.windows, {"rows": 65536}, "vmem", 128 * MIB),
        (aot_targets.smem, {}, "smem", 8 * MIB),
        (aot_targets.huge, {}, "hbm", None),
    ],
)
@pytest.mark.parametrize("name", ["v5e", "tpu7x"])
def test_too_much_of_other_memories(builder, kwargs, space, asked, name):
    offered = []
    options = {"describe": "whole", "fits": offered.append}
    with pytest.raises(errors.KernelResourceError) as caught:
        compile_target(builder, name, options=options, **kwargs)
    error = caught.value
    assert offered == ([error.limit] if space == "vmem" else [])
    assert error.space == space
    assert error.kernel == {"vmem": "windows", "smem": "smem", "hbm": "whole"}[space]
    assert error.asked == asked if asked else error.asked > chip(name).hbm_bytes
    assert error.asked > error.limit


@pytest.mark.parametrize(
    ("builder", "kernel", "operation", "reason"),
    [
        (aot_targets.unaligned, "unaligned", "tpu.vector_load", "multiple of 128"),
        (aot_targets.sort, "described", "sort", "Unimplemented primitive"),
        (aot_targets.mismatched, "described", "tpu.enqueue_dma", "shape mismatch"),
        (aot_targets.narrow, "described", "", "divisible by 8 and 128"),
    ],
)
def test_refused_kernels(builder, kernel, operation, reason):
    with pytest.raises(errors.KernelCompileError) as caught:
        compile_target(builder, "v5e", options={"describe": "described"})
    assert caught.value.kernel == kernel
    assert operation in caught.value.operation
    assert bool(operation) == bool(caught.value.operation)
    assert reason in caught.value.reason
    assert "Please" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_errors_that_are_not_the_compilers_pass():
    with pytest.raises(errors.ArgumentError, match="refuses: x is"):
        compile_target(aot_targets.refuses, "v5e")
    with pytest.raises(TypeError):
        aot.compile_for(lambda x: jnp.dot(x, "no"), aot_targets.TILE, chip="v5e")


def test_mesh():
    def fn(x):
        return jax.shard_map(lambda x: lax.psum(x, "x"), in_specs=P("x"), out_specs=P())(x)

    compiled = aot.compile_for(
        fn,
        jax.ShapeDtypeStruct((32, 128), jnp.float32),
        chip="v5e",
        mesh_axes={"x": 4},
        in_specs=[P("x")],
    )
    assert "all-reduce" in compiled.hlo
    assert compiled.argument_bytes == 8 * 128 * 4


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"chip": "v4"}, "name"),
        ({"chip": "v5e", "topology": "v5e:7"}, "topology"),
        ({"chip": "v5e", "topology": "v6e:2x2"}, "topology"),
        ({"chip": "v5e", "mesh_axes": {"x": 5}}, "mesh_axes"),
        ({"chip": "v5e", "in_specs": [P()]}, "in_specs"),
        ({"chip": "v5e", "mesh_axes": {"x": 2}, "in_specs": []}, "in_specs"),
    ],
)
def test_impossible_requests(options, argument):
    with pytest.raises(errors.ArgumentError) as caught:
        aot.compile_for(lambda x: x + 1, aot_targets.TILE, **options)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ABORTED: Internal error when accessing libtpu multi-process lockfile", "another process"),
        ("cannot open libtpu.so", "pip install"),
    ],
)
def test_broken_toolchain_is_not_an_illegal_kernel(monkeypatch, text, words):
    def fail(*args, **kwargs):
        raise RuntimeError(text)

    monkeypatch.setattr(aot.topologies, "get_topology_desc", fail)
    with pytest.raises(errors.ToolchainError, match=words):
        aot.compile_for(lambda x: x, aot_targets.TILE, chip="v5e", topology="v5e:8x16")


@pytest.fixture(scope="module")
def reports():
    return aot.static_reports(f"{TARGETS}:nested", ["v6e", "tpu7x"])


@pytest.mark.parametrize("name", ["v6e", "tpu7x"])
def test_report_shows_the_loops_as_written(reports, name):
    report = reports[name]
    kernel = report.kernel("nested")
    assert [(loop.path, loop.depth) for loop in kernel.loops] == [
        ("0", 1),
        ("0/0", 2),
        ("0/0/0", 3),
    ]
    grid, outer, inner = kernel.loops
    assert inner.ops.matmuls == 4
    assert inner.ops.eup == 16  # one exponential for each register of 128 x 128
    assert (outer.ops.dma_starts, outer.ops.dma_waits, outer.ops.matmuls) == (1, 1, 0)
    conditional = [region for region in inner.regions if region.guards]
    assert sum(region.ops.matmuls for region in conditional) == 4
    assert 0 < inner.always_bundles < inner.bundles
    assert outer.nested_bundles == inner.bundles
    assert grid.nested_bundles == outer.bundles + inner.bundles


def test_report_figures(reports):
    report = reports["v6e"]
    kernel = report.kernel("nested")
    windows = [b for b in kernel.buffers if "window allocation for operator" in b.what]
    assert [b.size for b in windows if b.space == "vmem"] == [2 * 65536, 65536]
    assert kernel.vmem_bytes >= 5 * 65536
    assert kernel.smem_bytes == 512
    assert report.compile_seconds > 0
    assert set(report.versions) == {"jax", "libtpu"}
    assert json.loads(report.to_json())["kernels"][0]["loops"][2]["path"] == "0/0/0"
    with pytest.raises(KeyError, match=r"nested\.1"):
        report.kernel("nest")


def test_report_of_several_devices():
    report = aot.static_report(f"{TARGETS}:ring", "v5e")
    assert report.kernel("ring").ops.dma_starts == 1
    assert [op.opcode for op in report.other_ops] == ["copy"]  # the transpose
    assert report.argument_bytes == (1 << 18) * 1024  # a quarter of the array


def test_sparse_kernels_are_named():
    report = aot.static_report(f"{TARGETS}:sparse", "v6e")
    assert report.kernels == ()
    assert [kernel.name for kernel in report.sparse_kernels] == ["sparse"]
    assert report.other_ops == ()


@pytest.mark.parametrize(
    ("target", "kwargs", "error", "words"),
    [
        ("no_colon", {}, errors.ArgumentError, "package.module:function"),
        (f"{TARGETS}:absent", {}, errors.ArgumentError, "can be imported"),
        (f"{TARGETS}:nested", {"transposed": {1}}, errors.ArgumentError, "JSON"),
        (f"{TARGETS}:breaks", {}, RuntimeError, "broken builder"),
        (f"{TARGETS}:scratch", {"kib": 40 * 1024}, errors.KernelResourceError, "needs 40"),
    ],
)
def test_report_errors_cross_the_process(target, kwargs, error, words):
    with pytest.raises(error, match=words):
        aot.static_report(target, "v6e", **kwargs)


def test_report_that_takes_too_long():
    with pytest.raises(errors.ToolchainError, match=r"more than 0\.01 s"):
        aot.static_report(f"{TARGETS}:nested", "v6e", timeout=0.01)
