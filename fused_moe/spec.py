"""The static facts of a call, and the block sizes that a plan gives it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from fused_moe.dispatch import Layout
from fused_moe.rows import RowFormat
from reference.fused_moe import Activation

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
    activation: Activation
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
    def bulk_numbers(self) -> int:
        """Entries, and padding behind those of each expert: as many as are quick to sort."""
        most = self.num_tokens * self.top_k + (ROWS - 1) * self.num_experts
        return 1 << (most - 1).bit_length()

    @property
    def bulk_bits(self) -> int:
        """Bits of such a number, and of an expert or none: rows in bulk are sorted by both."""
        return self.bulk_numbers.bit_length() - 1 + self.num_experts.bit_length()

    @property
    def bulk_rows(self) -> int:
        """Rows of all experts in bulk, at most: those of each expert are a multiple of ROWS."""
        entries = self.num_tokens * self.top_k
        most = entries + (ROWS - 1) * min(self.num_experts, entries)
        return most - most % ROWS + self.num_tokens * (self.shared is not None)

    @property
    def layout(self) -> Layout:
        """Where the lists hold what."""
        return Layout(self.num_devices, self.num_experts, self.num_tokens, self.top_k)

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
      bulk: 1 where rows are sorted by expert before the kernel and added up after it, so that whole
        tiles travel, on one device only; 0 where the kernel moves each row by itself.
    """

    tile: int
    inter_slice: int
    hidden_slice: int
    depth: int = 2
    partials: int = 2048
    bulk: int = 0

    @property
    def tiles(self) -> tuple[int, ...]:
        """Numbers of rows that the kernel is specialised for, ascending."""
        sizes = [self.tile]
        while sizes[0] % (4 * ROWS) == 0:
            sizes.insert(0, sizes[0] // 4)
        return tuple(sizes)

    @property
    def pieces(self) -> int:
        """Blocks of ROWS results that fit the two buffers of tiles, a power of two."""
        return 1 << ((2 * self.tile // ROWS).bit_length() - 1)

    def visits(self, problem: Problem) -> int:
        """Most tiles of routed experts that a device can have in one pass."""
        rows = problem.num_devices * problem.num_tokens
        most = rows * min(problem.top_k, problem.experts_here)
        return problem.experts_here + most // self.tile
