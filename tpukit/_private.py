"""Every private JAX API that this library touches, in one place, with a test of what it relies on.

The first half belongs to the TPU interpreter, which offers no public way to watch a run; the second
to traced kernels, whose refs, indexers and pipelines have no public form.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jax._src import core, source_info_util
from jax._src.pallas.mosaic import pipeline
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic.interpret import shared_memory
from jax._src.state import indexing, types

__all__ = [
    "BitcastTransform",
    "NDIndexer",
    "TransformedRef",
    "clock",
    "interpreter",
    "pipeline_jaxpr",
    "self_test",
    "shared_memory",
    "where",
]

NDIndexer = indexing.NDIndexer
BitcastTransform, TransformedRef = types.BitcastTransform, types.TransformedRef

_INTERPRETER = (
    (interpreter, "DMA", None),
    (interpreter, "DmaState", None),
    (interpreter, "_clear_shared_memory", ()),
    (interpreter, "_update_clocks_for_global_barrier", ()),
    (interpreter, "reset_tpu_interpret_mode_state", ()),
    (shared_memory.Semaphore, "wait", ("self", "value", "global_core_id")),
    (shared_memory.SharedMemory, "set_failed", ("self", "exception")),
    (shared_memory.SharedMemory, "get_sempahores_with_nonzero_count", ("self", "device_id")),
)
_TRACED = (
    (pipeline, "emit_pipeline_to_jaxpr", ("avals_in", "grid_mapping", "grid_names", "grid_sizes")),
)


def self_test(*, traced: bool = False) -> list[str]:
    """Says what has moved since the JAX this was written for; empty where nothing has.

    Args:
      traced: of traced kernels, else of the interpreter.
    """
    moved = []
    for owner, name, parameters in _TRACED if traced else _INTERPRETER:
        found = getattr(owner, name, None)
        label = f"{owner.__name__}.{name}"
        if found is None:
            moved.append(f"{label} is gone")
        elif parameters is not None:
            names = tuple(inspect.signature(found).parameters)[: len(parameters)]
            if names != parameters:
                moved.append(f"{label} takes {names}, expected {parameters}")
    return moved


def clock(dma: Any) -> Any:
    """What the core that started a DMA knew of every core's clock; None where races are not sought.

    Before JAX 0.12 it is the array itself.
    """
    return getattr(dma.clock, "clock", dma.clock)


def where(source_info: object) -> str:
    """The user's source line of an operation, "" where it is not known."""
    if not isinstance(source_info, source_info_util.SourceInfo):
        return ""
    return source_info_util.summarize(source_info)


def pipeline_jaxpr(eqn: Any, axes: Mapping[str, int]) -> Any:
    """What an `emit_pipeline` in a traced kernel does: its loops, buffers and transfers, traced."""
    avals = [atom.aval for atom in eqn.invars]
    with core.extend_axis_env_nd(list(axes.items())):
        return pipeline.emit_pipeline_to_jaxpr(
            avals, grid_names=tuple(axes), grid_sizes=tuple(axes.values()), **eqn.params
        )
