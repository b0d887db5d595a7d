"""Buffers in VMEM: what they take, and rings of them that DMAs fill or drain in order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

Index = jax.Array | int
LANES = 128


def repeat(times: Any, action: Callable[[jax.Array], None]) -> None:
    """action(0), ..., action(times - 1), as a loop of the kernel."""
    lax.fori_loop(0, times, lambda i, _: action(i), None)


def padded(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array in VMEM, whose last two dimensions are padded to whole tiles."""
    *major, rows, lanes = shape
    size = jnp.dtype(dtype).itemsize
    tile = 8 * 4 // size
    return math.prod(major) * -(-rows // tile) * tile * -(-lanes // LANES) * LANES * size


@dataclasses.dataclass(frozen=True)
class Stream:
    """Transfers numbered 0, 1, 2, ... through a ring of `depth` buffers.

    Attributes:
      copies: `copies(index, slot)` describes the DMAs of transfer `index` through buffer `slot`. It
        is called again to wait, so it must describe the same DMAs both times.
      depth: number of buffers, a power of two: the scalar core has no cheap division.
      exists: `exists(index)` says whether transfer `index` moves any data; transfers that do not
        are neither started nor awaited.
    """

    copies: Callable[[Index, jax.Array], Sequence[Any]]
    depth: int
    exists: Callable[[Index], jax.Array]

    def slot(self, index: Index) -> jax.Array:
        """The buffer that transfer `index` uses."""
        return jnp.int32(index) & (self.depth - 1)

    def start(self, index: Index) -> None:
        """Starts the DMAs of transfer `index`, if it exists."""

        @pl.when(self.exists(index))
        def _() -> None:
            for copy in self.copies(index, self.slot(index)):
                copy.start()

    def wait(self, index: Index) -> None:
        """Waits for the DMAs of transfer `index`, if it exists."""

        @pl.when(self.exists(index))
        def _() -> None:
            for copy in self.copies(index, self.slot(index)):
                copy.wait()
