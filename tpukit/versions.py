"""What older versions of JAX cannot do, in one table. Imports no JAX."""

from __future__ import annotations

import dataclasses
import functools
import re
from importlib import metadata

OLDEST = (0, 10, 2)


@dataclasses.dataclass(frozen=True)
class Capability:
    """Something that not every supported version has.

    Attributes:
      name: of it, as tests and `has` call it.
      needs: the first version known to have it.
      why: what older ones lack, a clause.
      instead: what happens there, a clause.
    """

    name: str
    needs: tuple[int, ...]
    why: str
    instead: str


CAPABILITIES = (
    Capability(
        "interpreted faults",
        (0, 12, 0),
        "the interpreter neither types an access out of bounds nor recovers from a stopped device",
        "`tpukit.interpret.strict` warns; right kernels pass, a wrong one fails under another name "
        "or hangs",
    ),
    Capability(
        "SparseCore simulator",
        (0, 12, 0),
        "kernels of the SparseCore are traced to other loops, copies and pipelines",
        "`tpukit.sparsecore.simulate`, and with it gather-reduce interpreted, is an error",
    ),
    Capability(
        "SparseCore fences",
        (0, 12, 0),
        "no kernel can wait until what it pushed to HBM is there; the compiler does at its end",
        "`auto` of gather-reduce is XLA; a kernel that is asked for leaves that to the compiler",
    ),
    Capability(
        "pinned operands",
        (0, 12, 0),
        "the compiler refuses some pinned operands that outputs replace, JAX all outside a trace",
        "such an operand is not pinned, so that XLA may copy a small one to VMEM and back",
    ),
)


@functools.cache
def jax_version() -> tuple[int, ...]:
    """The version of the JAX installed, of numbers."""
    return tuple(map(int, re.findall(r"\d+", metadata.version("jax"))[:3]))


def capability(name: str) -> Capability:
    """The row of the table."""
    return next(row for row in CAPABILITIES if row.name == name)


def has(name: str) -> bool:
    """Whether this JAX has a capability."""
    return jax_version() >= capability(name).needs


def missing(version: tuple[int, ...] | None = None) -> tuple[Capability, ...]:
    """What a version lacks, by default this JAX."""
    version = jax_version() if version is None else version
    return tuple(row for row in CAPABILITIES if version < row.needs)


def lack(name: str) -> str:
    """The reason to give where a capability is asked for that is not there."""
    row, found = capability(name), ".".join(map(str, jax_version()))
    return f"{row.name} needs JAX {'.'.join(map(str, row.needs))}, this is {found}: {row.why}"
