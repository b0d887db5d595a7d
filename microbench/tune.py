"""Looks for better block sizes, with the compiler in the loop and no TPU.

Every case whose plan one entry of the kernel's table decides is tuned together. From the cost
model's plan, one field after another takes the values of the package's choices; plans that the
package's own checks or the compiler refuse drop out; of the others the predicted time decides (on a
TPU the measured one). A change has to pay `TIE`, about the predictor's error, so that among equals
the cost model's plan, which needs no entry, stays. `--plan field=value` narrows the search to those
fields and those values.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from microbench import environment, predicted
from microbench.case import Case, Suite
from microbench.cli import Options, UsageError
from microbench.record import Record, record
from microbench.timing import time_calls
from tpukit import chips, errors, tuning

TITLE = "tune: predicted (on a TPU measured) time of all the cases of an entry"
TIE = 0.03
ROUNDS = 2
REFUSALS = (
    errors.ArgumentError,
    errors.KernelCompileError,
    errors.KernelResourceError,
    errors.UnsupportedError,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What tuning found for the cases of one entry.

    Attributes:
      chip: what for.
      key: of the entry.
      cases: names.
      model, best: microseconds of all cases with the cost model's plan, and with the best one.
      plan: the best one.
      changed: its fields that are not the cost model's.
      tried, refused: plans looked at, and how many of them were not legal.
      how: "predicted" or "measured".
    """

    chip: str
    key: dict[str, Any]
    cases: tuple[str, ...]
    model: float
    best: float
    plan: dict[str, Any]
    changed: dict[str, Any]
    tried: int
    refused: int
    how: tuning.How

    def row(self) -> dict[str, Any]:
        """For a table."""
        changed = " ".join(f"{name}={value}" for name, value in self.changed.items())
        return {
            "cases": ", ".join(self.cases),
            "chip": self.chip,
            "model us": self.model,
            "best us": self.best,
            "gain %": 100 * (1 - self.best / self.model),
            "changed": changed or "nothing: the cost model's plan stays",
            "tried": self.tried,
            "refused": self.refused,
            "how": self.how,
        }

    def record(self, kernel: str, options: Options) -> Record:
        """For a file of records."""
        case = Case(kernel, ", ".join(self.cases), self.key, self.plan)
        command = command_of(kernel, self.chip, options)
        return record("tune", case, self.row(), label=self.how, command=command, chip=self.chip)


def groups(suite: Suite, cases: Sequence[Case], chip: str) -> Iterator[tuple[Any, list[Case]]]:
    """The cases that the chip can run, by the entry that decides their plan.

    Raises:
      UsageError: the kernel has no table.
    """
    rooms = importlib.import_module(f"{cases[0].kernel}.plan")
    if not hasattr(rooms, "PLANS"):
        raise UsageError(f"{cases[0].kernel} has no table of plans to tune")
    found: dict[str, tuple[Any, list[Case]]] = {}
    for case in cases:
        if chip in suite.chips(case):
            key = rooms.PLANS.key(suite.explain(case, chip).problem)
            found.setdefault(repr(sorted(key.items())), (rooms, []))[1].append(case)
    yield from found.values()


def choices(rooms: Any, options: Options) -> Mapping[str, Sequence[Any]]:
    """What is tried for each field: the package's choices, or what the options name.

    Raises:
      UsageError: they name a field that is not tuned, or no integer for it.
    """
    found: dict[str, list[Any]] = {}
    for field, text in options.plan:
        known = ", ".join(rooms.PLANS.choices)
        if field not in rooms.PLANS.choices:
            raise UsageError(f"no field {field!r} is tuned; those that are: {known}")
        if not text.isdecimal():
            raise UsageError(f"--plan {field}={text!r}: expected an integer")
        found.setdefault(field, []).append(int(text))
    return found or rooms.PLANS.choices


