"""A predicted run to look at: a trace for Perfetto, and a page of where the cycles go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tpukit.errors import ArgumentError
from tpukit.predict.mesh import MeshPrediction
from tpukit.predict.report import KernelPrediction, Prediction

_TRACKS = ("issue", "matrix units", "waits", "hbm_to_vmem", "vmem_to_hbm")


def trace_events(prediction: Prediction | MeshPrediction) -> dict[str, Any]:
    """The run as a Chrome trace: one process a kernel, one track each for issue, waits and DMAs.

    Times are in microseconds from the start of the first kernel. A span of the track `issue` is
    named by the address of its first bundle; matrix units are busy somewhere within their spans.

    Args:
      prediction: made with `spans=True`.

    Returns:
      An object for `json.dump`; chrome://tracing and ui.perfetto.dev open it.

    Raises:
      ArgumentError: the prediction has no spans.
    """
    events: list[dict[str, Any]] = []
    begin = 0.0
    for process, kernel in enumerate(prediction.kernels):
        if not kernel.spans:
            raise ArgumentError(
                where="trace_events",
                argument="prediction",
                got="has no spans",
                expected="a prediction made with spans=True",
            )
        name = f"{kernel.name} (predicted, {kernel.chip})"
        events.append(_name("process_name", process, 0, name))
        tracks = [*_TRACKS, *sorted({s.what for s in kernel.spans} - set(_TRACKS))]
        events += [_name("thread_name", process, i, track) for i, track in enumerate(tracks)]
        per_us = kernel.cycles / (kernel.milliseconds * 1e3)
        for span in kernel.spans:
            events.append(
                {
                    "name": span.detail or span.what,
                    "ph": "X",
                    "pid": process,
                    "tid": tracks.index(span.what),
                    "ts": begin + span.start / per_us,
                    "dur": (span.end - span.start) / per_us,
                }
            )
        begin += kernel.milliseconds * 1e3
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def write_trace(prediction: Prediction | MeshPrediction, path: Path) -> None:
    """Writes `trace_events` to a file.

    Raises:
      ArgumentError: the prediction has no spans.
    """
    path.write_text(json.dumps(trace_events(prediction)))


def draw(prediction: Prediction | MeshPrediction, path: Path) -> None:
    """Draws one page per kernel side by side: cycles by loop, stalls by place, use of the units.

    Needs matplotlib.
    """
    import matplotlib.figure  # noqa: PLC0415  (an optional dependency)

    count = max(1, len(prediction.kernels))
    figure = matplotlib.figure.Figure(figsize=(9.0, 7.5 * count), layout="constrained")
    for axes, kernel in zip(
        figure.subplots(3 * count, 1, squeeze=False).reshape(count, 3),
        prediction.kernels,
        strict=False,
    ):
        _page(axes, kernel)
    figure.savefig(path, dpi=110)


def _page(axes: Any, kernel: KernelPrediction) -> None:
    loops, stalls, units = axes
    total = kernel.cycles
    loops.set_title(
        f"{kernel.name} on {kernel.chip}: predicted {kernel.milliseconds * 1e3:.1f} us, "
        f"{kernel.roofline:.0%} of the roofline, bound by {kernel.binds}"
    )
    shown = kernel.loops[:8]
    labels = [f"loop {x.path} at {x.start:#x}" if x.path else "outside loops" for x in shown]
    issued = [x.issued / total for x in shown]
    loops.barh(labels, issued, color="#3b6fb6", label="bundles")
    stalled = [x.stalled / total for x in shown]
    loops.barh(labels, stalled, left=issued, color="#d9822b", label="stalls")
    loops.legend(loc="lower right")
    places = kernel.stalls[:8]
    stalls.barh(
        [f"{x.cause} at {x.address:#x}" for x in places],
        [x.cycles / total for x in places],
        color="#d9822b",
    )
    units.barh(list(kernel.use), list(kernel.use.values()), color="#5a9e6f")
    units.set_xlim(0, 1)
    for axis, label in zip(axes, ("of all cycles", "of all cycles", "of capacity"), strict=True):
        axis.invert_yaxis()
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.set_xlabel(label)
