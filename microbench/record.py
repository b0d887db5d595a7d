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


def record(
    kind: str, case: Case, values: Mapping[str, Any], *, label: str, command: str, **context: Any
) -> Record:
    """A figure with everything that is needed to obtain it again.

    Args:
      kind: "check", "time" or "aot".
      case: what was run.
      values: the figures.
      label: what the figures are, such as "cpu reference, measured" or "static".
      command: the command that repeats them.
      context: chip, plan, seed and the like.
    """
    return {
        "kind": kind,
        "kernel": case.kernel,
        "case": case.name,
        "params": dict(case.params),
        "label": label,
        **context,
        "values": dict(values),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
    }


class Log:
    """Collects records and keeps files of them.

    The JSON lines are written as they come, so that an interrupted run leaves what it had. A CSV
    file needs all the columns first, so it is written by `close`.
    """

    def __init__(self, json_path: str | None = None, csv_path: str | None = None) -> None:
        self.records: list[Record] = []
        self._json = open(json_path, "w") if json_path else None  # noqa: SIM115  (closed by close)
        self._csv_path = csv_path

    def add(self, entry: Record) -> None:
        """Keeps one record."""
        self.records.append(entry)
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
