"""What a kernel tells the benchmark: its cases, and how to check, time, compile and cost one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

Call = tuple[Callable[..., Any], tuple[Any, ...]]
Value = int | float | str | bool | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of one kernel.

    Attributes:
      kernel: name of the package, as in `microbench.cases.<kernel>`.
      name: unique within the kernel, as in "ling-2.6-1t/decode".
      params: everything that defines the shape; read-only. A tuple holds integers.
      plan: all fields of the kernel's plan; empty where the kernel chooses; read-only.
    """

    kernel: str
    name: str
    params: Mapping[str, Value]
    plan: Mapping[str, int | str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in ("params", "plan"):
            object.__setattr__(self, field, MappingProxyType(dict(getattr(self, field))))

    def override(self, settings: Mapping[str, str]) -> Case:
        """Replaces parameters by values written as text, each read as the type it replaces.

        Raises:
          ValueError: a parameter that the case does not have, or a value of another type.
        """
        params = dict(self.params)
        for key, text in settings.items():
            if key not in params:
                known = ", ".join(sorted(params))
                raise ValueError(
                    f"{self.kernel} {self.name} has no parameter {key!r}; it has {known}"
                )
            params[key] = _parse(key, text, params[key])
        return dataclasses.replace(self, params=params)


def planned(case: Case, chosen: Any, settings: Mapping[str, str]) -> Case:
    """The case with a plan: the chosen one, with the fields that `settings` replace.

    Raises:
      ValueError: a field that the plan does not have, or a value of another type.
    """
    fields = dataclasses.asdict(chosen)
    for key, text in settings.items():
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise ValueError(f"plans of {case.kernel} have no field {key!r}; they have {known}")
        fields[key] = _parse(key, text, fields[key])
    return dataclasses.replace(case, plan=fields)


def _parse(key: str, text: str, like: Value) -> Any:
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(like, tuple):
            return tuple(int(part) for part in text.split(",") if part)
        return type(like)(text)
    except (KeyError, ValueError):
        kind = "integers with commas between" if isinstance(like, tuple) else type(like).__name__
        raise ValueError(f"{key}={text!r}: expected {kind}, such as {like!r}") from None


@dataclasses.dataclass(frozen=True)
class Check:
    """One figure of a comparison with the specification.

    Attributes:
      name: what was compared, and how.
      error: what was found; not a number counts as wrong.
      limit: the largest error that is right.
      note: what to say about a wrong one.
    """

    name: str
    error: float
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit  # false for NaN


@dataclasses.dataclass(frozen=True)
class Cost:
    """What any implementation has to do, for the roofline.

    Attributes:
      flops: operations of the matrix units, two for a multiply-add.
      hbm_bytes: bytes that have to be read and written once.
    """

    flops: float
    hbm_bytes: float


class Suite(Protocol):
    """What a module `microbench.cases.<kernel>` defines."""

    CASES: Sequence[Case]
    MORE: Sequence[Case]  # those that only run where `--case` begins their name

    def inputs(self, case: Case, seed: int) -> tuple[Any, ...]:
        """Arguments of `kernel_fn(case)` and of `reference_fn(case)`, at full size."""
        ...

    def check(self, case: Case, seed: int) -> list[Check]:
        """Compares the kernel with the specification; at a reduced size where it is interpreted."""
        ...

    def timed(self, case: Case) -> Case:
        """The case to time on this machine: itself, or one that fits."""
        ...

    def chips(self, case: Case) -> tuple[str, ...]:
        """The chips that the case is for."""
        ...

    def reference_fn(self, case: Case) -> Callable[..., Any]:
        """The specification in its fast form, jitted."""
        ...

    def kernel_fn(self, case: Case) -> Callable[..., Any]:
        """The kernel, jitted, for a machine that has a TPU."""
        ...

    def aot_target(self, case: Case) -> tuple[str, dict[str, Any]]:
        """Names "module:function" and its keywords; given `chip` as well, it returns (fn, args)."""
        ...

    def steered(self, case: Case, seed: int) -> Call | None:
        """The full-size call for a prediction: values for what steers the kernel, else shapes.

        None where its schedules cannot be replayed.
        """
        ...

    def peers(self, case: Case, seed: int) -> Mapping[str, Call]:
        """What one would use instead, by name, as full-size calls for a prediction."""
        ...

    def cost(self, case: Case) -> Cost:
        """What the full-size case has to compute and to move."""
        ...

    def explain(self, case: Case, chip: str) -> Any:
        """What the kernel's own `explain` says: its `plan`, and as text where that comes from.

        Raises:
          ArgumentError, UnsupportedError: the case's plan is not legal there, or none is.
        """
        ...

    def figures(self, case: Case, report: Any) -> dict[str, float]:
        """Figures of merit of this kernel out of a `tpukit.aot.StaticReport`."""
        ...
