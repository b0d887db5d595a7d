"""Reads libtpu's dumps of a compiled kernel: bundles, branches, slot use and allocations.

A dump that is not understood is a `ListingError` with its line, never a guess.
"""

from __future__ import annotations

import dataclasses
import glob
import re
from pathlib import Path

from tpukit.chips import Chip
from tpukit.errors import ListingError

_SCHEDULE = "final_bundles"
_SLOT_USE = "final_hlo-static-per-bundle-utilization"
_ALLOCATIONS = "pre-finalize-registers-and-allocations"

_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +((?:[A-Z]{2} ?)*): *(>*) *(\{.*)$", re.DOTALL)
_ADDRESS = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2} ?)*:")
_LABELS = frozenset({"LH", "LB", "LE", "PB", "PF", "CT"})
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_REGION = re.compile(r"(Start/End empty|Start|End) region (\d+)")
_BRANCH = re.compile(r"^%\S+ = sbr\.rel (?:\((!?%\w+)\) )?target = \$region(\d+)$")
SLOT_NAMES = ("mxu", "xlu", "valu", "vpop", "eup", "vload", "fill", "vstore", "spill", "salu")
_SLOT_HEADER = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
_ALLOCATION = re.compile(
    r"^ *#(allocation\d+) \[shape = '([^']*)', space=(\w+), size = (\w+),"
    r"(?: offset = (\w+),)?.*? (scoped|fixed_abs), tag = '(.*)'\]$"
)


@dataclasses.dataclass
class Bundle:
    """One bundle of a schedule.

    Attributes:
      line: of the dump.
      labels: what control can reach it as ("LB": the body of a loop, ...).
      depth: of the loops around it.
      marks: starts and ends of numbered regions, (kind, number).
      operations: what it issues, without comments.
      comments: of each operation, joined.
      weight: cycles it stands for: more than one for a folded run of empty bundles.
    """

    line: int
    labels: frozenset[str]
    depth: int
    marks: list[tuple[str, int]]
    operations: list[str]
    comments: list[str]
    weight: int = 1

    @property
    def branch(self) -> re.Match[str] | None:
        """The branch it holds: its predicate and its region."""
        return next(filter(None, map(_BRANCH.match, self.operations)), None)


@dataclasses.dataclass(frozen=True)
class Branch:
    """A branch at `start` that takes effect after the bundle before `end`; all are addresses."""

    start: int
    end: int
    target: int
    predicate: str | None


def _path(directory: Path, kernel: str, what: str) -> Path:
    """Returns the last dump `what` of a kernel.

    Raises:
      ListingError: there is none.
    """
    pattern = re.compile(rf"^\d+-{re.escape(kernel)}-\d+-{re.escape(what)}\.txt$")
    paths = sorted(path for path in directory.iterdir() if pattern.match(path.name))
    if not paths:
        raise ListingError(file=str(directory.name), line=0, what=f"no dump {what} of {kernel}")
    return paths[-1]


def _read_bundles(path: Path) -> list[Bundle]:
    """Reads a schedule.

    Raises:
      ListingError: a line is not understood.
    """
    lines = path.read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if _ADDRESS.match(line)]
    if not starts:
        raise ListingError(file=path.name, line=0, what="no bundles")
    bundles = []
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        # Long comments of an operation run over several lines.
        bundle = _bundle(path.name, start + 1, "\n".join(lines[start:stop]).strip("\n"))
        if bundle is None or int(lines[start].split()[0], 16) != len(bundles):
            raise ListingError(file=path.name, line=start + 1, what=f"bundle {lines[start][:80]!r}")
        bundles.append(bundle)
    return bundles


def _bundle(file: str, line: int, text: str) -> Bundle | None:
    match = _BUNDLE.match(text)
    if match is None:
        return None
    labels = frozenset(match[2].split())
    if not labels <= _LABELS:
        raise ListingError(file=file, line=line, what=f"label {match[2].strip()!r}")
    marks = [(kind, int(n)) for note in _COMMENT.findall(text) for kind, n in _REGION.findall(note)]
    body = _COMMENT.sub("", match[4]).strip()
    if not (body.startswith("{") and body.endswith("}")):
        return None
    operations, comments = [], []
    for part in match[4].split(";;"):
        plain = " ".join(_COMMENT.sub("", part).strip("{} ").split())
        if plain:
            operations.append(plain)
            comments.append(" ".join(_COMMENT.findall(part)))
    return Bundle(line, labels, len(match[3]), marks, operations, comments)


