"""A module per kernel, each of which is a `microbench.case.Suite`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import cast

from microbench.case import Suite


def kernels() -> tuple[str, ...]:
    """Names of the kernels that have cases. Imports none of them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(kernel: str) -> Suite:
    """The suite of one kernel, one of `kernels()`."""
    return cast(Suite, importlib.import_module(f"{__name__}.{kernel}"))
