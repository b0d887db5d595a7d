"""Reads the programs that libtpu dumps for the SparseCores: loops, bundles and streams.

Figures are static: what one pass over a loop issues and asks to be moved. How often a loop runs is
given where the program says it in constants. Anything not understood is a `ListingError`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from tpukit.errors import ListingError

_SECTIONS = {"scs": "sequencer", "tec": "subcores", "tac": "subcore access"}
_LABEL = re.compile(r"^([.\w$]+):$")
_START = re.compile(r"^(0x[0-9a-f]+): \{(.*)$")
_BRANCH = re.compile(r"sbr\.rel @(!?p\d+) (\.LBB\w+)-\.\w+(?:, \$(0x[0-9a-f]+|\d+))?")
_STREAM = re.compile(
    r"^(\[[^=]*\]) =\s+stream\.(linear|indirect|strided|indirect_vreg)\.(gather|scatter)"
    r"(\.add\.\w+)?[^\[]*\[([^\]]*)\],? ?(.*)$"
)
_DEFINITION = re.compile(r"^([sp]\d+) =\s+(\S+) ?(.*)$")
_IMMEDIATE = re.compile(r"^\$(0x[0-9a-fA-F]+|\d+)$")
_WORD = 4


@dataclasses.dataclass(frozen=True)
class Stream:
    """A transfer between HBM and the memory of a subcore.

    Attributes:
      address: of its bundle.
      kind: "linear", "indirect", ...
      direction: "gather" (to the subcore) or "scatter"; with what is added in flight.
      size: bytes, or None where a register decides.
      row_size: of a stream of chosen rows, the bytes of each; None where a register decides.
    """

    address: int
    kind: str
    direction: str
    size: int | None
    row_size: int | None = None


@dataclasses.dataclass(frozen=True)
class SparseLoop:
    """A loop of a SparseCore program.

    Attributes:
      start, end: addresses; `end` is outside.
      depth: 1 for an outermost loop.
      bundles: of one pass, without the loops inside it.
      trips: how often it runs, or None where that is not a constant.
      streams: it starts itself.
    """

    start: int
    end: int
    depth: int
    bundles: int
    trips: int | None
    streams: tuple[Stream, ...]


@dataclasses.dataclass(frozen=True)
class SparseSection:
    """The program of one kind of core.

    Attributes:
      name: "sequencer" or "subcores".
      bundles: in all.
      loops: in program order.
      streams: all it has, in loops or not.
    """

    name: str
    bundles: int
    loops: tuple[SparseLoop, ...]
    streams: tuple[Stream, ...]


@dataclasses.dataclass(frozen=True)
class SparseKernel:
    """A SparseCore kernel: its name without the compiler's number, and its sections."""

    name: str
    sections: tuple[SparseSection, ...]


@dataclasses.dataclass
class _Code:
    name: str
    bundles: dict[int, list[str]] = dataclasses.field(default_factory=dict)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)


def parse_directory(directory: Path, kernels: Sequence[str]) -> tuple[SparseKernel, ...]:
    """Reads the dumps of the named kernels.

    Raises:
      ListingError: a kernel has no dump, or it is not understood.
    """
    found = []
    for name in dict.fromkeys(re.sub(r"\.\d+$", "", kernel) for kernel in kernels):
        numbers = r"(?:\.\d+)?(?:\.cloned\.\d+)?"  # the latter before libtpu 0.0.50
        pattern = re.compile(rf"^{re.escape(name)}{numbers}\.call-start_\d+_bundles\.txt$")
        paths = sorted(path for path in directory.iterdir() if pattern.match(path.name))
        if not paths:
            raise ListingError(file=directory.name, line=0, what=f"no SparseCore dump of {name}")
        found.append(SparseKernel(name, parse(paths[-1])))
    return tuple(found)


def parse(path: Path) -> tuple[SparseSection, ...]:
    """Reads one dump.

    Raises:
      ListingError: a line is not understood.
    """
    codes: list[_Code] = []
    waiting: list[str] = []
    text: list[str] = []
    address = 0
    for number, raw in enumerate(path.read_text().splitlines(), start=1):
        line = raw.strip()
        if line in _SECTIONS:
            codes.append(_Code(_SECTIONS[line]))
            continue
        label, start = _LABEL.match(line), _START.match(line)
        if label is not None:
            waiting.append(label[1])
            continue
        if start is not None:
            address, text = int(start[1], 16), []
            line = start[2]
        if not line:
            continue
        if not codes or (start is None and not text and line != "}"):
            raise ListingError(file=path.name, line=number, what=f"line {line[:80]!r}")
        text.append(line)
        if line.endswith("}"):
            joined = " ".join(text).rstrip("} ").replace("\t", " ")
            codes[-1].bundles[address] = [" ".join(op.split()) for op in joined.split(";")]
            codes[-1].labels |= dict.fromkeys(waiting, address)
            waiting, text = [], []
    if not codes:
        raise ListingError(file=path.name, line=0, what="no section")
    return tuple(_section(path.name, code) for code in codes)


