"""What a prediction says: of one kernel, of the operations around it, of the whole program."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from tpukit import chips
from tpukit.dumps import SLOT_NAMES
from tpukit.listing import Kernel
from tpukit.predict.machine import Machine, Span
from tpukit.predict.rates import Rates

# Operations of each kind that a bundle can hold, from the compiler's own tables.
_CAPACITY = {
    "v5e": {"xlu": 3, "valu": 4, "vpop": 2, "eup": 1, "vload": 3, "vstore": 1, "salu": 2},
    "v6e": {"xlu": 2, "valu": 4, "vpop": 2, "eup": 1, "vload": 3, "vstore": 2, "salu": 2},
}
_CAPACITY["tpu7x"] = _CAPACITY["v6e"]
LATENCY_BAND_US = (0.6, 1.0)


@dataclasses.dataclass(frozen=True)
class Stall:
    """Cycles lost at one place.

    Attributes:
      cause: "dma" (waiting for a transfer) or "mxu" (the matrix units were full).
      address: of the bundle, or of the first one of the segment.
      cycles: lost there, over all passes.
    """

    cause: str
    address: int
    cycles: int


@dataclasses.dataclass(frozen=True)
class HotLoop:
    """Cycles spent in the code of one loop itself, without the loops inside it.

    Attributes:
      path: as in `listing.Loop`; "" is the code outside any loop.
      start, end: addresses.
      issued: cycles of bundles.
      stalled: cycles lost.
    """

    path: str
    start: int
    end: int
    issued: int
    stalled: int


@dataclasses.dataclass(frozen=True)
class KernelPrediction:
    """The predicted run of one Pallas kernel on one TensorCore.

    Attributes:
      name: of the kernel.
      chip: what it was compiled for.
      cycles, milliseconds: predicted.
      bundles: cycles in which something was issued; the rest are stalls.
      moved, transfers: bytes and DMAs by direction ("hbm_to_vmem").
      use: fraction of the capacity used, by unit: "mxu", "valu", "vload", "hbm", ...
      spills, fills: vector registers saved to and reloaded from VMEM.
      stalls: largest first.
      loops: hottest first.
      vmem_bytes, smem_bytes: of its buffers.
      floor_milliseconds: the least time at the vendor's peak rates for the matrix work and the HBM
        bytes of this schedule.
      band: milliseconds if the latency of a transfer were at either end of what is plausible, where
        waiting takes over a fifth of the time; else the prediction twice.
      assumed: number of places where a scalar from the vector units was assumed.
      spans: what happened when, if it was asked for.
    """

    name: str
    chip: str
    cycles: int
    milliseconds: float
    bundles: int
    moved: Mapping[str, int]
    transfers: Mapping[str, int]
    use: Mapping[str, float]
    spills: int
    fills: int
    stalls: tuple[Stall, ...]
    loops: tuple[HotLoop, ...]
    vmem_bytes: int
    smem_bytes: int
    floor_milliseconds: float
    band: tuple[float, float]
    assumed: int
    spans: tuple[Span, ...]

    @property
    def hbm_bytes(self) -> int:
        """Bytes moved to and from HBM."""
        return sum(size for way, size in self.moved.items() if "hbm" in way)

    @property
    def roofline(self) -> float:
        """Fraction of the roofline reached."""
        return self.floor_milliseconds / self.milliseconds if self.milliseconds else 0.0

    @property
    def dma_stall(self) -> float:
        """Fraction of the time spent waiting for transfers."""
        waiting = sum(stall.cycles for stall in self.stalls if stall.cause == "dma")
        return waiting / self.cycles if self.cycles else 0.0

    @property
    def binds(self) -> str:
        """What the time is spent on: "HBM", "MXU", "latency" (of transfers) or "issue"."""
        if self.use["hbm"] >= 0.75:
            return "HBM"
        if self.use["mxu"] >= 0.75:
            return "MXU"
        return "latency" if self.dma_stall >= 0.2 else "issue"


@dataclasses.dataclass(frozen=True)
class GluePrediction:
    """The predicted time of what XLA runs beside the kernels.

    Attributes:
      name, opcode, core: of the operation.
      milliseconds: predicted, over all its runs.
      how: "replayed", "bytes" (at the bandwidth of HBM) or "compiler" (its own estimate).
      source: the operation of the traced program that it belongs to, "" if that is not said.
    """

    name: str
    opcode: str
    core: str
    milliseconds: float
    how: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted run of a program on one TensorCore, one operation after another.

    Attributes:
      chip: what for.
      kernels: its Pallas kernels in program order; one entry a run.
      glue: the other operations.
      versions: of jax and libtpu.
    """

    chip: str
    kernels: tuple[KernelPrediction, ...]
    glue: tuple[GluePrediction, ...]
    versions: Mapping[str, str]

    @property
    def kernel_milliseconds(self) -> float:
        """Predicted time of the kernels alone."""
        return sum(kernel.milliseconds for kernel in self.kernels)

    @property
    def milliseconds(self) -> float:
        """Predicted time of everything."""
        return self.kernel_milliseconds + sum(op.milliseconds for op in self.glue)

    def text(self) -> str:
        """A report to read."""
        lines = [f"predicted for {self.chip}: {self.milliseconds:.4f} ms"]
        for kernel in self.kernels:
            lines += kernel_lines(kernel)
        large = [op for op in self.glue if op.milliseconds > 0.01 * self.milliseconds]
        rest = sum(op.milliseconds for op in self.glue if op not in large)
        lines += [f"  {op.name} ({op.core}, {op.how}): {op.milliseconds:.4f} ms" for op in large]
        lines.append(f"  {len(self.glue) - len(large)} smaller operations: {rest:.4f} ms")
        return "\n".join(lines)


