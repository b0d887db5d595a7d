"""A module per kernel, each of which is a `microbench.case.Suite`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import cast

from microbench.case import Suite


def kernels() -> tuple[str, ...]:
    """Names of the kernels that have cases. Imports none of them."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def load(kernel: str) -> Suite:
    """The suite of one kernel, one of `kernels()`."""
    return cast(Suite, importlib.import_module(f"{__name__}.{kernel}"))
