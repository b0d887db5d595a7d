"""What the scalar operands of a program's kernels will be: the part of it that runs on the CPU.

A kernel's page tables, group sizes and lengths are often computed by the program around it. This
walks through the traced program and computes, on the CPU and only when asked, every value that
follows from the arguments whose values are given. Large arrays can stay shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from tpukit.errors import UnsupportedError

_CALLS = ("jaxpr", "call_jaxpr", "call", "fun_jaxpr")
_LOOPS = ("while", "scan")


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A `pallas_call` of a program.

    Attributes:
      name: of the kernel, or "" if it has none.
      operands: one function an operand: its value, or None where that is not known.
    """

    name: str
    operands: tuple[Callable[[], np.ndarray | None], ...]


class _Lazy:
    """A value that is computed when it is asked for."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute: Callable[[], Any] | None = compute
        self._value: Any = None

    def __call__(self) -> Any:
        if self._compute is not None:
            self._value, self._compute = self._compute(), None
        return self._value


def _given(value: Any) -> _Lazy:
    return _Lazy(lambda: value)


_NOT_KNOWN = _given(None)


def kernel_calls(program: Any, args: Sequence[Any]) -> list[KernelCall]:
    """Returns the kernel calls of a traced program in program order.

    Args:
      program: a closed jaxpr.
      args: its flat arguments: arrays, whose values count, or `jax.ShapeDtypeStruct`.
    """
    values = [_NOT_KNOWN if isinstance(arg, jax.ShapeDtypeStruct) else _given(arg) for arg in args]
    calls: list[KernelCall] = []
    _walk(program.jaxpr, program.consts, values, calls)
    return calls


def _walk(
    jaxpr: Any, consts: Sequence[Any], values: Sequence[_Lazy], calls: list[KernelCall]
) -> list[_Lazy]:
    """Follows the values through a jaxpr; returns its outputs."""
    known: dict[Any, _Lazy] = dict(zip(jaxpr.constvars, map(_given, consts), strict=True))
    known.update(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> _Lazy:
        return _given(atom.val) if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        outputs = _equation(eqn, inputs, calls, jaxpr.debug_info)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(
    eqn: Any, inputs: Sequence[_Lazy], calls: list[KernelCall], debug_info: Any
) -> list[_Lazy]:
    name = eqn.primitive.name
    unknown = [_NOT_KNOWN] * len(eqn.outvars)
    if name == "pallas_call":
        calls.append(KernelCall(str(eqn.params["name"] or ""), tuple(inputs)))
        return unknown
    inner = next((eqn.params[key] for key in _CALLS if key in eqn.params), None)
    if inner is not None and name not in _LOOPS:
        open_jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "jaxpr") else (inner, ())
        return _walk(open_jaxpr, consts, inputs, calls)
    if name == "cond":
        return _branch(eqn, inputs, calls, unknown)
    for bodies in eqn.params.values():
        if name in _LOOPS and "pallas_call" in str(bodies):
            inside = "a kernel in a loop, whose operands change from turn to turn"
            raise UnsupportedError(
                where="predict", what=inside, place="a replay", why="each turn is another run"
            )

    variables = list(dict.fromkeys(filter(is_variable, eqn.invars)))
    part = core.Jaxpr([], variables, eqn.outvars, [eqn], debug_info=debug_info.with_unknown_names())
    alone = core.jaxpr_as_fun(core.ClosedJaxpr(part, []))  # pyright: ignore[reportPrivateImportUsage]

    def compute() -> list[Any] | None:
        arguments = [value() for value in inputs]
        if any(argument is None for argument in arguments):
            return None
        of = dict(zip(map(id, eqn.invars), arguments, strict=True))
        return alone(*(of[id(variable)] for variable in variables))

    together = _Lazy(compute)

    def output(index: int) -> _Lazy:
        return _Lazy(lambda: None if together() is None else together()[index])

    return [output(index) for index in range(len(eqn.outvars))]


def is_variable(atom: Any) -> bool:
    """Whether an input of an equation is a variable, not a literal."""
    return not isinstance(atom, core.Literal)


def _branch(
    eqn: Any, inputs: Sequence[_Lazy], calls: list[KernelCall], unknown: list[_Lazy]
) -> list[_Lazy]:
    index = inputs[0]()
    if index is None:
        return unknown
    branches = eqn.params["branches"]
    chosen = branches[int(np.clip(index, 0, len(branches) - 1))]
    return _walk(chosen.jaxpr, chosen.consts, inputs[1:], calls)
