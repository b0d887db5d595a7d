"""The optimised program around the kernels: which operations run, on what, in which order."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from tpukit._hlo_text import KERNEL_CALL, Computation, computations
from tpukit.errors import ListingError

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz"), 1.0),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2.0),
    **dict.fromkeys(("s32", "u32", "f32"), 4.0),
    **dict.fromkeys(("s64", "u64", "f64"), 8.0),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 0.5),
}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_TILE = re.compile(r"T\((\d+(?:,\d+)?)\)")
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "call-start",
        "call-update",
        "async-start",
        "async-update",
        "after-all",
        "partition-id",
        "replica-id",
        "optimization-barrier",
    ]
)
# These move no more than the smallest of the arrays they name.
_PARTIAL = frozenset({"copy", "slice", "dynamic-slice"})


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of the program.

    Attributes:
      dtype: "bf16".
      dims: logical sizes.
      order: dimensions from the fastest to the slowest.
      tile: sizes of the innermost tile.
      on_chip: whether it lives in VMEM or SMEM.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> int:
        """Bytes, padding to whole tiles included."""
        dims = [self.dims[i] for i in self.order]
        for i, tile in enumerate(reversed(self.tile)):
            if i < len(dims):
                dims[i] = -(-dims[i] // tile) * tile
        return math.ceil(math.prod(dims) * _BYTES[self.dtype])

    def words(self, value: np.ndarray) -> np.ndarray:
        """A 32-bit array as it lies in memory.

        Raises:
          ListingError: its type or layout is not one that scalar operands have.
        """
        array = np.asarray(value).reshape(self.dims)
        if array.dtype == bool:
            array = array.astype(np.int32)
        if array.dtype.itemsize != 4:
            what = f"a scalar operand of type {array.dtype}"
            raise ListingError(file="program", line=0, what=what)
        flat = array.transpose(tuple(reversed(self.order))) if self.dims else array.reshape(1)
        if flat.ndim >= 2:
            flat = _tiled(flat, self.tile)
        return np.ascontiguousarray(flat).reshape(-1).view(np.uint32)


def _tiled(array: np.ndarray, tile: tuple[int, ...]) -> np.ndarray:
    rows, lanes = tile if len(tile) == 2 else (1, tile[0] if tile else array.shape[-1])
    pads = [(0, 0)] * (array.ndim - 2) + [
        (0, -array.shape[-2] % rows),
        (0, -array.shape[-1] % lanes),
    ]
    array = np.pad(array, pads)
    *outer, height, width = array.shape
    array = array.reshape(*outer, height // rows, rows, width // lanes, lanes)
    return array.swapaxes(-3, -2)


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation of the program that takes time.

    Attributes:
      name: in the program; its dump carries it.
      opcode: what it is.
      core: "tensorcore" or "sparsecore".
      kernel: whether it is a Pallas kernel.
      results, operands: arrays; operands in order.
      repeats: how often it runs: trip counts of the loops around it.
      estimate: XLA's own estimate in cycles, or None.
      messages: whether it is a kernel that says that it reaches other devices.
      source: the operation of the traced program that it belongs to, "" if that is not said.
    """

    name: str
    opcode: str
    core: str
    kernel: bool
    results: tuple[Shape, ...]
    operands: tuple[Shape, ...]
    repeats: int
    estimate: int | None
    messages: bool = False
    source: str = ""

    @property
    def hbm_bytes(self) -> int:
        """Bytes of HBM it must at least read and write."""
        arrays = [shape for shape in (*self.results, *self.operands) if shape.dims]
        if self.opcode.removesuffix("-start") in _PARTIAL and arrays:
            moved = min(arrays, key=lambda shape: shape.size)
            return moved.size * (1 if moved.on_chip else 2)
        return sum(shape.size for shape in arrays if not shape.on_chip)


def shapes(text: str) -> tuple[Shape, ...]:
    """Reads the arrays of a type."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        if dtype not in _BYTES:
            continue
        sizes = tuple(int(x) for x in dims.split(",") if x)
        order, _, rest = (layout or "").partition(":")
        tile = _TILE.search(rest)
        found.append(
            Shape(
                dtype=dtype,
                dims=sizes,
                order=tuple(int(x) for x in order.split(",") if x)
                or tuple(reversed(range(len(sizes)))),
                tile=tuple(int(x) for x in tile[1].split(",")) if tile else (),
                on_chip=re.search(r"S\([1-9]\)", rest) is not None,
            )
        )
    return tuple(found)


def parse(text: str) -> list[Op]:
    """Returns the operations that run, in program order; loops are unrolled by `repeats`.

    Raises:
      ListingError: the program has no entry, or a loop whose trip count it does not say holds a
        kernel.
    """
    program = {one.name: one for one in computations(text)}
    entry = next((one for one in program.values() if one.entry), None)
    if entry is None:
        raise ListingError(file="program", line=0, what="no entry computation")
    return _ops(program, entry.name, 1, "tensorcore")


def _ops(program: dict[str, Computation], name: str, repeats: int, core: str) -> list[Op]:
    found: list[Op] = []
    types: dict[str, str] = {}
    for operation in program[name].operations:
        opcode, line = operation.opcode, operation.line
        types[operation.name] = operation.result
        thread = "sparsecore" if '"sparsecore"' in line else core
        if opcode in ("call-start", "async-start") or opcode == "call":
            inner = re.search(r"to_apply=%?([\w.\-]+)|calls=%?([\w.\-]+)", line)
            if inner is not None:
                found += _ops(program, inner[1] or inner[2], repeats, thread)
            continue
        if opcode == "while":
            found += _loop(program, line, repeats, core)
            continue
        if opcode in _FREE or opcode.endswith("-done"):
            continue
        operands = _OPERAND.findall(operation.rest.split(")", 1)[0])
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        source = re.search(r'op_name="([^"]*)"', line)
        found.append(
            Op(
                name=operation.name,
                opcode=opcode,
                core=thread,
                kernel=KERNEL_CALL in line,
                results=shapes(operation.result),
                operands=tuple(s for o in operands for s in shapes(types.get(o, ""))),
                repeats=repeats,
                estimate=int(estimate[1]) if estimate else None,
                messages='"has_communication":true' in line,
                source=source[1] if source else "",
            )
        )
    return found


def _loop(program: dict[str, Computation], line: str, repeats: int, core: str) -> list[Op]:
    body = re.search(r"body=%?([\w.\-]+)", line)
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
    if body is None:
        raise ListingError(file="program", line=0, what=f"loop {line[:80]!r}")
    count = int(trips[1]) if trips else 1
    inside = _ops(program, body[1], repeats * count, core)
    if trips is None and any(op.kernel for op in inside):
        what = "a loop around a kernel that does not say how often it runs"
        raise ListingError(file="program", line=0, what=what)
    return inside
