"""The static problem, the block sizes, and the memory they take."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from fused_moe.dispatch import LANES, Table
from fused_moe.rows import RowFormat

ROWS = 32  # rows of a tile of the narrowest type: counts of rows in memory are multiples of it


@dataclasses.dataclass(frozen=True)
class ExpertShape:
    """What the experts of a layer are like; the shared one may differ from the routed ones.

    Attributes:
      inter: width between the projections.
      gate_blocks: blocks of inputs with a scale of their own in gate and up, 0 without scales.
      down_blocks: the same of down.
      biased: whether the projections have biases.
    """

    inter: int
    gate_blocks: int
    down_blocks: int
    biased: bool


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything about a call that is known when it is traced.

    Attributes:
      axes: name and size of each mesh axis that experts are spread over; none on one device.
      num_tokens: of a device, a multiple of ROWS.
      top_k: slots of a token.
      num_experts: of all devices.
      hidden: width of a token, a multiple of 512.
      dtype: of tokens and output.
      weight_dtype: of all projections.
      row_dtype: of tokens as they travel and are multiplied.
      return_dtype: of results as they travel.
      routed, shared: the experts; shared is None without one.
      activation, limit: see `reference.fused_moe.gated`.
    """

    axes: tuple[tuple[str, int], ...]
    num_tokens: int
    top_k: int
    num_experts: int
    hidden: int
    dtype: Any
    weight_dtype: Any
    row_dtype: Any
    return_dtype: Any
    routed: ExpertShape
    shared: ExpertShape | None
    activation: str
    limit: float | None

    @property
    def num_devices(self) -> int:
        """Devices that share the experts."""
        return math.prod(size for _, size in self.axes)

    @property
    def experts_here(self) -> int:
        """Experts of a device."""
        return self.num_experts // self.num_devices

    @property
    def slots(self) -> int:
        """Rows that a token gets back at most, that of the shared expert included."""
        return self.top_k + (self.shared is not None)

    @property
    def table(self) -> Table:
        """Where the tables hold what."""
        return Table(self.num_experts, self.num_tokens * self.top_k)

    @property
    def rows_out(self) -> RowFormat:
        """Tokens as they travel."""
        return RowFormat(self.hidden, self.row_dtype, tailed=True)

    @property
    def rows_back(self) -> RowFormat:
        """Results as they travel."""
        return RowFormat(self.hidden, self.return_dtype, tailed=self.return_dtype != jnp.bfloat16)

    @property
    def quantised(self) -> bool:
        """Whether both products have quantised left sides."""
        return self.rows_out.scaled

    @property
    def shapes(self) -> tuple[ExpertShape, ...]:
        """Of routed and shared experts."""
        return (self.routed,) if self.shared is None else (self.routed, self.shared)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Block sizes of the kernel.

    Attributes:
      tile: rows of one expert that are computed at once, a multiple of 32.
      inter_slice: columns of gate and up in VMEM at once.
      hidden_slice: columns of down in VMEM at once.
      depth: buffers of each kind of slice, a power of two.
      partials: tokens that may be between two experts of a device. Where a batch needs more, the
        experts are visited again for the rest.
    """

    tile: int
    inter_slice: int
    hidden_slice: int
    depth: int = 2
    partials: int = 2048

    @property
    def tiles(self) -> tuple[int, ...]:
        """Numbers of rows that the kernel is specialised for, ascending."""
        sizes = [self.tile]
        while sizes[0] % (4 * ROWS) == 0:
            sizes.insert(0, sizes[0] // 4)
        return tuple(sizes)

    def visits(self, problem: Problem) -> int:
        """Most tiles of routed experts that a device can have in one pass."""
        rows = problem.num_devices * problem.num_tokens
        most = rows * min(problem.top_k, problem.experts_here)
        return problem.experts_here + most // self.tile


Buffer = tuple[tuple[int, ...], Any]


def buffers(problem: Problem, plan: Plan) -> dict[str, Buffer]:
    """Shape and type of every buffer in VMEM, by its name in `plumbing.Scratch`."""
    tile, depth, hidden = plan.tile, plan.depth, problem.hidden
    inter = max(shape.inter for shape in problem.shapes)
    gate_blocks = max(shape.gate_blocks for shape in problem.shapes)
    down_blocks = max(shape.down_blocks for shape in problem.shapes)
    found: dict[str, Buffer] = {
        "io": ((4, ROWS, hidden), problem.dtype),
        "tails": ((4, ROWS, LANES), jnp.int32),
        "words": ((2, tile, problem.rows_out.row_words), jnp.uint32),
        "x": ((tile, hidden), problem.row_dtype),
        "factors": ((3, tile, LANES), jnp.float32),
        "gate": ((depth, hidden, plan.inter_slice), problem.weight_dtype),
        "up": ((depth, hidden, plan.inter_slice), problem.weight_dtype),
        "down": ((depth, inter, plan.hidden_slice), problem.weight_dtype),
        "h": ((tile, inter), jnp.float32),
        "hq": ((tile, inter), problem.row_dtype),
        "h_scale": ((tile, LANES), jnp.float32),
        "y": ((tile, hidden), jnp.float32),
        "marks": ((tile, LANES), jnp.int32),
        "out": ((2, tile, problem.rows_back.row_words), jnp.uint32),
    }
    if gate_blocks:
        found["gate_scale"] = found["up_scale"] = (
            (depth, gate_blocks, plan.inter_slice),
            jnp.float32,
        )
        found["down_scale"] = ((depth, down_blocks, plan.hidden_slice), jnp.float32)
    if any(shape.biased for shape in problem.shapes):
        found["gate_bias"] = found["up_bias"] = ((depth, 1, plan.inter_slice), jnp.float32)
        found["down_bias"] = ((depth, 1, plan.hidden_slice), jnp.float32)
    return found


def padded(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array in VMEM, whose last two dimensions are padded to whole tiles."""
    *major, rows, lanes = shape
    size = jnp.dtype(dtype).itemsize
    tile = 8 * 4 // size
    return math.prod(major) * -(-rows // tile) * tile * -(-lanes // LANES) * LANES * size


def vmem_bytes(problem: Problem, plan: Plan) -> int:
    """Bytes of VMEM that the kernel's buffers take."""
    return sum(padded(*buffer) for buffer in buffers(problem, plan).values())


def vmem_allowed(problem: Problem, plan: Plan) -> int:
    """Bytes of VMEM to ask the compiler for: the buffers, and room for values that are spilled."""
    return vmem_bytes(problem, plan) + 6 * 2**20
