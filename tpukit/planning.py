"""What the plans of all kernels have in common: which are legal, which one a call gets, and why."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from tpukit import tuning
from tpukit.chips import Chip, chip, current_chip
from tpukit.errors import ArgumentError, UnsupportedError

Implementation = Literal["auto", "pallas", "interpret", "reference"]


@dataclasses.dataclass(frozen=True)
class Explanation[Problem, Plan]:
    """Which plan a call gets, and why.

    Attributes:
      problem: the call as the plan sees it.
      plan: the block sizes.
      source: "argument", or an "exact" or "nearest" entry of the table, or the cost "model".
      why: a sentence about that choice.
      vmem_bytes: what the plan's buffers take.
      vmem_limit: what the chip has.
    """

    problem: Problem
    plan: Plan
    source: str
    why: str
    vmem_bytes: int
    vmem_limit: int

    @property
    def needs(self) -> str:
        """The memory that it takes, in words."""
        return f"{self.vmem_bytes / 2**20:.1f} of {self.vmem_limit / 2**20:.0f} MiB VMEM"

    def __str__(self) -> str:
        fields: Any = self.plan
        sizes = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(fields).items())
        return f"{sizes} ({self.source}: {self.why}; {self.needs})"


@dataclasses.dataclass(frozen=True)
class Planner[Problem, Plan]:
    """How a kernel comes by its plans.

    Attributes:
      kernel: its name.
      plan: the dataclass of its plans, all fields ints.
      check: raises ArgumentError or UnsupportedError where a plan is not legal for a problem.
      model: the cost model.
      exact, bucketed: what the table knows a problem by, see `tuning.Schema`.
      key: those fields of a problem.
      choices: values that tuning tries, one field after another.
      path: of the table.
    """

    kernel: str
    plan: type[Plan]
    check: Callable[[Problem, Plan, Chip], None]
    model: Callable[[Problem, Chip], Plan]
    exact: Mapping[str, type]
    bucketed: tuple[str, ...]
    key: Callable[[Problem], dict[str, tuning.Value]]
    choices: Mapping[str, tuple[int, ...]]
    path: Path

    @functools.cached_property
    def table(self) -> tuning.Table:
        """The tuned block sizes, read once."""
        return self.read()

    def read(self) -> tuning.Table:
        """The tuned block sizes, as the file has them now."""
        plan: Any = self.plan
        fields = dict.fromkeys((field.name for field in dataclasses.fields(plan)), int)
        schema = tuning.Schema(self.kernel, self.exact, self.bucketed, fields)
        return tuning.load(self.path, schema)

    def plan_of(self, fields: Mapping[str, tuning.Value]) -> Plan:
        """A plan from the fields of a table's entry, which the schema says are ints."""
        plan: Any = self.plan
        return plan(**fields)

    def fits(self, problem: Problem, plan: Plan, chip: Chip) -> bool:
        """Whether `check` accepts the plan."""
        try:
            self.check(problem, plan, chip)
        except (ArgumentError, UnsupportedError):
            return False
        return True

    def choose(self, problem: Problem, chip: Chip, plan: Plan | None) -> tuple[Plan, str, str]:
        """The caller's plan, else the table's, else the cost model's; its source, and why.

        Raises:
          ArgumentError, UnsupportedError: the caller's plan is not legal, or none is.
        """
        if plan is not None:
            self.check(problem, plan, chip)
            return plan, "argument", "the caller's"

        def modelled() -> Mapping[str, tuning.Value]:
            found: Any = self.model(problem, chip)
            return dataclasses.asdict(found)

        found = self.table.resolve(
            chip.name,
            self.key(problem),
            valid=lambda fields: self.fits(problem, self.plan_of(fields), chip),
            model=modelled,
        )
        return self.plan_of(found.value), found.source, found.why


def choose_implementation(
    where: str,
    implementation: Implementation,
    supported: tuple[str, ...],
    plan_for: Callable[[Chip], Any],
) -> tuple[Implementation, Chip]:
    """Resolves "auto" and names the chip to plan for; interpretation plans as for tpu7x.

    Args:
      where: the public function.
      implementation: what the caller asked for.
      supported: names of the chips that the kernel runs on.
      plan_for: makes the plan for a chip, or raises UnsupportedError.

    Raises:
      UnsupportedError: the kernel was asked for where it cannot run.
    """
    here = current_chip()
    runs = here is not None and here.name in supported
    target = here or chip("tpu7x")
    if implementation == "auto":
        if not runs:
            return "reference", target
        try:
            plan_for(target)
        except UnsupportedError:
            return "reference", target
        return "pallas", target
    if implementation == "pallas" and not runs:
        raise UnsupportedError(
            where=where,
            what="implementation='pallas'",
            place=here.name if here else jax.default_backend(),
            why=f"the kernel runs on {', '.join(supported)}",
            advice="Use implementation='reference', or 'interpret' to run the kernel on a CPU.",
        )
    return implementation, target
