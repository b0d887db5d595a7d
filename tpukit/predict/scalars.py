"""What the scalar operands of a program's kernels will be: the part of it that runs on the CPU.

A kernel's page tables, group sizes and lengths are often computed by the program around it. This
walks through the traced program and computes, on the CPU and only when asked, every value that
follows from the arguments whose values are given. Large arrays can stay shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from tpukit.errors import UnsupportedError

RAGGED_DOT = "ragged-dot"  # what the compiler's kernels for it are called
_CALLS = ("jaxpr", "call_jaxpr", "call", "fun_jaxpr")
_LOOPS = ("while", "scan")
_SAME_ON_A_DEVICE = (
    *("pvary", "pcast", "reshard", "sharding_constraint", "mesh_cast"),
    "with_memory_space_constraint",
)


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A `pallas_call` of a program, or a `lax.ragged_dot`, which the compiler makes kernels of.

    Attributes:
      name: of the kernel, or "" if it has none; RAGGED_DOT.
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


def kernel_calls(
    program: Any, args: Sequence[Any], place: Mapping[str, int] | None = None
) -> list[KernelCall]:
    """Returns the kernel calls of a traced program in program order.

    Args:
      program: a closed jaxpr.
      args: its flat arguments: arrays, whose values count, or `jax.ShapeDtypeStruct`.
      place: the index along each mesh axis of the device in question, for what is in `shard_map`.
    """
    values = [_NOT_KNOWN if isinstance(arg, jax.ShapeDtypeStruct) else _given(arg) for arg in args]
    walk = _Walk([], place or {})
    walk.jaxpr(program.jaxpr, program.consts, values)
    return walk.calls


def part_of(value: Any, spec: Any, sizes: Mapping[str, int], place: Mapping[str, int]) -> Any:
    """A device's part of an array that is split as a partition says."""
    parts = []
    for size, names in zip(np.shape(value), (*spec, *[None] * np.ndim(value)), strict=False):
        names = () if names is None else (names,) if isinstance(names, str) else names
        index = count = 0
        for name in names:
            index, count = index * sizes[name] + place[name], max(count, 1) * sizes[name]
        width = size // max(count, 1)
        parts.append(slice(index * width, (index + 1) * width))
    return np.asarray(value)[tuple(parts)]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Follows values through a program, for one device of its mesh."""

    calls: list[KernelCall]
    place: Mapping[str, int]

    def jaxpr(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[_Lazy]) -> list[_Lazy]:
        """Follows the values through a jaxpr; returns its outputs."""
        known: dict[Any, _Lazy] = dict(zip(jaxpr.constvars, map(_given, consts), strict=True))
        known.update(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> _Lazy:
            return _given(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            outputs = self.equation(eqn, inputs, jaxpr.debug_info)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: Sequence[_Lazy], debug_info: Any) -> list[_Lazy]:
        name = eqn.primitive.name
        if name == "pallas_call":
            call = KernelCall(str(eqn.params["name"] or ""), tuple(inputs))
            self.calls.append(call)
            return [_NOT_KNOWN] * len(eqn.outvars)
        if name == "ragged_dot_general":
            self.calls.append(KernelCall(RAGGED_DOT, tuple(inputs)))
            return [_NOT_KNOWN] * len(eqn.outvars)
        if name == "shard_map":
            return self.shard_map(eqn, inputs)
        if name == "axis_index":
            return [_given(np.int32(self.place[eqn.params["axis_name"]]))]
        if name in _SAME_ON_A_DEVICE:
            return list(inputs)
        if name == "cond":
            return self.branch(eqn, inputs)
        inner = next((eqn.params[key] for key in _CALLS if key in eqn.params), None)
        if inner is not None and name not in _LOOPS:
            closed = hasattr(inner, "jaxpr")
            consts = inner.consts if closed else ()
            return self.jaxpr(inner.jaxpr if closed else inner, consts, inputs)
        for bodies in eqn.params.values():
            if name in _LOOPS and "pallas_call" in str(bodies):
                inside = "a kernel in a loop, whose operands change from turn to turn"
                raise UnsupportedError(
                    where="predict", what=inside, place="a replay", why="each turn is another run"
                )
        return _computed(eqn, inputs, debug_info)

    def shard_map(self, eqn: Any, inputs: Sequence[_Lazy]) -> list[_Lazy]:
        """Inside, each value is this device's part of it; outside again, none is known."""
        mesh, specs = eqn.params["mesh"], eqn.params["in_specs"]

        def part(value: _Lazy, spec: Any) -> _Lazy:
            def compute() -> Any:
                whole = value()
                return None if whole is None else part_of(whole, spec, mesh.shape, self.place)

            return _Lazy(compute)

        parts = [part(value, spec) for value, spec in zip(inputs, specs, strict=True)]
        self.jaxpr(eqn.params["jaxpr"], (), parts)
        return [_NOT_KNOWN] * len(eqn.outvars)

    def branch(self, eqn: Any, inputs: Sequence[_Lazy]) -> list[_Lazy]:
        index = inputs[0]()
        if index is None:
            return [_NOT_KNOWN] * len(eqn.outvars)
        branches = eqn.params["branches"]
        chosen = branches[int(np.clip(index, 0, len(branches) - 1))]
        return self.jaxpr(chosen.jaxpr, chosen.consts, inputs[1:])


def _computed(eqn: Any, inputs: Sequence[_Lazy], debug_info: Any) -> list[_Lazy]:
    """The outputs of an equation that is evaluated by itself, when it is asked for."""
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
