"""Reads what libtpu dumps about a compiled kernel: its final schedule, slot use and buffers.

The schedule is a list of bundles; one bundle issues per cycle. Loops are recovered from backward
branches and checked against the compiler's own labels; conditional code from forward branches.
Counts are static: what one pass over the code issues, whatever the trip counts turn out to be.
Anything unknown is a `ListingError`, never a guess.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from tpukit import dumps
from tpukit.chips import Chip
from tpukit.dumps import Branch, Bundle
from tpukit.errors import ListingError

# "-f32": vclamps before libtpu 0.0.50
_OPERATION = re.compile(
    r"^(?:%\S+ = )?"
    r"([a-z][a-z0-9_]*(?:-f32)?(?:\.(?:[a-zA-Z0-9_]+(?:\[\d+\])?|<no memory space>))*)(?= |$)"
)
_DMA_START = re.compile(r"^dma\.(?:general|(?:hbm|vmem|smem)_to_(?:hbm|vmem|smem))$")
_DMA_WAIT = re.compile(r"^dma\.done\.wait$")


@dataclasses.dataclass(frozen=True)
class Ops:
    """Operations issued, by slot of the bundle, and the ones among them that matter by themselves.

    Attributes:
      mxu, xlu, valu, vpop, eup, vload, vstore, salu: operations in that slot.
      fill, spill: vector registers reloaded from, and saved to, VMEM for want of registers.
      matmuls, matpushes: matrix multiplications, and weight pushes, started.
      dma_starts, dma_waits: transfers started and awaited.
    """

    mxu: int = 0
    xlu: int = 0
    valu: int = 0
    vpop: int = 0
    eup: int = 0
    vload: int = 0
    fill: int = 0
    vstore: int = 0
    spill: int = 0
    salu: int = 0
    matmuls: int = 0
    matpushes: int = 0
    dma_starts: int = 0
    dma_waits: int = 0

    def __add__(self, other: Ops) -> Ops:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Ops(*(a + b for a, b in zip(mine, theirs, strict=True)))


@dataclasses.dataclass(frozen=True)
class Region:
    """A straight line of bundles: entered at its start, left at its end, nothing in between.

    Attributes:
      start, end: its addresses; `end` is outside.
      bundles: issued on the way through, empty delay slots included.
      guards: what must hold for it to run, outermost first: a predicate register of the schedule,
        or its negation ("!%p12_p3"). Empty for code that always runs.
      ops: what it issues.
    """

    start: int
    end: int
    bundles: int
    guards: tuple[str, ...]
    ops: Ops


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the schedule.

    Attributes:
      path: its place in the tree, such as "0/1/0": the first loop in the second loop of the first.
      depth: 1 for an outermost loop.
      start, end: its addresses; `end` is outside.
      regions: its own code in address order, without that of nested loops.
      nested_bundles: bundles of one pass over all the loops inside it.
    """

    path: str
    depth: int
    start: int
    end: int
    regions: tuple[Region, ...]
    nested_bundles: int

    @property
    def bundles(self) -> int:
        """Its own bundles if every branch of it runs, without nested loops."""
        return sum(region.bundles for region in self.regions)

    @property
    def always_bundles(self) -> int:
        """Its own bundles that no condition can skip."""
        return sum(region.bundles for region in self.regions if not region.guards)

    @property
    def ops(self) -> Ops:
        """The operations of its own code."""
        return sum((region.ops for region in self.regions), Ops())


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An on-chip buffer of a kernel.

    Attributes:
      space: "vmem", "smem" or "sflag" (semaphores).
      size: bytes.
      shape: as the compiler writes it; raw bytes ("u8[...]") for a pipelined window.
      what: what it is for, in the compiler's words.
    """

    space: str
    size: int
    shape: str
    what: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler made of one Pallas kernel.

    Attributes:
      name: the compiler's name: the `pallas_call`'s, and a number ("gla.1").
      bundles: of one pass over all of its code.
      loops: all loops in program order; nested ones follow the loop they are in.
      outside: the regions outside any loop.
      buffers: its on-chip buffers.
    """

    name: str
    bundles: int
    loops: tuple[Loop, ...]
    outside: tuple[Region, ...]
    buffers: tuple[Buffer, ...]

    def loop(self, path: str) -> Loop:
        """Returns the loop at `path`.

        Raises:
          KeyError: there is none.
        """
        for loop in self.loops:
            if loop.path == path:
                return loop
        raise KeyError(f"{self.name} has no loop {path!r}; it has {[x.path for x in self.loops]}")

    @property
    def ops(self) -> Ops:
        """The operations of all of its code, each counted once."""
        regions = [*self.outside, *(r for loop in self.loops for r in loop.regions)]
        return sum((region.ops for region in regions), Ops())

    @property
    def vmem_bytes(self) -> int:
        """Bytes of VMEM in all its buffers; an upper bound where lifetimes do not overlap."""
        return sum(buffer.size for buffer in self.buffers if buffer.space == "vmem")

    @property
    def smem_bytes(self) -> int:
        """Bytes of SMEM in all its buffers."""
        return sum(buffer.size for buffer in self.buffers if buffer.space == "smem")


