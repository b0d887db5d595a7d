"""A SparseCore on a CPU: runs Pallas kernels of vector and scalar subcores, strictly.

`simulate` interprets the traced form of any `pl.kernel`: all subcores, as coroutines; transfers
that happen at once, as late as they can, or at any time; fresh memory full of NaN and -1. What a
TPU might get right by luck is an error here: see `tpukit.sparsecore.faults`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tpukit import chips
from tpukit.manual import manual_axes
from tpukit.sparsecore import faults
from tpukit.sparsecore.core import Counts
from tpukit.sparsecore.run import KernelRun, Run, evaluate, traced
from tpukit.sparsecore.transfers import Timing

__all__ = ["Counts", "KernelRun", "Simulation", "Timing", "faults", "interpret", "simulate"]


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Results of a program, and what its kernels did.

    Attributes:
      out: what the function returned, with numpy arrays.
      kernels: its SparseCore kernels in the order in which they ran.
    """

    out: Any
    kernels: tuple[KernelRun, ...]


def simulate(
    fn: Callable[..., Any],
    *args: Any,
    chip: str = "tpu7x",
    timing: Timing = "lazy",
    seed: int = 0,
) -> Simulation:
    """Runs a function whose kernels are for the SparseCore, on this CPU.

    Args:
      fn: a function of trees of arrays; what it does around its kernels is evaluated as usual.
      *args: its arguments.
      chip: whose SparseCores to be.
      timing: when transfers are performed: "eager", "lazy" or "random".
      seed: of every order that is not determined: of cores, of iterations, of transfers.

    Raises:
      SimulationError: the kernel does what it must not, or what is not modelled; see `faults`.
      UnsupportedError: the chip has no SparseCore.
    """
    entry = chips.chip(chip)
    closed, shapes = traced(fn, args, entry)
    out, runs = _run(closed, [np.asarray(x) for x in jax.tree.leaves(args)], entry, timing, seed)
    return Simulation(jax.tree.unflatten(jax.tree.structure(shapes), out), runs)


def interpret(fn: Callable[..., Any], *args: Any, chip: str = "tpu7x") -> Any:
    """The results of `simulate` alone; works under `jax.jit`, `vmap` and `shard_map` as well."""
    entry = chips.chip(chip)
    closed, shapes = traced(fn, args, entry)

    def run(*leaves: Any) -> Any:
        out, _ = _run(closed, [np.asarray(x) for x in leaves], entry, "lazy", 0)
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    leaves = jax.tree.leaves(args)
    out = jax.pure_callback(run, shapes, *leaves, vmap_method="sequential")
    axes = tuple(manual_axes(*leaves).varying)  # of which a callback's results know nothing
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), out) if axes else out


def _run(
    closed: Any, leaves: list[np.ndarray], chip: chips.Chip, timing: Timing, seed: int
) -> tuple[list[Any], tuple[KernelRun, ...]]:
    runs: list[KernelRun] = []

    def kernel(eqn: Any, operands: Any) -> list[np.ndarray]:
        outputs, run = Run(eqn, chip, timing, seed)(operands)
        runs.append(run)
        return outputs

    out = evaluate(closed.jaxpr, closed.consts, leaves, kernel)
    return out, tuple(runs)