def _section(file: str, code: _Code) -> SparseSection:
    spans: dict[int, tuple[int, str]] = {}
    for address, operations in code.bundles.items():
        for operation in operations:
            branch = _BRANCH.search(operation)
            if branch is None:
                continue
            target = code.labels.get(branch[2])
            if target is None:
                raise ListingError(file=file, line=0, what=f"no label {branch[2]}")
            if target <= address:
                end = address + 1 + int(branch[3] or "1", 0)  # one delay slot unless it says more
                spans[target] = max(spans.get(target, (0, "")), (end, branch[1]))
    streams = [s for a, ops in code.bundles.items() for s in _streams(code, a, ops, spans)]
    loops = []
    for start, (end, predicate) in sorted(spans.items()):
        inside = [(a, b) for a, (b, _) in spans.items() if start < a and b <= end]
        own = [
            a for a in code.bundles if start <= a < end and not any(x <= a < y for x, y in inside)
        ]
        around = [a for a, (b, _) in spans.items() if a < start and end <= b]
        loops.append(
            SparseLoop(
                start=start,
                end=end,
                depth=len(around) + 1,
                bundles=len(own),
                trips=_trips(code, start, end, predicate),
                streams=tuple(s for s in streams if s.address in own),
            )
        )
    return SparseSection(code.name, len(code.bundles), tuple(loops), tuple(streams))


def _streams(
    code: _Code, address: int, operations: Sequence[str], spans: dict[int, tuple[int, str]]
) -> list[Stream]:
    found = []
    for operation in operations:
        match = _STREAM.match(operation)
        if match is None:
            continue
        parts = [part.strip() for part in match[6].split(",")]
        arguments = [part for part in parts if part and not part.startswith("[")]
        words = _constant(code, arguments[0], address, spans) if arguments else None
        size = row_size = None if words is None else words * _WORD
        if match[2].startswith("indirect"):
            rows = _constant(code, arguments[2], address, spans) if len(arguments) > 2 else None
            size = None if rows is None or row_size is None else row_size * rows
        else:
            row_size = None
        found.append(Stream(address, match[2], match[3] + (match[4] or ""), size, row_size))
    return found


def _constant(
    code: _Code, operand: str, address: int, spans: dict[int, tuple[int, str]]
) -> int | None:
    """The value of an operand if it is a number, or a register that only one number can be in."""
    number = _IMMEDIATE.match(operand)
    if number is not None:
        return int(number[1], 0)
    around = [(a, b) for a, (b, _) in spans.items() if a <= address < b]
    value = None
    for place, operations in code.bundles.items():
        for operation in operations:
            match = _DEFINITION.match(operation)
            if match is None or match[1] != operand:
                continue
            again = place >= address and any(a <= place < b for a, b in around)
            if place < address or again:
                given = _IMMEDIATE.match(match[3]) if match[2] == "simm.s32" else None
                value = None if given is None or again else int(given[1], 0)
    return value


def _trips(code: _Code, start: int, end: int, branch: str) -> int | None:
    """Passes of a loop that counts a register by a constant from one constant to another."""
    defined = {
        match[1]: (place, match[2], match[3])
        for place, operations in code.bundles.items()
        if start <= place < end
        for match in filter(None, map(_DEFINITION.match, operations))
    }
    compared, opcode, arguments = defined.get(branch.lstrip("!"), (0, "", ""))
    goal = re.match(r"^(s\d+), \$(0x[0-9a-fA-F]+|\d+)$", arguments)
    if goal is None or opcode != ("seq.s32" if branch.startswith("!") else "sne.s32"):
        return None
    stepped, opcode, arguments = defined.get(goal[1], (0, "", ""))
    step = re.match(rf"^(?:{goal[1]}, )?\$(0x[0-9a-fA-F]+|\d+)(?:, {goal[1]})?$", arguments)
    first = _constant(code, goal[1], start, {})
    if step is None or first is None or opcode != "sadd.s32":
        return None
    by, distance = _signed(int(step[1], 0)), _signed(int(goal[2], 0)) - _signed(first)
    if by == 0 or distance % by or distance // by < 0:
        return None
    # A bundle reads before it writes: only an earlier step is seen by the comparison.
    return distance // by + (0 if stepped < compared else 1)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value
