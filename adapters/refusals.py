"""The errors of the adapters."""

from __future__ import annotations

from typing import Any, NoReturn

from tpukit.errors import ArgumentError


def refuse(where: str, argument: str, got: str, expected: str, advice: str = "") -> NoReturn:
    """Raises an `ArgumentError`."""
    raise ArgumentError(where=where, argument=argument, got=got, expected=expected, advice=advice)


def refuse_given(where: str, advice: str = "", **arguments: Any) -> None:
    """Raises an `ArgumentError` for the first of the arguments that is not None.

    Raises:
      ArgumentError: one is given.
    """
    for name, value in arguments.items():
        if value is not None:
            refuse(where, name, "is given", "None", advice)


def refuse_debugging(where: str, debug_mode: bool) -> None:
    """Raises an `ArgumentError` for a mode that computes nothing.

    Raises:
      ArgumentError: it is asked for.
    """
    if debug_mode:
        advice = "There is no mode without results; interpret the kernel instead."
        refuse(where, "debug_mode", "is True", "False", advice)
