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


def refuse_modes(
    where: str, debug_mode: bool, *, skip_kv_mask: bool = False, causal: bool = False
) -> None:
    """Raises an `ArgumentError` for a mode that computes nothing, or that contradicts another.

    Raises:
      ArgumentError: one is asked for.
    """
    if debug_mode:
        advice = "There is no mode without results; interpret the kernel instead."
        refuse(where, "debug_mode", "is True", "False", advice)
    if skip_kv_mask and causal:
        refuse(where, "skip_kv_mask", "is True", "False with a causal mask")
