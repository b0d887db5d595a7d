"""Block-size tables: JSON files of plans per chip and shape, each with how it was found.

A lookup takes the exact entry, else the nearest one that is still valid, else the kernel's cost
model, and says which it was. A table is data: it is checked against the kernel's schema when it is
loaded, and written so that the same entries give the same bytes.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from tpukit.chips import CHIPS
from tpukit.errors import TableError

Value = int | float | str | bool
How = Literal["measured", "predicted", "static"]
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Schema:
    """What the table of one kernel holds.

    Attributes:
      kernel: its name.
      exact: type of each key that an entry must match exactly, such as a dtype's name.
      bucketed: keys that are positive ints and may differ, such as a number of tokens.
      plan: type of each field of a plan.
    """

    kernel: str
    exact: Mapping[str, type]
    bucketed: tuple[str, ...]
    plan: Mapping[str, type]

    @property
    def key(self) -> dict[str, type]:
        """Type of each field of a key."""
        return {**self.exact, **dict.fromkeys(self.bucketed, int)}


@dataclasses.dataclass(frozen=True)
class Found:
    """How an entry was found.

    Attributes:
      how: "measured" on the chip, "predicted" from the schedule, or "static" (bundles, bytes).
      date: ISO date.
      command: what to run to find it again.
      versions: of the tools, at least jax's.
      microseconds: the time that made it win, None for "static".
    """

    how: How
    date: str
    command: str
    versions: Mapping[str, str]
    microseconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """The best known plan for one problem on one chip."""

    chip: str
    key: Mapping[str, Value]
    plan: Mapping[str, Value]
    found: Found


@dataclasses.dataclass(frozen=True)
class Resolution:
    """The plan for a problem.

    Attributes:
      value: its fields.
      source: "exact" or "nearest" entry of the table, or the cost "model".
      why: a sentence about that choice.
    """

    value: Mapping[str, Value]
    source: Literal["exact", "nearest", "model"]
    why: str


@dataclasses.dataclass(frozen=True)
class Table:
    """The checked entries of one kernel."""

    schema: Schema
    entries: tuple[Entry, ...]

    def resolve(
        self,
        chip: str,
        key: Mapping[str, Value],
        *,
        valid: Callable[[Mapping[str, Value]], bool],
        model: Callable[[], Mapping[str, Value]],
        reach: float = 2.0,
    ) -> Resolution:
        """Finds the plan for a problem.

        Args:
          chip: a name in `chips.CHIPS`.
          key: the problem, with the schema's fields.
          valid: whether a plan is legal for this very problem; no entry is used unasked.
          model: the kernel's cost model, asked last.
          reach: how far the nearest entry may be: a distance of 1 is a factor of two in one
            bucketed field.
        """
        near = [
            (self._distance(entry.key, key), index, entry)
            for index, entry in enumerate(self.entries)
            if entry.chip == chip
            and all(entry.key[name] == key[name] for name in self.schema.exact)
        ]
        refused = 0
        for distance, _, entry in sorted(near, key=lambda item: item[:2]):
            if distance > reach:
                break
            if not valid(entry.plan):
                refused += 1
                continue
            if distance == 0:
                return Resolution(entry.plan, "exact", _origin("the entry for", entry))
            return Resolution(entry.plan, "nearest", _origin("the nearest entry,", entry))
        skipped = f"; {refused} near enough are not valid here" if refused else ""
        within = f" within a factor of {2**reach:g}" if self.schema.bucketed else ""
        why = f"no entry for {chip}{within}{skipped}: the cost model"
        return Resolution(model(), "model", why)

    def _distance(self, have: Mapping[str, Value], want: Mapping[str, Value]) -> float:
        return sum(
            abs(math.log2(float(have[name]) / float(want[name]))) for name in self.schema.bucketed
        )


def load(path: Path, schema: Schema) -> Table:
    """Reads and checks a table.

    Raises:
      TableError: it is not JSON, or an entry has unknown, missing or mistyped fields, an unknown
        chip, or a twin.
    """
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise TableError(file=path.name, entry=None, what=f"not JSON: {error}") from error
    _check_fields(path.name, None, data, {"schema": int, "kernel": str, "entries": list})
    if data["schema"] != _VERSION or data["kernel"] != schema.kernel:
        what = f"schema {data['schema']} of {data['kernel']!r}; needs {_VERSION} of "
        raise TableError(file=path.name, entry=None, what=what + repr(schema.kernel))
    entries = []
    seen: dict[str, int] = {}
    for index, raw in enumerate(data["entries"]):
        entry = _entry(path.name, index, raw, schema)
        twin = seen.setdefault(_identity(entry), index)
        if twin != index:
            raise TableError(file=path.name, entry=index, what=f"same chip and key as {twin}")
        entries.append(entry)
    return Table(schema, tuple(entries))


def dump(path: Path, table: Table) -> None:
    """Writes a table: entries sorted, fields sorted, the same bytes every time.

    Raises:
      TableError: an entry does not fit the schema; nothing is written.
    """
    entries = sorted(table.entries, key=_identity)
    raw = [dataclasses.asdict(entry) for entry in entries]
    for index, fields in enumerate(raw):
        _entry(path.name, index, fields, table.schema)
    data = {"schema": _VERSION, "kernel": table.schema.kernel, "entries": raw}
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def _entry(file: str, index: int, raw: Any, schema: Schema) -> Entry:
    _check_fields(file, index, raw, {"chip": str, "key": dict, "plan": dict, "found": dict})
    _check_fields(file, index, raw["key"], schema.key)
    _check_fields(file, index, raw["plan"], schema.plan)
    if raw["chip"] not in CHIPS:
        raise TableError(file=file, entry=index, what=f"unknown chip {raw['chip']!r}")
    for name in schema.bucketed:
        if raw["key"][name] < 1:
            raise TableError(file=file, entry=index, what=f"{name} is not positive")
    found = {"microseconds": None, **raw["found"]}
    time = float if found["microseconds"] is not None else type(None)
    types = {"how": str, "date": str, "command": str, "versions": dict, "microseconds": time}
    _check_fields(file, index, found, types)
    _check_origin(file, index, found)
    return Entry(raw["chip"], raw["key"], raw["plan"], Found(**found))


def _check_origin(file: str, index: int, found: Mapping[str, Any]) -> None:
    if found["how"] not in get_args(How):
        raise TableError(file=file, entry=index, what=f"unknown origin {found['how']!r}")
    if (found["microseconds"] is None) != (found["how"] == "static"):
        what = "a time belongs to every entry that is not static, and to no other"
        raise TableError(file=file, entry=index, what=what)
    if "jax" not in found["versions"]:
        raise TableError(file=file, entry=index, what="versions do not name jax's")
    try:
        datetime.date.fromisoformat(found["date"])
    except ValueError as error:
        raise TableError(file=file, entry=index, what=str(error)) from error


def _check_fields(file: str, entry: int | None, raw: Any, types: Mapping[str, type]) -> None:
    if not isinstance(raw, dict):
        raise TableError(file=file, entry=entry, what=f"{raw!r} where an object is needed")
    for name in sorted(set(raw) ^ set(types)):
        kind = "unknown field" if name in raw else "no field"
        raise TableError(file=file, entry=entry, what=f"{kind} {name!r}")
    for name, wanted in types.items():
        # JSON's true is not a number, whatever Python says; a whole number is a fine float.
        allowed = (int, float) if wanted is float else (wanted,)
        if type(raw[name]) not in allowed:
            what = f"{name} is {raw[name]!r}; needs {wanted.__name__}"
            raise TableError(file=file, entry=entry, what=what)


def _identity(entry: Entry) -> str:
    return json.dumps([entry.chip, dict(entry.key)], sort_keys=True)


def _origin(what: str, entry: Entry) -> str:
    return f"{what} {dict(entry.key)} on {entry.chip}, {entry.found.how} on {entry.found.date}"
