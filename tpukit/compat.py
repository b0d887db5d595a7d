"""What older versions of JAX spell otherwise; kernels call it by one name.

`versions` says what they cannot do at all.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
from jax.core import Tracer
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from tpukit import versions

_BITCASTS_LANES = "dim" in inspect.signature(pltpu.bitcast).parameters


def in_hbm(x: jax.Array, *, aliased: bool = False) -> jax.Array:
    """An operand that stays in HBM; else XLA copies a small one to VMEM, only to be copied again.

    Args:
      x: the operand.
      aliased: whether an output takes its place.
    """
    free = aliased or not isinstance(x, Tracer)
    if free and not versions.has("pinned operands"):
        return x
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def bitcast_lanes(x: jax.Array, dtype: Any) -> jax.Array:
    """A SparseCore vector as another type, its lanes split or joined."""
    return pltpu.bitcast(x, dtype, dim=-1) if _BITCASTS_LANES else plsc.bitcast(x, dtype)


def push(source: Any, target: Any, semaphore: Any) -> Any:
    """A copy from a subcore's VMEM to HBM, to be started.

    `wait_read` ends when the source may be overwritten; `wait_write`, once at the end of a kernel,
    when all pushes of the subcore have arrived.
    """
    if versions.has("SparseCore fences"):
        return pltpu.make_async_copy(source, target, src_sem=semaphore)
    return _Push(source, target, semaphore)


@dataclasses.dataclass(frozen=True)
class _Push:
    """A push where JAX knows one semaphore of a copy only."""

    source: Any
    target: Any
    semaphore: Any

    def _copy(self) -> Any:
        return pltpu.make_async_copy(self.source, self.target, self.semaphore)

    def start(self) -> None:
        """Starts it."""
        self._copy().start()

    def wait_read(self) -> None:
        """Waits until the source may be overwritten."""
        self._copy().wait()

    def wait_write(self) -> None:
        """Leaves it to the fence that the compiler puts at the end of the kernel."""
