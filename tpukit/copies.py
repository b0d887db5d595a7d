"""What XLA only moves: copies, transposes and the like in an optimised program.

A kernel reads and writes its arrays in one layout. Where a neighbour wants another, or an array
that should be written in place is not donated, XLA inserts a pass over memory, which costs time and
is seen nowhere in the program's source.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from tpukit._hlo_text import Computation, Operation, computations
from tpukit.predict.hlo import Shape, shapes

_MOVES = frozenset(
    [
        *("copy", "transpose", "reshape", "pad", "slice", "concatenate", "reverse"),
        *("dynamic-slice", "dynamic-update-slice"),
    ]
)
# What may stand beside a move in a fusion that does nothing else.
_IDLE = frozenset(
    [*("parameter", "constant", "broadcast", "bitcast", "tuple", "get-tuple-element", "iota")]
)
# How XLA concatenates in a fusion: the larger of padded arrays, or a choice among them.
_JOINS = frozenset(["maximum", "convert", "select", "compare"])
_NAMES = re.compile(r"%([\w.\-]+)")
_FUSED = re.compile(r"\bcalls=%?([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Move:
    """An operation that changes nothing but where, and how, an array lies.

    Attributes:
      name: in the program.
      opcode: "copy", "transpose", ..., or "fusion" of nothing but such.
      shape: its result; of several, the largest.
      size: bytes of that, padding to whole tiles included.
      source: the operation of the traced program that it belongs to, or the argument; "" if the
        compiler does not say.
    """

    name: str
    opcode: str
    shape: Shape
    size: int
    source: str

    def __str__(self) -> str:
        dims = ",".join(map(str, self.shape.dims))
        what = f"{self.name} ({self.opcode}) {self.shape.dtype}[{dims}]"
        return f"{what}, {self.size / 1e6:.2f} MB, of {self.source.rsplit('/', 1)[-1] or '?'}"


def moves(hlo: str, at_least: int = 0) -> tuple[Move, ...]:
    """The operations of an optimised program that only move data, in its order.

    A copy between HBM and VMEM that keeps the layout is none: XLA fetches operands ahead, and
    stores results, in this way, and the bytes would be moved in any case.

    Args:
      hlo: the program, `aot.Compiled.hlo`.
      at_least: bytes; smaller results are left out.
    """
    program = {one.name: one for one in computations(hlo)}
    fused = {
        called
        for one in program.values()
        for operation in one.operations
        if not operation.opcode.startswith(("call", "async", "while", "conditional"))
        for called in _CALLED.findall(operation.line)
    }
    found = []
    for one in program.values():
        if one.name in fused:
            continue
        types = {operation.name: operation.result for operation in one.operations}
        for operation in one.operations:
            move = _move(operation, types, program)
            if move is not None and move.size >= at_least:
                found.append(move)
    return tuple(found)


def _move(
    operation: Operation, types: Mapping[str, str], program: Mapping[str, Computation]
) -> Move | None:
    """The operation, if it only moves data."""
    opcode = operation.opcode.removesuffix("-start")
    if opcode == "fusion":
        called = _FUSED.search(operation.line)
        if called is None or not _only_moves(program[called[1]]):
            return None
    elif opcode not in _MOVES:
        return None
    results = shapes(operation.result)
    operands = _NAMES.findall(operation.rest.split(")", 1)[0])
    inputs = [shape for name in operands for shape in shapes(types.get(name, ""))]
    if operation.opcode.endswith("-start"):  # its result names the operand as well
        results = tuple(shape for shape in results if shape not in inputs) or results
    if not results:
        return None
    largest = max(results, key=lambda shape: shape.size)
    fetched = operation.opcode in ("copy", "copy-start", "slice-start")
    if fetched and inputs and _between_memories(inputs[0], largest):
        return None
    source = _SOURCE.search(operation.line)
    return Move(operation.name, opcode, largest, largest.size, source[1] if source else "")


def _between_memories(source: Shape, target: Shape) -> bool:
    """Whether a copy, or part of one, only changes the memory."""
    return source.on_chip != target.on_chip and (source.dtype, source.order, source.tile) == (
        target.dtype,
        target.order,
        target.tile,
    )


def _only_moves(computation: Computation) -> bool:
    """Whether a fusion moves data and computes nothing."""
    operations = computation.operations
    opcodes = {operation.opcode for operation in operations}
    if opcodes <= _IDLE | _MOVES:
        return bool(opcodes & _MOVES)
    if not ("pad" in opcodes and opcodes <= _IDLE | _MOVES | _JOINS):
        return False
    inputs = [
        shape
        for operation in operations
        if operation.opcode == "parameter"
        for shape in shapes(operation.result)
    ]
    results = shapes(operations[-1].result)
    return len({shape.dtype for shape in (*inputs, *results) if shape.dims}) == 1