def kernel_lines(kernel: KernelPrediction) -> list[str]:
    """A report on one kernel to read."""
    use = ", ".join(f"{unit} {share:.0%}" for unit, share in kernel.use.items())
    moved = ", ".join(
        f"{way} {size / 1e6:.2f} MB in {kernel.transfers[way]}"
        for way, size in kernel.moved.items()
    )
    low, high = kernel.band
    band = f" ({low:.4f} to {high:.4f} by latency)" if high > low else ""
    lines = [
        f"  {kernel.name}: {kernel.milliseconds:.4f} ms{band}, {kernel.cycles} cycles, "
        f"{kernel.bundles} bundles; floor {kernel.floor_milliseconds:.4f} ms "
        f"({kernel.roofline:.0%}), bound by {kernel.binds}",
        f"    use: {use}",
        f"    moved: {moved}",
        f"    spills {kernel.spills}, fills {kernel.fills}; "
        f"VMEM {kernel.vmem_bytes / 2**20:.1f} MiB, SMEM {kernel.smem_bytes / 1024:.1f} KiB",
    ]
    if kernel.assumed:
        lines.append(f"    assumed: what scalars read from vectors, places: {kernel.assumed}")
    for loop in kernel.loops[:4]:
        where = f"loop {loop.path}" if loop.path else "outside loops"
        lines.append(
            f"    {where} [{loop.start:#x}, {loop.end:#x}): {loop.issued} issued, "
            f"{loop.stalled} stalled"
        )
    lines += [f"    stall {s.cause} at {s.address:#x}: {s.cycles}" for s in kernel.stalls[:4]]
    return lines


def summarise(
    machine: Machine, rates: Rates, slots: Sequence[tuple[int, ...]], listing: Kernel
) -> KernelPrediction:
    """Makes the report of a finished replay.

    Args:
      machine: that replayed it.
      rates: its constants.
      slots: operations in each bundle, as in `dumps.Dump`.
      listing: the kernel's static listing.
    """
    totals, segments = machine.totals, machine.program.segments
    issued: collections.Counter[str] = collections.Counter()
    loops: collections.Counter[str] = collections.Counter()
    lost: collections.Counter[str] = collections.Counter()
    bundles = 0
    for segment, visits in zip(segments, totals.visits, strict=True):
        bundles += visits * segment.cycles
        loops[_innermost(listing, segment.start)] += visits * segment.cycles
        for row in slots[segment.start : segment.end] if visits else ():
            for unit, count in zip(SLOT_NAMES, row, strict=True):
                issued[unit] += visits * count
    for (_, address), cycles in totals.stalls.items():
        lost[_innermost(listing, address)] += cycles
    chip, cycles = chips.chip(rates.chip), max(machine.now, 1)
    use = {"mxu": totals.mxu_busy / (rates.mxus * cycles), "hbm": totals.hbm_busy / cycles}
    use |= {unit: issued[unit] / (n * cycles) for unit, n in _CAPACITY[rates.chip].items()}
    per_ms = rates.clock.value * 1e6
    hbm_bytes = sum(size for way, size in totals.moved.items() if "hbm" in way)
    peak_cycles = totals.mxu_busy / rates.mxus / (rates.peak_clock * 1e6)
    return KernelPrediction(
        name=listing.name,
        chip=rates.chip,
        cycles=machine.now,
        milliseconds=machine.now / per_ms,
        bundles=bundles,
        moved=dict(totals.moved),
        transfers=dict(totals.transfers),
        use=use,
        spills=issued["spill"],
        fills=issued["fill"],
        stalls=tuple(Stall(*where, cycles) for where, cycles in totals.stalls.most_common()),
        loops=tuple(
            HotLoop(path, *_extent(listing, path), count, lost[path])
            for path, count in loops.most_common()
            if count
        ),
        vmem_bytes=listing.vmem_bytes,
        smem_bytes=listing.smem_bytes,
        floor_milliseconds=max(peak_cycles, hbm_bytes / (chip.hbm_gb_per_s * 1e6)),
        band=(machine.now / per_ms, machine.now / per_ms),
        assumed=machine.program.assumed,
        spans=tuple(machine.spans or ()),
    )


def _innermost(listing: Kernel, address: int) -> str:
    around = [loop for loop in listing.loops if loop.start <= address < loop.end]
    return max(around, key=lambda loop: loop.depth).path if around else ""


def _extent(listing: Kernel, path: str) -> tuple[int, int]:
    if not path:
        return 0, max((region.end for region in listing.outside), default=0)
    loop = listing.loop(path)
    return loop.start, loop.end
