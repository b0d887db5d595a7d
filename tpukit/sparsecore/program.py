"""The traced form of a kernel, looked up once: which rule, which operands, what must come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tpukit.sparsecore import values


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """An equation of a jaxpr, looked up.

    Attributes:
      eqn, name: itself, and the name of its primitive.
      rule: what computes it from its operands alone, None where it takes a core.
      reads, writes: numbers of its operands and results.
      wanted: shapes and types of the results.
    """

    eqn: Any
    name: str
    rule: Callable[..., Any] | None
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    wanted: tuple[tuple[tuple[int, ...], Any], ...]

    def fits(self, result: Any) -> bool:
        """Whether it can be taken as it is, as nearly all can."""
        if not isinstance(result, np.ndarray | np.generic):
            return False
        shape, dtype = self.wanted[0]
        return result.dtype == dtype and result.shape == shape


class Program:
    """A jaxpr whose values have numbers, so that it is looked up once and not in every pass.

    Attributes:
      steps: its equations.
      results: numbers of its results.
    """

    def __init__(self, jaxpr: Any) -> None:
        self.jaxpr = jaxpr  # which must live, as it is known by its id
        self._fixed: list[Any] = [None] * (len(jaxpr.constvars) + len(jaxpr.invars))
        self._numbers = {var: n for n, var in enumerate((*jaxpr.constvars, *jaxpr.invars))}
        self.steps = [self._step(eqn) for eqn in jaxpr.eqns]
        self.results = [self._number(atom) for atom in jaxpr.outvars]

    def environment(self, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """What has a number, before the first step."""
        env = self._fixed.copy()
        env[: len(consts) + len(args)] = [*consts, *args]
        return env

    def _number(self, atom: Any) -> int:
        if hasattr(atom, "val"):
            self._fixed.append(np.asarray(atom.val, atom.aval.dtype))
            return len(self._fixed) - 1
        if atom not in self._numbers:
            self._numbers[atom] = len(self._fixed)
            self._fixed.append(None)
        return self._numbers[atom]

    def _step(self, eqn: Any) -> Step:
        name = eqn.primitive.name
        rule = values.rule_of(name, eqn.params)
        reads = tuple(map(self._number, eqn.invars))
        writes = tuple(map(self._number, eqn.outvars))
        wanted = tuple((v.aval.shape, v.aval.dtype) for v in eqn.outvars) if rule else ()
        return Step(eqn, name, rule, reads, writes, wanted)
