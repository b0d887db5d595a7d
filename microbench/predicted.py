"""Predicted figures: what `microbench predict` shows, records and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from microbench.case import Case
from microbench.cli import Options
from tpukit.predict import Prediction, timeline


def figures(prediction: Prediction) -> dict[str, Any]:
    """One row about a predicted case; its kernels added up, the rest of the longest one."""
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


def save(prediction: Prediction, case: Case, options: Options) -> None:
    """Writes the timeline and the picture where the options ask for them."""
    name = f"{case.kernel}-{case.name.replace('/', '-')}-{prediction.chip}"
    if options.trace:
        timeline.write_trace(prediction, _folder(options.trace) / f"{name}.json")
    if options.picture:
        timeline.draw(prediction, _folder(options.picture) / f"{name}.png")


def _folder(path: str) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
