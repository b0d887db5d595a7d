"""Figures of two runs side by side: of two commits, or of two files of records."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from microbench import environment
from microbench.cli import Options, UsageError
from microbench.record import NOT_REPLAYED, Record, read

# Per kind of record: the figure that counts, and by how much it may differ and still be the same.
# Schedules are the same every time; wall clocks are not.
FIGURES = {"predict": ("predicted us", 0.005), "time": ("median_ms", 0.10), "aot": ("bundles", 0.0)}
SPARSE = "bundles/subcore"  # counts instead where SparseCores do the work


@dataclasses.dataclass(frozen=True)
class Change:
    """One figure, before and after.

    Attributes:
      kernel, case, chip: of what.
      figure: its name, such as "predicted us".
      before, after: None where a run does not have it.
      verdict: "slower", "faster", "same", "gone" or "new".
    """

    kernel: str
    case: str
    chip: str
    figure: str
    before: float | None
    after: float | None
    verdict: str

    @property
    def percent(self) -> float | None:
        """Change in percent; positive is slower."""
        if self.before is None or self.after is None:
            return None
        return 100 * (self.after / self.before - 1) if self.before else 0.0

    def row(self) -> dict[str, Any]:
        """For a table."""
        shown = {**dataclasses.asdict(self), "change %": self.percent}
        return {key: shown[key] for key in _COLUMNS}


_COLUMNS = ("kernel", "case", "chip", "figure", "before", "after", "change %", "verdict")


def changes(before: Iterable[Record], after: Iterable[Record]) -> list[Change]:
    """Every figure of either run, in the order of the records."""
    old, new = _figures(before), _figures(after)
    found = []
    for key in dict.fromkeys([*old, *new]):
        kind, kernel, case, chip, figure, _ = key
        a, b = old.get(key), new.get(key)
        found.append(Change(kernel, case, chip, figure, a, b, _verdict(a, b, FIGURES[kind][1])))
    return found


def _figures(records: Iterable[Record]) -> dict[tuple[str, ...], float | None]:
    """The figure that counts of each record; None where it was refused. Later ones win."""
    found = {}
    for entry in records:
        if entry["kind"] in FIGURES:
            params = json.dumps(entry["params"], sort_keys=True)
            figure = SPARSE if SPARSE in entry["values"] else FIGURES[entry["kind"]][0]
            place = entry["kernel"], entry["case"], entry.get("chip", "")
            found[entry["kind"], *place, figure, params] = entry["values"].get(figure)
    return found


def _verdict(before: float | None, after: float | None, margin: float) -> str:
    if after is None:
        return "same" if before is None else "gone"
    if before is None:
        return "new"
    if abs(after - before) <= margin * before:
        return "same"
    return "slower" if after > before else "faster"


def two(operands: Sequence[str], options: Options) -> list[Change]:
    """Compares what is named: two runs, or one and the working tree.

    Each is a file of records, or a git revision, which is predicted now.

    Raises:
      UsageError: an operand is neither.
    """
    with contextlib.ExitStack() as stack:
        runs = [_run(name, stack) for name in (*operands, None)[:2]]  # refused before any work
        with futures.ThreadPoolExecutor() as pool:  # each prediction is a process of its own
            return changes(*pool.map(lambda run: run(options), runs))


def _run(name: str | None, stack: contextlib.ExitStack) -> Callable[[Options], list[Record]]:
    """How to have the records of a file or of a revision; None is the working tree."""
    if name is not None and Path(name).is_file():
        try:
            found = read(name)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return lambda options: found
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    root = environment.ROOT if name is None else _checkout(name, scratch / "tree")
    return functools.partial(_predict, root, scratch)


def _checkout(revision: str, folder: Path) -> Path:
    """The files of a revision of this repository, in a folder of their own."""
    command = ["git", "-C", str(environment.ROOT), "archive", "--format=tar", revision]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        reason = done.stderr.decode().strip().splitlines()[-1:]
        raise UsageError(f"{revision!r} is neither a file nor a revision: {' '.join(reason)}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def _predict(root: Path, scratch: Path, options: Options) -> list[Record]:
    """Predicts with the code of a tree; of what is not replayed there are static figures."""
    found = _run_command("predict", root, scratch, options)
    static = [entry["kernel"] for entry in found if entry["values"].get("note") == NOT_REPLAYED]
    if not static:
        return found
    options = dataclasses.replace(options, kernels=tuple(dict.fromkeys(static)))
    rest = [entry for entry in found if entry["kernel"] not in static]
    return rest + _run_command("aot", root, scratch, options)


def _run_command(command: str, root: Path, scratch: Path, options: Options) -> list[Record]:
    """The records of a command of a tree, in a process of its own."""
    path = scratch / f"{command}.jsonl"
    words = [sys.executable, "-m", "microbench", command, *selection(options)]
    words += ["--json", str(path), "--seed", str(options.seed)]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(words, cwd=root, env=env, stdout=subprocess.DEVNULL)
    if not path.exists():
        raise UsageError(f"{root}: {command} ends with exit status {done.returncode}")
    return read(str(path))


def selection(options: Options) -> list[str]:
    """The flags that choose cases, chips and plans."""
    words = ["--chip", ",".join(options.chips)]
    words += ["--kernel", ",".join(options.kernels)] if options.kernels else []
    words += ["--case", options.case] if options.case else []
    for flag, pairs in (("--set", options.settings), ("--plan", options.plan)):
        for key, value in pairs:
            words += [flag, f"{key}={value}"]
    return words
