"""Figures that the compiler gives away without a chip: what `microbench aot` shows and records."""

from __future__ import annotations

import dataclasses
from typing import Any

from microbench.case import Case, Cost, Suite
from microbench.table import table
from tpukit import aot, chips, listing, sparse_listing

_MIB = 1024 * 1024


def compile_case(suite: Suite, case: Case, chip: str) -> aot.StaticReport:
    """Compiles the full-size case for `chip`, in a process of its own.

    Raises:
      KernelResourceError, KernelCompileError, ToolchainError: from `tpukit.errors`.
    """
    target, arguments = suite.aot_target(case)
    return aot.static_report(target, chip, **arguments)


def floor_us(cost: Cost, chip: chips.Chip) -> float:
    """Microseconds below which no implementation can be, by the peaks in the chip's data sheet."""
    compute = cost.flops / (chip.bf16_tflops * 1e12)
    return max(compute, cost.hbm_bytes / (chip.hbm_gb_per_s * 1e9)) * 1e6


def figures(report: aot.StaticReport) -> dict[str, Any]:
    """One row about a compiled case; its kernels added up."""
    ops = sum((kernel.ops for kernel in report.kernels), listing.Ops())
    return {
        "compiles": True,
        "compile s": report.compile_seconds,
        "VMEM MiB": sum(kernel.vmem_bytes for kernel in report.kernels) / _MIB,
        "SMEM KiB": sum(kernel.smem_bytes for kernel in report.kernels) / 1024,
        "code KiB": report.code_bytes / 1024,
        "scratch KiB": report.temp_bytes / 1024,
        "bundles": sum(kernel.bundles for kernel in report.kernels),
        "spills": ops.spill,
        "fills": ops.fill,
        "other ops": len(report.other_ops),
    }


def longest_pass(loop: listing.Loop) -> int:
    """Bundles of a pass through the longest branch of a loop, without the loops inside it.

    That is the code that always runs, the longest conditional region, what runs whenever that one
    does, and every conditional region that starts or awaits a transfer.
    """
    longest = max(loop.regions, key=lambda region: bool(region.guards) * region.bundles)
    return sum(
        region.bundles
        for region in loop.regions
        if set(region.guards) <= set(longest.guards)
        or region.ops.dma_starts
        or region.ops.dma_waits
    )


def details(report: aot.StaticReport) -> str:
    """Tables of buffers and loops of every kernel, and what XLA runs beside them."""
    parts = []
    for kernel in report.kernels:
        buffers = [dataclasses.asdict(buffer) for buffer in _largest_first(kernel.buffers)]
        loops = [_loop(loop) for loop in kernel.loops]
        parts.append(f"kernel {kernel.name}: buffers, bytes\n{_indent(table(buffers))}")
        parts.append(
            f"kernel {kernel.name}: loops, bundles and operations of one pass "
            "(always: no condition can skip them; own: all branches; nested: the loops inside)\n"
            f"{_indent(table(loops))}"
        )
    for sparse in report.sparse_kernels:
        loops = [
            _sparse_loop(section.name, x) for section in sparse.sections for x in section.loops
        ]
        bundles = ", ".join(f"{x.bundles} bundles of {x.name}" for x in sparse.sections)
        parts.append(f"SparseCore kernel {sparse.name}: {bundles}\n{_indent(table(loops))}")
    if report.other_ops:
        parts.append("beside the kernels\n" + _indent(table([vars(op) for op in report.other_ops])))
    return "\n".join(parts)


def tree(report: aot.StaticReport) -> dict[str, Any]:
    """What `details` shows, for a record."""
    return {
        "kernels": [
            {
                "name": kernel.name,
                "bundles": kernel.bundles,
                "buffers": [dataclasses.asdict(buffer) for buffer in kernel.buffers],
                "loops": [_loop(loop) for loop in kernel.loops],
            }
            for kernel in report.kernels
        ],
        "beside": [dataclasses.asdict(op) for op in report.other_ops],
    }


def _largest_first(buffers: tuple[listing.Buffer, ...]) -> list[listing.Buffer]:
    return sorted(buffers, key=lambda buffer: -buffer.size)


def _loop(loop: listing.Loop) -> dict[str, Any]:
    ops = loop.ops
    return {
        "loop": "  " * (loop.depth - 1) + loop.path,
        "always": loop.always_bundles,
        "own": loop.bundles,
        "nested": loop.nested_bundles,
        "mxu": ops.mxu,
        "valu": ops.valu,
        "xlu": ops.xlu,
        "eup": ops.eup,
        "vload": ops.vload,
        "vstore": ops.vstore,
        "spills": ops.spill,
        "fills": ops.fill,
        "DMA starts": ops.dma_starts,
        "DMA waits": ops.dma_waits,
    }


def _sparse_loop(section: str, loop: sparse_listing.SparseLoop) -> dict[str, Any]:
    sizes = [stream.size for stream in loop.streams]
    return {
        "core": section,
        "loop": f"{'  ' * (loop.depth - 1)}{loop.start:#x}",
        "bundles": loop.bundles,
        "trips": loop.trips,
        "streams": len(sizes),
        "stream bytes": None if None in sizes else sum(size or 0 for size in sizes),
    }


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
