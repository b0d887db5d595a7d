"""Aligned plain-text tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def show(value: Any) -> str:
    """A value as a table shows it: three significant digits for fractions, - for what is absent."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows under `columns`, or all that occur; numbers to the right, text to the left."""
    columns = columns or list(dict.fromkeys(column for row in rows for column in row))
    cells = [[show(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [all(_is_number(row.get(column)) for row in rows) for column in columns]

    def line(parts: Sequence[str]) -> str:
        aligned = [
            part.rjust(width) if right else part.ljust(width)
            for part, width, right in zip(parts, widths, numeric, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, cells)])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | None) and not isinstance(value, bool)
