"""What the commands do: check, time, compile, and show."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from microbench import cases, environment, predicted, static
from microbench.case import Case, Check, Suite
from microbench.cli import Options, UsageError
from microbench.record import Log, record
from microbench.table import table
from microbench.timing import time_calls
from tpukit import chips, errors, interpret


class Exit(enum.IntEnum):
    """Exit statuses; the order of `SEVERITY` decides between several."""

    OK = 0
    MISMATCH = 1
    UNSUPPORTED = 2
    ENVIRONMENT = 3
    INTERRUPTED = 130


SEVERITY = (Exit.OK, Exit.UNSUPPORTED, Exit.ENVIRONMENT, Exit.MISMATCH)


def run(options: Options) -> Exit:
    """Runs one command on every case that is asked for."""
    try:
        selected = select(options)
        for chip in options.chips:
            chips.chip(chip)
        log = Log(options.json, options.csv)
    except (UsageError, errors.ArgumentError, OSError) as error:
        print(f"microbench: {error}", file=sys.stderr)
        return Exit.UNSUPPORTED
    if options.command == "list":
        print(table([_row(case) for _, case in selected]))
        return Exit.OK
    print(_headline())
    bench = Bench(options, log)
    try:
        for suite, group in _by_suite(selected):
            bench.kernel(suite, group)
    except KeyboardInterrupt:
        print(f"microbench: interrupted after {len(log.records)} records", file=sys.stderr)
        return Exit.INTERRUPTED
    except errors.ToolchainError as error:
        print(f"microbench: {error}", file=sys.stderr)
        bench.statuses.append(Exit.ENVIRONMENT)
    finally:
        log.close()
    return max(bench.statuses, key=SEVERITY.index)


def select(options: Options) -> list[tuple[Suite, Case]]:
    """The suites and cases that the options name, with changed parameters.

    Raises:
      UsageError: a kernel, case or parameter that does not exist.
    """
    known = cases.kernels()
    unknown = [kernel for kernel in options.kernels if kernel not in known]
    if unknown:
        raise UsageError(f"no cases for kernel {unknown[0]!r}; there are {', '.join(known)}")
    suites = [cases.load(kernel) for kernel in options.kernels or known]
    every = [(suite, case) for suite in suites for case in suite.CASES]
    exact = [(suite, case) for suite, case in every if case.name == options.case]
    found = exact or [(suite, case) for suite, case in every if options.case in case.name]
    if not found:
        names = ", ".join(case.name for _, case in every)
        raise UsageError(f"no case is called {options.case!r}; there are {names}")
    try:
        return [(suite, case.override(dict(options.settings))) for suite, case in found]
    except ValueError as error:
        raise UsageError(str(error)) from error


class Bench:
    """Runs the stages of one command and collects their records.

    Attributes:
      statuses: what happened so far.
    """

    def __init__(self, options: Options, log: Log) -> None:
        self.options = options
        self.log = log
        self.statuses = [Exit.OK]

    def kernel(self, suite: Suite, group: Sequence[Case]) -> None:
        """Takes the cases of one kernel through the stages of the command."""
        print(f"\n== {group[0].kernel}")
        right = list(group)
        if self.options.command in ("bench", "run"):
            right = self._each("check", group, lambda case: self._check(suite, case))
            self._each("time", right, lambda case: self._time(suite, case))
        if self.options.command in ("bench", "aot"):
            self._each("aot", right, lambda case: self._aot(suite, case))
        if self.options.command in ("bench", "predict"):
            self._each("predict", right, lambda case: self._predict(suite, case))

    def _each(
        self, stage: str, group: Sequence[Case], work: Callable[[Case], list[dict[str, Any]]]
    ) -> list[Case]:
        """Shows the rows of every case in one table; returns the cases without a bad row."""
        rows: list[dict[str, Any]] = []
        right = []
        try:
            for case in group:
                with _progress(f"{stage} {case.name}"):
                    status = len(self.statuses)
                    rows += work(case)
                    if len(self.statuses) == status:
                        right.append(case)
        finally:  # an interrupted run shows what it had
            if rows:
                columns = _COLUMNS.get(stage)
                print(f"\n{_TITLES[stage]}\n{table(rows, columns)}", flush=True)
        return right

    def _record(
        self, kind: str, case: Case, label: str, values: dict[str, Any], **more: Any
    ) -> None:
        name = kind if kind in ("aot", "predict") else "run"
        command = repeat(name, case, self.options, more.get("chip"))
        self.log.add(record(kind, case, values, label=label, command=command, **more))

    def _check(self, suite: Suite, case: Case) -> list[dict[str, Any]]:
        try:
            checks = suite.check(case, self.options.seed)
        except errors.UnsupportedError as error:
            self.statuses.append(Exit.UNSUPPORTED)
            return [{"case": case.name, "check": str(error), "error": None, "limit": None}]
        except interpret.InterpretError as error:
            checks = [Check(f"runs: {type(error).__name__}", float("inf"), 0.0, note=str(error))]
            print(f"\n{case.name}: {error}")
        if not all(check.ok for check in checks):
            self.statuses.append(Exit.MISMATCH)
        rows = []
        for check in checks:
            values = dataclasses.asdict(check) | {"ok": check.ok}
            self._record("check", case, "checked", values, seed=self.options.seed)
            note = check.note.split("\n")[0] if not check.ok else ""
            name = f"{check.name}: {note}" if note else check.name
            rows.append({"case": case.name, "check": name, **values})
        return rows

    def _time(self, suite: Suite, case: Case) -> list[dict[str, Any]]:
        on_tpu = jax.default_backend() == "tpu"
        case = suite.timed(case)
        label = "tpu kernel, wall clock, measured" if on_tpu else "cpu reference, measured"
        function = suite.kernel_fn(case) if on_tpu else suite.reference_fn(case)
        timing = time_calls(function, suite.inputs(case, self.options.seed))
        cost = suite.cost(case)
        values = {
            "median_ms": timing.median * 1e3,
            "best_ms": timing.best * 1e3,
            "worst_ms": timing.worst * 1e3,
            "calls": timing.calls,
            "first_ms": timing.first * 1e3,
            "gflop_per_s": cost.flops / timing.median / 1e9,
            "gbyte_per_s": cost.hbm_bytes / timing.median / 1e9,
        }
        chip = chips.current_chip() if on_tpu else None
        plan = suite.plan(case, chip.name) if chip else "none: the reference"
        place = {"chip": chip.name if chip else "cpu", "plan": plan, "seed": self.options.seed}
        self._record("time", case, label, values, **place)
        return [{"case": case.name, "what": label, **values}]

    def _aot(self, suite: Suite, case: Case) -> list[dict[str, Any]]:
        rows = []
        for chip in self._chips(suite, case):
            plan = suite.plan(case, chip)
            floor = static.floor_us(suite.cost(case), chips.chip(chip))
            try:
                report = static.compile_case(suite, case, chip)
            except _REFUSALS as error:
                self.statuses.append(Exit.UNSUPPORTED)
                print(f"\n{case.name} on {chip}: {error}")
                unread = isinstance(error, errors.ListingError)  # compiled, but no figures
                shown: dict[str, Any] = {"compiles": unread}
                values = shown | {"error": str(error)}
            else:
                if self.options.command == "aot":
                    print(f"\n{case.name} on {chip}, {plan}\n{static.details(report)}")
                shown = static.figures(report) | suite.figures(case, report) | {"floor us": floor}
                values = shown | static.tree(report)
            self._record("aot", case, "static", values, chip=chip, plan=plan)
            rows.append({"case": case.name, "chip": chip, **shown})
        return rows

    def _chips(self, suite: Suite, case: Case) -> list[str]:
        """The chips that were asked for and that the case is for; says which are left out."""
        there = suite.chips(case)
        for chip in self.options.chips:
            if chip not in there:
                print(f"{case.name}: not for {chip}, but for {', '.join(there)}")
        return [chip for chip in self.options.chips if chip in there]

    def _predict(self, suite: Suite, case: Case) -> list[dict[str, Any]]:
        rows = []
        for chip in self._chips(suite, case):
            try:
                found = predicted.case(suite, case, chip, self.options)
            except _REFUSALS as error:
                self.statuses.append(Exit.UNSUPPORTED)
                print(f"\n{case.name} on {chip}: {error}")
                rows.append({"case": case.name, "chip": chip})
                continue
            if found is None:
                rows.append({"case": case.name, "chip": chip, "predicted us": "not replayed"})
                continue
            if self.options.command == "predict":
                print(f"\n{case.name} on {chip}\n{found.text()}")
            values = predicted.figures(found)
            self._record("predict", case, "predicted", values, chip=chip, seed=self.options.seed)
            rows.append({"case": case.name, "chip": chip, **values})
            predicted.save(found, case, self.options)
        return rows


_REFUSALS = (
    errors.KernelResourceError,
    errors.KernelCompileError,
    errors.ListingError,
    errors.ReplayError,
    errors.UnsupportedError,
)
_TITLES = {
    "check": "check: the kernel against its specification",
    "time": "time: on this machine, wall clock",
    "aot": (
        "aot: static, compiled for the chip and not run; "
        "floor us = the roofline from data-sheet peaks, no measurement"
    ),
}
_TITLES["predict"] = (
    "predict: predicted for the chip by replaying the final schedule, not measured; floor = the "
    "schedule's own bytes and products at data-sheet peaks"
)
_COLUMNS = {"check": ("case", "check", "error", "limit", "ok")}


def repeat(command: str, case: Case, options: Options, chip: str | None = None) -> str:
    """The command line that does the same to one case."""
    words = ["python -m microbench", command, "--kernel", case.kernel, "--case", case.name]
    for key, value in options.settings:
        words += ["--set", f"{key}={value}"]
    if command != "run" and chip:
        words += ["--chip", chip]
    if command != "aot":
        words += ["--seed", str(options.seed)]
    return " ".join(words)


def _by_suite(selected: Sequence[tuple[Suite, Case]]) -> list[tuple[Suite, list[Case]]]:
    groups: dict[str, tuple[Suite, list[Case]]] = {}
    for suite, case in selected:
        groups.setdefault(case.kernel, (suite, []))[1].append(case)
    return list(groups.values())


def _row(case: Case) -> dict[str, str]:
    params = " ".join(f"{key}={_brief(value)}" for key, value in case.params.items())
    return {"kernel": case.kernel, "case": case.name, "parameters": params}


def _brief(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    if len(value) <= 4:
        return ",".join(map(str, value)) or "none"
    return f"{len(value)} of {min(value)} to {max(value)}"


def _headline() -> str:
    facts = environment.describe()
    parts = [f"{name} {facts[name]}" for name in ("jax", "libtpu", "commit")]
    return "  ".join([*parts, facts["machine"], f"TPU {facts['TPU']}"])


@contextlib.contextmanager
def _progress(text: str) -> Iterator[None]:
    """Says on a terminal what is going on, and wipes it afterwards."""
    if not sys.stderr.isatty():
        yield
        return
    print(f"... {text}", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(" " * (len(text) + 4), end="\r", file=sys.stderr, flush=True)
