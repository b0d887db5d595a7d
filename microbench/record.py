"""Records: one flat, self-contained row per figure, as JSON lines or CSV."""

from __future__ import annotations

import csv
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from microbench import environment
from microbench.case import Case

Record = dict[str, Any]
NOT_REPLAYED = "not replayed"  # note of a kernel whose schedules no prediction follows


def record(
    kind: str, case: Case, values: Mapping[str, Any], *, label: str, command: str, **context: Any
) -> Record:
    """A figure with everything that is needed to obtain it again.

    Args:
      kind: "check", "time", "aot", "predict" or "peer".
      case: what was run.
      values: the figures.
      label: what the figures are, such as "cpu reference, measured" or "static".
      command: the command that repeats them.
      context: chip, plan, seed and the like.
    """
    return {
        **_identity(kind, case),
        "label": label,
        **context,
        "values": dict(values),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
    }


def _identity(kind: str, case: Case) -> Record:
    return {
        "kind": kind,
        "kernel": case.kernel,
        "case": case.name,
        "params": dict(case.params),
        "plan_fields": dict(case.plan),
    }


def _current(entry: Record) -> bool:
    """Whether a record is of this very code, committed, and of these very tools."""
    commit = environment.commit()
    same = (entry.get("commit"), entry.get("versions")) == (commit, environment.versions())
    return same and not commit.endswith("+changes")


def read(path: str) -> list[Record]:
    """Records of a file of JSON lines.

    Raises:
      ValueError: it is not such a file.
    """
    try:
        found = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines() if line]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a file of records: {error}") from error
    if not all(isinstance(entry, dict) and "kind" in entry for entry in found):
        raise ValueError(f"{path} is not a file of records as --json writes them")
    return found


class Log:
    """Collects records and keeps files of them.

    The JSON lines are written as they come, so that an interrupted run leaves what it had. A CSV
    file needs all the columns first, so it is written by `close`.
    """

    def __init__(
        self, json_path: str | None = None, csv_path: str | None = None, *, resume: bool = False
    ) -> None:
        self.records: list[Record] = []
        if resume and json_path and pathlib.Path(json_path).exists():
            self.records = [entry for entry in read(json_path) if _current(entry)]
        self._json = open(json_path, "w") if json_path else None  # noqa: SIM115  (closed by close)
        for entry in self.records:
            self._write(entry)
        self._csv_path = csv_path

    def add(self, entry: Record) -> None:
        """Keeps one record."""
        self.records.append(entry)
        self._write(entry)

    def find(self, kind: str, case: Case, **context: Any) -> list[Record]:
        """Records of this kind, case and context that are there already."""
        wanted = json.loads(json.dumps({**_identity(kind, case), **context}))
        return [
            entry
            for entry in self.records
            if all(json.loads(json.dumps(entry.get(k))) == wanted[k] for k in wanted)
        ]

    def _write(self, entry: Record) -> None:
        if self._json:
            self._json.write(json.dumps(entry, default=str) + "\n")
            self._json.flush()

    def close(self) -> None:
        """Completes the files."""
        if self._json:
            self._json.close()
        if self._csv_path:
            rows = [_flatten(entry) for entry in self.records]
            columns = list(dict.fromkeys(column for row in rows for column in row))
            with pathlib.Path(self._csv_path).open("w", newline="") as file:
                writer = csv.DictWriter(file, columns, restval="")
                writer.writeheader()
                writer.writerows(rows)


def _flatten(entry: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted columns; sequences as JSON."""
    row: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            row |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            row[prefix + key] = json.dumps(value, default=str)
        else:
            row[prefix + key] = value
    return row
