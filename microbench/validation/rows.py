"""Published times with the exact call they belong to: `published.csv`."""

from __future__ import annotations

import csv
import dataclasses
import json
from importlib import resources
from typing import Any

from tpukit.errors import TableError

_COLUMNS = ("id", "use", "kernel", "chip", "milliseconds", "args", "config", "source")
_FILE = "published.csv"


@dataclasses.dataclass(frozen=True)
class Row:
    """One published time.

    Attributes:
      id: its name.
      use: "fit" if a constant of the model may be fitted on it; "test" if it may only be compared.
      kernel: what ran: "grouped_matmul", "flash_attention", "xla_matmul" or "hbm_copy".
      chip: what it ran on; one TensorCore of it.
      milliseconds: device time of the whole jitted call, the median as published.
      args: shapes and options of the call.
      config: block sizes.
      source: who published it and where.
    """

    id: str
    use: str
    kernel: str
    chip: str
    milliseconds: float
    args: dict[str, Any]
    config: dict[str, Any]
    source: str

    @property
    def shape(self) -> str:
        """Everything but the block sizes; rows that share it are choices for one call."""
        return json.dumps([self.kernel, self.chip, self.args], sort_keys=True)


def load() -> list[Row]:
    """Reads all rows.

    Raises:
      TableError: the file is not what this library expects.
    """
    text = resources.files("microbench.validation").joinpath(_FILE).read_text()
    reader = csv.DictReader(text.splitlines())
    if tuple(reader.fieldnames or ()) != _COLUMNS:
        raise TableError(file=_FILE, entry=None, what=f"has columns {reader.fieldnames}")
    rows = []
    for entry in reader:
        if entry["use"] not in ("fit", "test"):
            raise TableError(file=_FILE, entry=len(rows), what=f"has use {entry['use']!r}")
        rows.append(
            Row(
                id=entry["id"],
                use=entry["use"],
                kernel=entry["kernel"],
                chip=entry["chip"],
                milliseconds=float(entry["milliseconds"]),
                args=json.loads(entry["args"]),
                config=json.loads(entry["config"]),
                source=entry["source"],
            )
        )
    return rows