def _read_slots(path: Path) -> list[tuple[int, ...]]:
    """Reads the slots used by each bundle, in the order of `listing.Ops`.

    Raises:
      ListingError: a line is not understood.
    """
    lines = path.read_text().splitlines()
    if len(lines) < 4 or lines[1].strip() != _SLOT_HEADER:
        raise ListingError(file=path.name, line=2, what=f"columns other than {_SLOT_HEADER!r}")
    rows = []
    for number, line in enumerate(lines[4:], start=5):
        row = tuple(int(word) for word in line.split() if word.isdigit())
        if len(row) != len(SLOT_NAMES) or len(line.split()) != len(SLOT_NAMES):
            raise ListingError(file=path.name, line=number, what=f"row {line!r}")
        rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A named piece of memory.

    Attributes:
      name: "allocation7".
      space: "vmem", "smem" or "sflag" (semaphores).
      size: bytes.
      offset: its byte address where that is fixed, else None.
      shape: as the compiler writes it; raw bytes ("u8[...]") for a pipelined window.
      what: what it is for, in the compiler's words.
    """

    name: str
    space: str
    size: int
    offset: int | None
    shape: str
    what: str


def _read_allocations(path: Path) -> list[Allocation]:
    """Reads the table of allocations.

    Raises:
      ListingError: an entry is not understood.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.lstrip().startswith("#allocation"):
            continue
        match = _ALLOCATION.match(line)
        if match is None:
            what = f"allocation {line.strip()[:80]!r}"
            raise ListingError(file=path.name, line=number, what=what)
        name, shape, space, size, offset, kind, what = match.groups()
        fixed = int(offset, 0) if kind == "fixed_abs" and offset else None
        found.append(Allocation(name, space, int(size, 0), fixed, shape, what))
    return found


def _find_branches(file: str, bundles: list[Bundle], chip: Chip) -> list[Branch]:
    """Finds the branches and weighs folded delay slots; regions are targets by number."""
    where = {
        number: address
        for address, bundle in enumerate(bundles)
        for kind, number in bundle.marks
        if kind != "End"
    }
    found = []
    for address, bundle in enumerate(bundles):
        match = bundle.branch
        if match is None:
            continue
        target = where.get(int(match[2]))
        if target is None and "PF" in bundles[-1].labels and not bundles[-1].marks:
            target = len(bundles) - 1  # An early exit goes to the last bundle, which has no number.
        if target is None:
            raise ListingError(file=file, line=bundle.line, what=f"no start of region {match[2]}")
        end = address + 1 + _delay_slots(bundles, address, chip)
        found.append(Branch(start=address, end=end, target=target, predicate=match[1]))
    return found


def _delay_slots(bundles: list[Bundle], branch: int, chip: Chip) -> int:
    """Counts the bundles after a branch that issue before it is taken; unfolds a folded tail."""
    window = range(branch + 1, min(branch + 1 + chip.branch_delay, len(bundles)))
    if not chip.folds_delay:
        return len(window)
    after = next((i for i in window if bundles[i].branch), len(bundles))
    empty = [i for i in window if i < after and not bundles[i].operations]
    last = bundles[window[-1]] if window else None
    full = last is not None and after > window[-1] and any(kind == "End" for kind, _ in last.marks)
    # Control joins after a folded tail: a label there settles it, wherever else regions end.
    joins = next((i for i in empty if i + 1 < len(bundles) and bundles[i + 1].labels), None)
    if joins is None and (full or not empty):
        return len(window)
    # The tail is the empty bundle at which the next region begins, else the last one there is.
    begins = (i for i in empty if i + 1 < len(bundles) and _begins(bundles[i + 1]))
    tail = joins if joins is not None else next(begins, empty[-1])
    slots = tail - branch
    bundles[tail].weight = 1 + chip.branch_delay - slots
    return slots


def _begins(bundle: Bundle) -> bool:
    return bool(bundle.labels) or any(kind != "End" for kind, _ in bundle.marks)


@dataclasses.dataclass(frozen=True)
class Dump:
    """All that the compiler wrote about one kernel.

    Attributes:
      name: of the kernel.
      file: name of the file that holds the schedule.
      bundles: the schedule.
      branches: the branches in it.
      slots: of each bundle, operations in the order of `SLOT_NAMES`.
      allocations: its memory.
    """

    name: str
    file: str
    bundles: list[Bundle]
    branches: list[Branch]
    slots: list[tuple[int, ...]]
    allocations: list[Allocation]


def read(directory: Path, kernel: str, chip: Chip) -> Dump:
    """Reads the dumps of a kernel.

    Args:
      directory: what libtpu dumped to.
      kernel: the compiler's name of it.
      chip: what it was compiled for.

    Raises:
      ListingError: a dump is missing or not understood, or they contradict each other.
    """
    schedule, use, table = (
        _path(directory, kernel, what) for what in (_SCHEDULE, _SLOT_USE, _ALLOCATIONS)
    )
    bundles, slots = _read_bundles(schedule), _read_slots(use)
    if len(slots) != len(bundles):
        what = f"{len(slots)} rows for the {len(bundles)} bundles of {schedule.name}"
        raise ListingError(file=use.name, line=0, what=what)
    branches = _find_branches(schedule.name, bundles, chip)
    return Dump(kernel, schedule.name, bundles, branches, slots, _read_allocations(table))


def exists(directory: Path, kernel: str) -> bool:
    """Whether a kernel was dumped; the compiler dumps only one of several that are equal."""
    return any(directory.glob(f"*-{glob.escape(kernel)}-*{_SCHEDULE}.txt"))