class Search:
    """The plans of one entry that have been tried."""

    def __init__(self, suite: Suite, cases: Sequence[Case], chip: str, options: Options) -> None:
        self.suite, self.cases, self.chip, self.options = suite, cases, chip, options
        here = chips.current_chip()
        self.how: tuning.How = "measured" if here and here.name == chip else "predicted"
        self.times: dict[Any, list[float] | None] = {}

    def run(self, rooms: Any) -> Outcome:
        """Descends from the cost model's plan.

        Raises:
          UsageError: not even that one can be timed.
        """
        problem = self.suite.explain(self.cases[0], self.chip).problem
        model = best = rooms.PLANS.model(problem, chips.chip(self.chip))
        if self.time(model) is None:
            raise UsageError(f"{self.cases[0].name}: the schedules for {self.chip} say no time")
        for _ in range(ROUNDS):
            before = best
            for field, values in choices(rooms, self.options).items():
                tries = [dataclasses.replace(best, **{field: value}) for value in values]
                for plan in tries:
                    self.time(plan)
                least = min([best, *tries], key=lambda plan: self.score(plan, model))
                if self.score(least, model) < (1 - TIE) * self.score(best, model):
                    best = least
            if best == before:
                break
        was, now = dataclasses.asdict(model), dataclasses.asdict(best)
        return Outcome(
            chip=self.chip,
            key=rooms.PLANS.key(problem),
            cases=tuple(case.name for case in self.cases),
            model=sum(self.times[model] or ()),
            best=sum(self.times[best] or ()),
            plan=now,
            changed={name: now[name] for name in now if now[name] != was[name]},
            tried=len(self.times),
            refused=sum(times is None for times in self.times.values()),
            how=self.how,
        )

    def time(self, plan: Any) -> list[float] | None:
        """Microseconds of each case, None where one of them cannot have the plan."""
        if plan not in self.times:
            try:
                self.times[plan] = [self._time(case, plan) for case in self.cases]
            except REFUSALS:
                self.times[plan] = None
        return self.times[plan]

    def score(self, plan: Any, model: Any) -> float:
        """Geometric mean over the cases of the time as a fraction of the cost model's."""
        times = self.times[plan]
        if times is None:
            return math.inf
        ratios = [math.log(a / b) for a, b in zip(times, self.times[model] or (), strict=True)]
        return math.exp(sum(ratios) / len(ratios))

    def _time(self, case: Case, plan: Any) -> float:
        case = dataclasses.replace(case, plan=dataclasses.asdict(plan))
        self.suite.explain(case, self.chip)  # refuses what is not legal
        if self.how == "measured":
            inputs = [self.suite.inputs(case, self.options.seed)]
            return time_calls(self.suite.kernel_fn(case), inputs).median * 1e6
        found = predicted.case(self.suite, case, self.chip, self.options)
        if found is None:
            raise UsageError(f"{case.kernel}: its schedules cannot be replayed")
        return found.milliseconds * 1e3


def save(kernel: str, outcomes: Sequence[Outcome], options: Options) -> Path:
    """Writes the winners to the kernel's table; entries whose key was tuned anew are replaced."""
    rooms = importlib.import_module(f"{kernel}.plan")
    tuned = {(one.chip, repr(sorted(one.key.items()))) for one in outcomes}
    table = rooms.PLANS.read()
    kept = [
        entry
        for entry in table.entries
        if (entry.chip, repr(sorted(entry.key.items()))) not in tuned
    ]
    new = [
        tuning.Entry(one.chip, one.key, one.plan, _found(kernel, one, options))
        for one in outcomes
        if one.changed
    ]
    tuning.dump(rooms.PLANS.path, tuning.Table(table.schema, (*kept, *new)))
    return rooms.PLANS.path


def _found(kernel: str, one: Outcome, options: Options) -> tuning.Found:
    versions = {name: environment.versions()[name] for name in ("jax", "libtpu")}
    today = datetime.date.today().isoformat()
    command = command_of(kernel, one.chip, options)
    return tuning.Found(one.how, today, command, versions, round(one.best, 1))


def command_of(kernel: str, chip: str, options: Options) -> str:
    """The command line that tunes the same cases."""
    words = [f"python -m microbench tune --kernel {kernel} --chip {chip}"]
    words += [f"--set {key}={value}" for key, value in options.settings]
    words += [f"--plan {key}={value}" for key, value in options.plan]
    return " ".join([*words, f"--case {shlex.quote(options.case)}"] if options.case else words)
