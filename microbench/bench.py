"""What the commands do: check, time, compile, and show."""

from __future__ import annotations

import contextlib
import enum
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from microbench import cases, compare, environment, report, stages, tune
from microbench.case import Case, Suite
from microbench.cli import Options, UsageError
from microbench.record import Log, Record, read, record
from microbench.table import table
from tpukit import chips, errors


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
        if options.operands:
            return (_compare if options.command == "compare" else _report_files)(options)
        log = Log(options.json, options.csv, resume=options.resume)
    except (ValueError, OSError) as error:
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
    except UsageError as error:
        print(f"microbench: {error}", file=sys.stderr)
        bench.statuses.append(Exit.UNSUPPORTED)
    except errors.ToolchainError as error:
        print(f"microbench: {error}", file=sys.stderr)
        bench.statuses.append(Exit.ENVIRONMENT)
    finally:
        log.close()
    if options.command == "report":
        bench.statuses.append(_report(options, log.records))
    return max(bench.statuses, key=SEVERITY.index)


def _report(options: Options, records: Sequence[Record]) -> Exit:
    """Writes the page."""
    try:
        written = report.write(records, pathlib.Path(options.out))
    except ImportError:
        print("microbench: pictures need matplotlib: pip install matplotlib", file=sys.stderr)
        return Exit.ENVIRONMENT
    print("written: " + ", ".join(map(str, written)))
    return Exit.OK


def _report_files(options: Options) -> Exit:
    return _report(options, [entry for path in options.operands for entry in read(path)])


def _compare(options: Options) -> Exit:
    """Shows two runs side by side; a figure that got worse, or went away, is a mismatch."""
    found = compare.two(options.operands, options)
    if not found:
        raise UsageError("neither run has figures to compare")
    print(table([change.row() for change in found]))
    worse = [change for change in found if change.verdict in ("slower", "gone")]
    print(f"\n{len(found)} figures, {len(worse)} worse")
    return Exit.MISMATCH if worse else Exit.OK


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
    every = [(suite, case) for suite in suites for case in (*suite.CASES, *suite.MORE)]
    exact = [(suite, case) for suite, case in every if case.name == options.case]
    found = exact or [(suite, case) for suite, case in every if chosen(options, suite, case)]
    if not found:
        names = ", ".join(case.name for _, case in every)
        raise UsageError(f"no case is called {options.case!r}; there are {names}")
    try:
        return [(suite, case.override(dict(options.settings))) for suite, case in found]
    except ValueError as error:
        raise UsageError(str(error)) from error


