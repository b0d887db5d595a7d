"""pytest: the fixture `strict_interpret`, for this library's tests and for those of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def strict_interpret() -> Iterator[Callable[..., Any]]:
    """`tpukit.interpret.strict`; a kernel that failed does not disturb the next test."""
    from tpukit import interpret  # noqa: PLC0415  (a plugin must not import JAX for every project)

    yield interpret.strict
    interpret.reset()
