"""A schedule as a program: basic blocks, each translated to a Python function.

The functions do the scalar work of the schedule on 32-bit values and call the machine for all that
takes time: `step` (so many bundles were issued), transfers, waits. The machine sees segments:
straight runs of bundles between two such events, with the matrix operations they start.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tpukit.dumps import Allocation, Branch, Bundle, Dump
from tpukit.errors import ListingError
from tpukit.predict import instructions, values
from tpukit.predict.instructions import ARITHMETIC, Declaration, Instruction, Matmul

SMEM_BASE = 0x0080_0000  # words; VMEM granules are below, HBM granules above
HBM_BASE = 0x0100_0000
VMEM_WORD_BYTES = 512  # of the addresses that vector loads use
GRANULE_BYTES = 32
END = -1

_REGISTER = re.compile(r"[sp]\[\d+\]")
_DIVISION = re.compile(r"\bk(DivAndRem|Div|Rem)\b")
_RESULTS = {"DivAndRem": (False, True), "Div": (False,), "Rem": (True,)}  # remainders, in order


@dataclasses.dataclass(frozen=True)
class Segment:
    """Bundles that are issued one after another, without an event in between.

    Attributes:
      start, end: addresses; `end` is outside.
      cycles: issued, folded delay slots included.
      matmuls: (cycle, matrix unit, type) of each matrix operation.
    """

    start: int
    end: int
    cycles: int
    matmuls: tuple[tuple[int, int, str], ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A translated schedule.

    Attributes:
      name: of the dump.
      blocks: functions of (machine, s, p, mem, taken) that return the next block, or END.
      starts: address of each block.
      segments: in address order.
      declarations: the operands.
      branches: number of branches.
      vmem_end: the first VMEM address after the allocations.
      assumed: number of places where a scalar is assumed that vector units hand over.
    """

    name: str
    blocks: tuple[Callable[..., int], ...]
    starts: tuple[int, ...]
    segments: tuple[Segment, ...]
    declarations: tuple[Declaration, ...]
    branches: int
    vmem_end: int
    assumed: int = 0


def load(dump: Dump, from_vectors: int | None = None) -> Program:
    """Translates a schedule.

    Args:
      dump: the compiler's.
      from_vectors: what scalars are taken to be that vector units hand over; None: unknown.

    Raises:
      ListingError: it holds something that is not understood.
    """
    bundles, branches = dump.bundles, dump.branches
    decoded = [instructions.decode(dump.file, bundle) for bundle in bundles]
    addresses, vmem_end = _place(dump.allocations)
    edges = _edges(bundles, branches)
    writer = _Writer(dump.file, bundles, decoded, branches, edges, addresses)
    sources = [writer.block(i) for i in range(len(edges) - 1)]
    scope: dict[str, Any] = {**vars(values), "M": values.MASK, "U": values.UNKNOWN, **addresses}
    scope["V"] = values.UNKNOWN if from_vectors is None else from_vectors & values.MASK
    blocks = []
    for index, source in enumerate(sources):
        exec(compile(source, f"{dump.file}:block{index}", "exec"), scope)
        blocks.append(scope[f"block_{index}"])
    flat = [one for all_ in decoded for one in all_]
    declarations = [one for one in flat if isinstance(one, Declaration)]
    pops = sum(isinstance(one, Instruction) and one.opcode == "spop" for one in flat)
    return Program(
        name=dump.file,
        blocks=tuple(blocks),
        starts=tuple(edges[:-1]),
        segments=tuple(writer.segments),
        declarations=tuple(declarations),
        branches=len(branches),
        assumed=0 if from_vectors is None else pops,
        vmem_end=vmem_end,
    )