def parse_kernel(dump: dumps.Dump) -> Kernel:
    """Makes the listing of one kernel.

    Raises:
      ListingError: the dump holds something unknown.
    """
    file, bundles, branches = dump.file, dump.bundles, dump.branches
    ops = [_ops(file, b, row) for b, row in zip(bundles, dump.slots, strict=True)]
    spans = _loop_spans(file, bundles, branches)
    regions = _regions(bundles, branches, spans, ops)
    return Kernel(
        name=dump.name,
        bundles=sum(bundle.weight for bundle in bundles),
        loops=_loop_tree(spans, regions),
        outside=tuple(region for who, region in regions if who is None),
        buffers=tuple(
            Buffer(space=x.space, size=x.size, shape=x.shape, what=x.what)
            for x in dump.allocations
            if x.offset is None
        ),
    )


def parse_directory(directory: Path, kernels: Iterable[str], chip: Chip) -> tuple[Kernel, ...]:
    """Reads the dumps of the named kernels in a dump directory.

    Raises:
      ListingError: a kernel has no dump, or a dump is not understood.
    """
    return tuple(parse_kernel(dumps.read(directory, name, chip)) for name in kernels)


def _ops(file: str, bundle: Bundle, use: tuple[int, ...]) -> tuple[int, ...]:
    matmuls = matpushes = starts = waits = 0
    for operation in bundle.operations:
        match = _OPERATION.match(operation)
        if match is None:
            raise ListingError(file=file, line=bundle.line, what=f"operation {operation[:80]!r}")
        opcode = match[1]
        matmuls += opcode.startswith("vmatmul")
        matpushes += opcode.startswith("vmatpush")
        if opcode.startswith("dma."):
            starts += bool(_DMA_START.match(opcode))
            waits += bool(_DMA_WAIT.match(opcode))
            if not (_DMA_START.match(opcode) or _DMA_WAIT.match(opcode)):
                raise ListingError(file=file, line=bundle.line, what=f"transfer {opcode!r}")
        if opcode.startswith("sbr") and bundle.branch is None:
            raise ListingError(file=file, line=bundle.line, what=f"branch {operation[:80]!r}")
    return (*use, matmuls, matpushes, starts, waits)


def _loop_spans(file: str, bundles: list[Bundle], branches: list[Branch]) -> list[tuple[int, int]]:
    """Returns the address ranges of loops, outer before inner; checks them against the labels."""
    ends: dict[int, int] = {}
    for branch in branches:
        if branch.target < branch.end:
            ends[branch.target] = max(branch.end, ends.get(branch.target, 0))
    labelled = {a for a, bundle in enumerate(bundles) if bundle.labels & {"LB", "LH"}}
    for address in sorted(labelled ^ set(ends)):
        what = "a loop label with no branch back to it, or a branch back to no loop label"
        raise ListingError(file=file, line=bundles[address].line, what=what)
    spans = sorted(ends.items())
    for start, end in spans:
        around = [span for span in spans if span[0] < start < span[1]]
        if any(end > outer for _, outer in around) or bundles[start].depth != len(around) + 1:
            what = "a loop that is not nested as its label says"
            raise ListingError(file=file, line=bundles[start].line, what=what)
    return spans


def _regions(
    bundles: list[Bundle],
    branches: list[Branch],
    spans: list[tuple[int, int]],
    ops: list[tuple[int, ...]],
) -> list[tuple[int | None, Region]]:
    """Cuts the schedule where control can enter or leave; each part with its innermost loop."""
    cuts = {0, len(bundles)}
    for branch in branches:
        cuts |= {min(branch.end, len(bundles)), branch.target}
    for span in spans:
        cuts |= set(span)
    edges = sorted(cuts)
    owner: list[int | None] = [None] * len(edges)
    for index, (start, end) in enumerate(spans):  # Outer loops come first, inner ones overwrite.
        low, high = bisect.bisect_left(edges, start), bisect.bisect_left(edges, end)
        owner[low:high] = [index] * (high - low)
    regions = []
    for start, end, who in zip(edges, edges[1:], owner, strict=False):
        # A branch around a whole loop guards the loop, not the code in it.
        entry = 0 if who is None else spans[who][0]
        region = Region(
            start=start,
            end=end,
            bundles=sum(bundle.weight for bundle in bundles[start:end]),
            guards=_guards(start, [b for b in branches if b.end > entry]),
            ops=Ops(*map(sum, zip(*ops[start:end], strict=True))),
        )
        regions.append((who, region))
    return regions


def _guards(address: int, branches: list[Branch]) -> tuple[str, ...]:
    guards = []
    for branch in branches:
        if not branch.end <= address < branch.target:
            continue
        if branch.predicate is not None:
            guards.append(_negation(branch.predicate))
            continue
        # An unconditional jump over the else part: what sent control there is its guard.
        senders = (b.predicate for b in branches if b.target == branch.end and b.predicate)
        guards.append(next(senders, "never"))
    return tuple(guards)


def _negation(predicate: str) -> str:
    return predicate[1:] if predicate.startswith("!") else f"!{predicate}"


def _loop_tree(
    spans: list[tuple[int, int]], regions: list[tuple[int | None, Region]]
) -> tuple[Loop, ...]:
    paths: list[str] = []
    children: dict[str, int] = {}
    loops = []
    for index, (start, end) in enumerate(spans):
        around = [i for i, span in enumerate(spans) if span[0] < start < span[1]]
        parent = paths[around[-1]] if around else ""
        number = children.get(parent, 0)
        children[parent] = number + 1
        paths.append(f"{parent}/{number}" if parent else str(number))
        own = tuple(region for who, region in regions if who == index)
        total = sum(region.bundles for _, region in regions if start <= region.start < end)
        loops.append(
            Loop(
                path=paths[index],
                depth=len(around) + 1,
                start=start,
                end=end,
                regions=own,
                nested_bundles=total - sum(region.bundles for region in own),
            )
        )
    return tuple(loops)
