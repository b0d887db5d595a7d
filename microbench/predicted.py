"""Predicted figures: what `microbench predict` shows, records and draws."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from microbench.case import Call, Case, Suite
from microbench.cli import Options
from tpukit.predict import MeshPrediction, Prediction, predict, predict_mesh, timeline

NOTHING_RARE = 0  # what this library's kernels read from vectors: whether something rare is so


def case(
    suite: Suite, case: Case, chip: str, options: Options
) -> Prediction | MeshPrediction | None:
    """Predicts a case: on one device, or on all of the mesh that it has the devices for.

    None where its schedules cannot be replayed.
    """
    spans = bool(options.trace)
    if int(case.params.get("devices", 1)) == 1:  # pyright: ignore[reportArgumentType]
        steered = suite.steered(case, options.seed)
        return (
            None if steered is None else call(steered, chip, spans=spans, from_vectors=NOTHING_RARE)
        )
    target, arguments = suite.aot_target(case)
    arguments["seed"] = options.seed
    wraps = bool(case.params.get("wraps", False))
    more: dict[str, Any] = {"wraps": wraps, "from_vectors": NOTHING_RARE}
    return predict_mesh(target, chip, arguments, spans=(0,) if spans else (), **more)


def call(
    steered: Call, chip: str, *, spans: bool = False, from_vectors: int | None = None
) -> Prediction:
    """Predicts a call on one device."""
    fn, args = steered
    return predict(fn, *args, chip=chip, spans=spans, from_vectors=from_vectors)


def figures(prediction: Prediction | MeshPrediction) -> dict[str, Any]:
    """One row about a predicted case.

    Of several kernels the sums, and the rest of the longest one; of several devices the last one.
    """
    if isinstance(prediction, MeshPrediction):
        return mesh_figures(prediction)
    longest = max(prediction.kernels, key=lambda kernel: kernel.cycles)
    return {
        "predicted us": prediction.milliseconds * 1e3,
        "kernel us": prediction.kernel_milliseconds * 1e3,
        "floor us": sum(kernel.floor_milliseconds for kernel in prediction.kernels) * 1e3,
        "of floor %": 100 * longest.roofline,
        "bound by": longest.binds,
        "MXU %": 100 * longest.use["mxu"],
        "HBM %": 100 * longest.use["hbm"],
        "VALU %": 100 * longest.use["valu"],
        "DMA wait %": 100 * longest.dma_stall,
        "HBM MB": sum(kernel.hbm_bytes for kernel in prediction.kernels) / 1e6,
        "latency band us": f"{longest.band[0] * 1e3:.1f} to {longest.band[1] * 1e3:.1f}",
    }


def mesh_figures(prediction: MeshPrediction) -> dict[str, Any]:
    """The same for a mesh, and what its links do."""
    last = max(prediction.kernels, key=lambda kernel: kernel.cycles)
    return {
        "predicted us": prediction.milliseconds * 1e3,
        "kernel us": prediction.kernel_milliseconds * 1e3,
        "floor us": max(last.floor_milliseconds, prediction.links_milliseconds) * 1e3,
        "of floor %": 100 * prediction.roofline,
        "bound by": prediction.binds,
        "MXU %": 100 * last.use["mxu"],
        "HBM %": 100 * last.use["hbm"],
        "VALU %": 100 * last.use["valu"],
        "DMA wait %": 100 * last.dma_stall,
        "HBM MB": last.hbm_bytes / 1e6,
        "link us": prediction.links_milliseconds * 1e3,
        "hidden %": 100 * prediction.hidden,
        "sent MB": last.moved.get("to other devices", 0) / 1e6,
    }


def save(prediction: Prediction | MeshPrediction, case: Case, options: Options) -> None:
    """Writes the timeline and the picture where the options ask for them."""
    if isinstance(prediction, MeshPrediction):  # of one device there is a timeline
        shown = tuple(kernel for kernel in prediction.kernels if kernel.spans)
        prediction = dataclasses.replace(prediction, kernels=shown or prediction.kernels[:1])
    name = f"{case.kernel}-{case.name.replace('/', '-')}-{prediction.chip}"
    if options.trace:
        timeline.write_trace(prediction, _folder(options.trace) / f"{name}.json")
    if options.picture:
        timeline.draw(prediction, _folder(options.picture) / f"{name}.png")


def _folder(path: str) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