def _place(allocations: Sequence[Allocation]) -> tuple[dict[str, int], int]:
    """Gives every allocation an address; returns them and the first free VMEM address."""
    free = {"vmem": 64, "smem": SMEM_BASE, "sflag": 64}
    unit = {"vmem": VMEM_WORD_BYTES, "smem": 4, "sflag": 4}
    found = {}
    for one in allocations:
        if one.space not in free:
            raise ListingError(file="allocations", line=0, what=f"memory space {one.space!r}")
        if one.offset is not None:
            found[one.name] = one.offset // unit[one.space]
            continue
        found[one.name] = free[one.space]
        free[one.space] += -(-one.size // unit[one.space])
    return found, free["vmem"]


def _edges(bundles: Sequence[Bundle], branches: Sequence[Branch]) -> list[int]:
    edges = {0, len(bundles)}
    for branch in branches:
        edges |= {min(branch.end, len(bundles)), branch.target}
    return sorted(edges)


class _Writer:
    """Writes the source of blocks and collects their segments."""

    def __init__(
        self,
        file: str,
        bundles: Sequence[Bundle],
        decoded: Sequence[Sequence[Any]],
        branches: Sequence[Branch],
        edges: Sequence[int],
        addresses: dict[str, int],
    ) -> None:
        self.file = file
        self.bundles = bundles
        self.decoded = decoded
        self.branches = {branch.start: (i, branch) for i, branch in enumerate(branches)}
        self.by_end: dict[int, list[tuple[int, Branch]]] = {}
        for i, branch in enumerate(branches):
            self.by_end.setdefault(min(branch.end, len(bundles)), []).append((i, branch))
        self.edges = edges
        self.addresses = addresses
        self.segments: list[Segment] = []
        self.lines: list[str] = []
        self.begin = 0
        self.cycle = 0
        self.matmuls: list[tuple[int, int, str]] = []
        self.spilled = SMEM_BASE + 0x40000

    def block(self, index: int) -> str:
        """The source of the function of a block."""
        start, end = self.edges[index], self.edges[index + 1]
        self.lines = [f"def block_{index}(m, s, p, mem, taken):"]
        self.begin, self.cycle, self.matmuls = start, 0, []
        for address in range(start, end):
            self._bundle(address)
        self._step(end)
        for number, branch in self.by_end.get(end, ()):
            target = self.edges.index(branch.target) if branch.target < len(self.bundles) else END
            self.lines += [f"    if taken[{number}]:", f"        taken[{number}] = False"]
            self.lines += [f"        m.check_branches({number})"]
            self.lines += [f"        return {target}"]
        self.lines.append(f"    return {index + 1 if end < len(self.bundles) else END}")
        source = "\n".join(self.lines) + "\n"
        self._spill(source)
        return source

    def _step(self, end: int) -> None:
        """Ends the segment before bundle `end`."""
        if end > self.begin:
            self.lines.append(f"    m.step({len(self.segments)})")
            segment = Segment(self.begin, end, self.cycle, tuple(self.matmuls))
            self.segments.append(segment)
        self.begin, self.cycle, self.matmuls = end, 0, []

    def _bundle(self, address: int) -> None:
        bundle = self.bundles[address]
        found = [x for x in self.decoded[address] if isinstance(x, Instruction)]
        events = [line for one in found for line in self._event(one, address)]
        if events:
            self._step(address)
        self.lines += [f"    {line}" for line in events]
        for one in self.decoded[address]:
            if isinstance(one, Matmul):
                self.matmuls.append((self.cycle, one.unit, one.dtype))
        if address in self.branches:
            number, branch = self.branches[address]
            guard = instructions.value(branch.predicate) if branch.predicate else "True"
            self.lines.append(f"    taken[{number}] = {guard}")
        self._scalars(found, address)
        self.cycle += bundle.weight

    def _event(self, one: Instruction, address: int) -> list[str]:
        """Statements for what takes time or changes a semaphore; they read before all writes."""
        opcode, args = one.opcode, ", ".join(one.operands)
        if opcode in instructions.TRANSFERS:
            line = f"m.transfer({opcode!r}, {address}, {args})"
        elif opcode in instructions.WAITS:
            line = f"m.wait({address}, {args})"
        elif opcode in ("vsyncadd", "vsyncadd.remote", "vsyncpa", "vsyncset"):
            line = f"m.{opcode.replace('.', '_')}({args})"
        elif opcode == "vsyncmov":
            line = f"m.tokens[{one.token!r}] = [m.flag({args})]"
        elif opcode in instructions.DIVISION:
            kind = _DIVISION.search(one.comment)
            if kind is None:
                self._fail(address, "a division that does not say what it gives")
            of_signed = opcode.endswith("s32")
            found = [f"divide({args}, {rem}, {of_signed})" for rem in _RESULTS[kind[1]]]
            return [f"m.tokens[{one.token!r}] = [{', '.join(found)}]"]
        elif opcode == "shalt.err":
            return [f"if {one.predicate or True}: m.halt({address}, {one.comment!r})"]
        else:
            return []
        return [f"if {one.predicate}: {line}" if one.predicate else line]

    def _scalars(self, found: Sequence[Instruction], address: int) -> None:
        """Writes of one bundle: all read first; pointers take their number over afterwards."""
        stores, targets, results, after = [], [], [], []
        for one in found:
            if one.opcode == "sst":
                line = f"mem[known({one.address}, 'an address in SMEM')] = {one.operands[0]}"
                stores.append(f"if {one.predicate}: {line}" if one.predicate else line)
            elif one.target and one.opcode.startswith("int_to_ptr"):
                after.append((one.target, one.operands[0]))
            elif one.target and one.opcode != "sphi":
                targets.append(one.target)
                results.append(self._result(one))
            elif one.opcode == "sphi" and set(one.operands) != {one.target}:
                self._fail(address, f"a phi of {one.operands} in {one.target}")
        if not stores and not self._clash(targets, results):
            self.lines += [f"    {t} = {r}" for t, r in zip(targets, results, strict=True)]
        else:
            names = [f"v{i}" for i in range(len(targets))]
            self.lines += [f"    {n} = {r}" for n, r in zip(names, results, strict=True)]
            self.lines += [f"    {line}" for line in stores]
            self.lines += [f"    {t} = {n}" for t, n in zip(targets, names, strict=True)]
        self.lines += [f"    {t} = {source}" for t, source in after if t != source]

    @staticmethod
    def _clash(targets: Sequence[str], results: Sequence[str]) -> bool:
        """Whether a result reads a register that an earlier one writes."""
        written: set[str] = set()
        for target, result in zip(targets, results, strict=True):
            if written & set(_REGISTER.findall(result)):
                return True
            written.add(target)
        return False

    def _result(self, one: Instruction) -> str:
        if one.opcode == "sld":
            result = f"mem.get({one.address}, U)"
        elif one.opcode in instructions.POPS:
            result = f"m.tokens[{one.operands[0]}].pop(0)"
        elif one.opcode == "spop":
            result = "V"
        elif instructions.UNKNOWN.match(one.opcode):
            result = "U"
        else:
            result = ARITHMETIC[one.opcode].format(*one.operands)
        if one.predicate:
            result = f"select({one.predicate}, {result}, {one.otherwise or one.target})"
        return result

    def _spill(self, source: str) -> None:
        """Gives a place to the spill slots that the table of allocations does not list."""
        for name in re.findall(r"allocation\d+(?:_spill)?", source):
            if name not in self.addresses:
                self.addresses[name] = self.spilled
                self.spilled += 1

    def _fail(self, address: int, what: str) -> NoReturn:
        raise ListingError(file=self.file, line=self.bundles[address].line, what=what)