def chosen(options: Options, suite: Suite, case: Case) -> bool:
    """Whether `--case` names a case; it names one of MORE by how it begins, as `list` does all."""
    if case not in suite.MORE or options.command == "list":
        return options.case in case.name
    return bool(options.case) and case.name.startswith(options.case)


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
        command = self.options.command
        if command == "tune":
            self.tune(suite, group)
            return
        right = list(group)
        if command in ("bench", "run", "report"):
            right = self._each("check", stages.check, suite, group)
        if command in ("bench", "run"):
            self._each("time", stages.time, suite, right)
        for stage in (stages.aot, stages.predict, stages.compare):
            name = stage.__name__
            if command == name or name in _ALSO.get(command, ()):
                self._each(name, stage, suite, right, on_chips=True)

    def _each(
        self,
        stage: str,
        work: Callable[..., list[stages.Finding]],
        suite: Suite,
        group: Sequence[Case],
        *,
        on_chips: bool = False,
    ) -> list[Case]:
        """Shows the rows of every case in one table; returns the cases without a bad row."""
        rows: list[dict[str, Any]] = []
        right = []
        try:
            for index, case in enumerate(group):
                before = len(self.statuses)
                places = self._places(suite, case) if on_chips else [(None, case)]
                for chip, placed in places:
                    words = [f"[{index + 1}/{len(group)}]", stage, case.name, chip or ""]
                    with _progress(" ".join(words)):
                        rows += self._one(stage, work, suite, placed, chip)
                if len(self.statuses) == before:
                    right.append(case)
        finally:  # an interrupted run shows what it had
            if rows:
                columns = _COLUMNS.get(stage)
                print(f"\n{stages.TITLES[stage]}\n{table(rows, columns)}", flush=True)
        return right

    def _one(
        self,
        stage: str,
        work: Callable[..., list[stages.Finding]],
        suite: Suite,
        case: Case,
        chip: str | None,
    ) -> list[dict[str, Any]]:
        """The rows of one case in one place: from the log where it has them, else found now."""
        place = {"chip": chip} if chip else {}
        kept = self.log.find(stage, case, **place) if self.options.resume else []
        if not kept:
            for label, values, context in self._found(stage, work, suite, case, chip):
                name = stage if stage in ("aot", "predict", "compare") else "run"
                command = repeat(name, case, self.options, chip)
                entry = record(
                    stage, case, values, label=label, command=command, **place, **context
                )
                self.log.add(entry)
                kept.append(entry)
        if any(entry["values"].get("ok") is False for entry in kept):
            self.statuses.append(Exit.MISMATCH)
        first = {"case": case.name, **place}
        return [first | stages.single(entry["values"]) for entry in kept]

    def _found(
        self,
        stage: str,
        work: Callable[..., list[stages.Finding]],
        suite: Suite,
        case: Case,
        chip: str | None,
    ) -> list[stages.Finding]:
        """What a stage finds, or why it refuses."""
        try:
            return work(suite, case, *([chip] if chip else []), self.options)
        except stages.REFUSALS as error:
            self.statuses.append(Exit.UNSUPPORTED)
            print(f"\n{case.name}{f' on {chip}' if chip else ''}: {error}")
            values: dict[str, Any] = {"error": str(error)}
            if stage == "aot":  # what compiles may still have a listing that is not understood
                values["compiles"] = isinstance(error, errors.ListingError)
            return [stages.Finding("refused", values, {})]

    def _places(self, suite: Suite, case: Case) -> Iterator[tuple[str, Case]]:
        """The chips that were asked for, and the case as planned there; says what is left out."""
        there = suite.chips(case)
        for chip in self.options.chips:
            if chip not in there:
                print(f"{case.name}: not for {chip}, but for {', '.join(there)}")
                continue
            try:
                yield chip, stages.with_plan(suite, case, chip, self.options)
            except (errors.ArgumentError, errors.UnsupportedError) as error:
                self.statuses.append(Exit.UNSUPPORTED)
                print(f"\n{case.name} on {chip}: {error}")

    def tune(self, suite: Suite, group: Sequence[Case]) -> None:
        """Looks for better plans, and keeps them where the options say so."""
        found = []
        try:
            for chip in self.options.chips:
                for rooms, together in tune.groups(suite, group, chip):
                    search = tune.Search(suite, together, chip, self.options)
                    with _progress(f"tune {together[0].name} on {chip}"):
                        found.append(search.run(rooms))
        finally:
            if found:
                print(f"\n{tune.TITLE}\n{table([one.row() for one in found])}", flush=True)
                for one in found:
                    self.log.add(one.record(group[0].kernel, self.options))
        if self.options.save and found:
            print(f"written: {tune.save(group[0].kernel, found, self.options)}")


_ALSO = {"bench": ("aot", "predict"), "report": ("predict",)}
_COLUMNS = {"check": ("case", "check", "error", "limit", "ok")}


def repeat(command: str, case: Case, options: Options, chip: str | None = None) -> str:
    """The command line that does the same to one case."""
    words = ["python -m microbench", command, "--kernel", case.kernel]
    words += ["--case", shlex.quote(case.name)]
    for key, value in options.settings:
        words += ["--set", f"{key}={value}"]
    for key, value in options.plan:
        words += ["--plan", f"{key}={value}"]
    if chip:
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
