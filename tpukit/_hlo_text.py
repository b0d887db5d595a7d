"""The text of an optimised program: its computations and the operations in them."""

from __future__ import annotations

import dataclasses
import re

KERNEL_CALL = 'custom_call_target="tpu_custom_call"'

_OPERATION = re.compile(
    r"^  (?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$", re.DOTALL
)
_NEXT = re.compile(r"\n(?=  (?:ROOT )?%?[\w.\-]+ = )")  # an attribute may hold line breaks
# An attribute may hold line breaks and braces: only these two endings close a computation.
_COMPUTATION = re.compile(
    r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)\n\}(|, execution_thread=[^\n]*)$",
    re.DOTALL | re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation: its name, the type of its result, what it is, what follows, and all of it."""

    name: str
    result: str
    opcode: str
    rest: str
    line: str


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation of a program.

    Attributes:
      name: in the program.
      entry: whether the program begins there.
      core: what runs it, "tensorcore" or "sparsecore".
      operations: in program order.
    """

    name: str
    entry: bool
    core: str
    operations: tuple[Operation, ...]


def computations(text: str) -> list[Computation]:
    """Reads all computations of a program."""
    return [
        Computation(
            name=name,
            entry=bool(entry),
            core="sparsecore" if "sparsecore" in thread else "tensorcore",
            operations=tuple(
                Operation(*match.groups(), line=line)
                for line in _NEXT.split(body)
                if (match := _OPERATION.match(line)) is not None
            ),
        )
        for entry, name, body, thread in _COMPUTATION.findall(text)
    ]
