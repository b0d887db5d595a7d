"""Times a call on whatever this machine is: by the TPU's own clock, elsewhere by the wall's."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

TPU_PLANE = "/device:TPU:0"
RUNS_LINE = "XLA Modules"  # an event is one run of one compiled program


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one function, in seconds.

    Attributes:
      first: of the first call, compilation included; by the wall's clock.
      median, best, worst: of the calls after it.
      calls: how many those are.
      clock: "device" (from a profile, without what the host does) or "wall".
    """

    first: float
    median: float
    best: float
    worst: float
    calls: int
    clock: str


def time_calls(
    function: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    *,
    budget: float = 3.0,
    least: int = 3,
    most: int = 20,
) -> Timing:
    """Calls `function` once to warm up, then until `budget` seconds are spent.

    Args:
      function: returns arrays, which are waited for.
      inputs: arguments of the calls, in turn; nothing may be donated.
      budget: seconds after which no further call starts, once there are `least`.
      least, most: bounds of the number of timed calls.
    """
    turns = itertools.cycle(inputs)

    def once() -> float:
        args = next(turns)
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        return time.perf_counter() - start

    first = once()
    times: list[float] = []
    while len(times) < least or (sum(times) < budget and len(times) < most):
        times.append(once())
    on_device = _profiled(once, len(times)) if jax.default_backend() == "tpu" else []
    times = on_device or times
    clock = "device" if on_device else "wall"
    return Timing(first, statistics.median(times), min(times), max(times), len(times), clock)


def _profiled(once: Callable[[], float], calls: int) -> list[float]:
    """Seconds on the device of so many calls."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                once()
        (file,) = Path(folder).rglob("*.xplane.pb")
        return runs(ProfileData.from_file(str(file)))


def runs(profile: Any) -> list[float]:
    """Seconds of each run of a program on the first TPU of a `ProfileData`; none without one."""
    return [
        event.duration_ns * 1e-9
        for plane in profile.planes
        if plane.name == TPU_PLANE
        for line in plane.lines
        if line.name == RUNS_LINE
        for event in line.events
    ]
