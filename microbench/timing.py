"""Times a call on whatever this machine is."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall-clock times of one function, in seconds.

    Attributes:
      first: of the first call, compilation included.
      median, best, worst: of the calls after it.
      calls: how many those are.
    """

    first: float
    median: float
    best: float
    worst: float
    calls: int


def time_calls(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    budget: float = 3.0,
    least: int = 3,
    most: int = 20,
) -> Timing:
    """Calls `function(*args)` once to warm up, then until `budget` seconds are spent.

    Args:
      function: returns arrays, which are waited for.
      args: of every call; nothing may be donated.
      budget: seconds after which no further call starts, once there are `least`.
      least, most: bounds of the number of timed calls.
    """

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        return time.perf_counter() - start

    first = once()
    times: list[float] = []
    while len(times) < least or (sum(times) < budget and len(times) < most):
        times.append(once())
    return Timing(first, statistics.median(times), min(times), max(times), len(times))
