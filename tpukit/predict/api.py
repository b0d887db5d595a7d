"""Predicts the time of a program on a TPU that is not there."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from tpukit import aot, chips, dumps, listing
from tpukit.errors import ListingError, ReplayError, UnsupportedError
from tpukit.predict import hlo, program, ragged
from tpukit.predict.machine import Machine, Operand
from tpukit.predict.rates import Rates, rates
from tpukit.predict.report import (
    LATENCY_BAND_US,
    GluePrediction,
    KernelPrediction,
    Prediction,
    summarise,
)
from tpukit.predict.scalars import KernelCall, kernel_calls

_CUSTOM_CALL = export.DisabledSafetyCheck.custom_call("tpu_custom_call")
_SCALAR_TYPES = ("s32", "u32", "pred", "f32")
_LARGEST_SCALAR_OPERAND = 1 << 20  # elements


def predict(
    fn: Callable[..., Any],
    *args: Any,
    chip: str,
    spans: bool = False,
    from_vectors: int | None = None,
    timeout: float = 600.0,
) -> Prediction:
    """Predicts what a program takes on one TensorCore, by replaying its final schedule.

    The program is compiled for the chip in a process of its own. Each Pallas kernel of it is
    replayed with the real values of its scalar operands; so is what XLA runs around it, as far as
    that does not depend on data. Model and constants are in `tpukit.predict.machine` and `.rates`.
    Not modelled: collectives and transfers between devices, SparseCore programs (their bytes
    count), contention between cores, launch overheads.

    Args:
      fn: a function, jitted or not.
      *args: its arguments: arrays where their values steer a kernel (lengths, page tables, group
        sizes), `jax.ShapeDtypeStruct` elsewhere.
      chip: a name in `tpukit.predict.RATES`.
      spans: keep what happened when, for a timeline.
      from_vectors: what scalars are to be that kernels read from their vectors, such as 0 for a
        flag that says that something rare has happened; None: control must not depend on them.
      timeout: seconds the compilation may take.

    Raises:
      ArgumentError, UnsupportedError: the chip is not known, or has no constants.
      KernelResourceError, KernelCompileError, ToolchainError: it does not compile.
      ListingError: the schedule holds something that is not understood.
      ReplayError: the replay cannot be right: control or sizes that depend on data, a wait that
        never ends, a transfer of absurd size, a check of the compiler's that fires.
    """
    constants = rates(chip)
    with tempfile.TemporaryDirectory() as scratch:
        folder, archive = Path(scratch), Path(scratch) / "program.bin"
        with aot.as_if_on(chip):
            shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
            jitted: Any = fn if hasattr(fn, "trace") else jax.jit(fn)
            traced = jitted.trace(*shaped)
            calls = kernel_calls(traced.jaxpr, jax.tree.leaves(args))
            donated = [leaf.donated for leaf in jax.tree.leaves(traced.args_info)]
            leaves, tree = jax.tree.flatten(shaped)  # trees of any kind, which cannot be serialised

            def flat(*leaves: Any) -> Any:
                return jax.tree.leaves(jitted(*jax.tree.unflatten(tree, leaves)))

            exported = export.export(
                jax.jit(flat), platforms=["tpu"], disabled_checks=[_CUSTOM_CALL]
            )
            archive.write_bytes(exported(*leaves).serialize())
        answer = aot.compile_and_dump(
            f"{__name__}:load_exported",
            chip,
            folder,
            timeout=timeout,
            path=str(archive),
            donated=[index for index, gone in enumerate(donated) if gone],
        )
        ops = hlo.parse(answer["hlo"])
        kernels = _kernels(folder, ops, calls, constants, spans, from_vectors)
        around = glue(folder, ops, constants)
    return Prediction(
        chip=constants.chip, kernels=tuple(kernels), glue=tuple(around), versions=answer["versions"]
    )


def load_exported(
    chip: str, path: str, donated: Sequence[int]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Reads a serialised program back: a function of flat arguments, and their shapes."""
    del chip
    exported = export.deserialize(bytearray(Path(path).read_bytes()))
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in exported.in_avals)
    return jax.jit(exported.call, donate_argnums=tuple(donated)), shapes


def _kernels(
    folder: Path,
    ops: Sequence[hlo.Op],
    calls: Sequence[KernelCall],
    constants: Rates,
    spans: bool,
    from_vectors: int | None,
) -> list[KernelPrediction]:
    found = []
    waiting = list(calls)
    for op in ops:
        if not op.kernel or op.core != "tensorcore":
            continue
        call = ragged.steered(op, calls) if ragged.is_ragged_dot(op) else take(waiting, op)
        steered = operands(op, call)
        dump = _dump_of(folder, op, ops) or op.name
        one = replay(folder, dump, steered, constants, spans=spans, from_vectors=from_vectors)
        found += [one] * op.repeats
    return found


def take(waiting: list[KernelCall], op: hlo.Op) -> KernelCall:
    """The call that became this kernel: the first of its name, or without one, that is left."""
    own = re.sub(
        r"\.\d+(\..*)?$", "", op.name
    )  # the compiler's number, the operand that it becomes
    base = re.sub(r"[^\w]", "_", own)
    base = re.sub(r"^(?:(?:transpose|jvp|vmap)_)+(\w*?)_+$", r"\1", base)  # of a transformation
    for call in waiting:
        named = re.sub(r"[^\w]", "_", call.name)
        if named in ("", base) and len(call.operands) == len(op.operands):
            waiting.remove(call)
            return call
    left = [call.name for call in waiting]
    raise ListingError(
        file="program", line=0, what=f"kernel {op.name} is none of the calls traced: {left}"
    )


def operands(op: hlo.Op, call: KernelCall) -> dict[int, Operand]:
    """Sizes of all operands; values of those that can be scalars and are known."""
    found = {}
    for index, (shape, value) in enumerate(zip(op.operands, call.operands, strict=True)):
        small = math.prod(shape.dims) <= _LARGEST_SCALAR_OPERAND
        known = value() if small and shape.dtype in _SCALAR_TYPES else None
        words = None if known is None else shape.words(np.asarray(known))
        found[index] = Operand(size=shape.size, words=words)
    for index, shape in enumerate(op.results, start=len(op.operands)):
        found[index] = Operand(size=shape.size)
    return found


def replay(
    folder: Path,
    name: str,
    operands: dict[int, Operand],
    constants: Rates,
    *,
    spans: bool = False,
    from_vectors: int | None = None,
) -> KernelPrediction:
    """Replays one kernel from the dumps in a folder.

    Args:
      folder: with the compiler's dumps.
      name: of the kernel.
      operands: size, and for scalars the value, of each operand by its number.
      constants: of the chip.
      spans: keep what happened when.
      from_vectors: as for `predict`.

    Raises:
      ListingError: a dump is not understood.
      ReplayError: the replay cannot be right.
    """
    dump = dumps.read(folder, name, chips.chip(constants.chip))
    translated = program.load(dump, from_vectors)
    machine = Machine(translated, constants, operands)
    machine.spans = [] if spans else None
    machine.run()
    report = summarise(machine, constants, dump.slots, listing.parse_kernel(dump))
    if report.roofline > 1.0:
        what = f"faster than the roofline: {report.milliseconds} < {report.floor_milliseconds} ms"
        raise ReplayError(kernel=name, address=None, what=what)
    low = high = report.milliseconds
    if report.dma_stall > 0.2:
        low, high = (_with_latency(translated, constants, operands, us) for us in LATENCY_BAND_US)
    return dataclasses.replace(report, band=(low, high))


def _with_latency(
    translated: program.Program, constants: Rates, operands: dict[int, Operand], us: float
) -> float:
    latency = dataclasses.replace(constants.latency, value=us)
    other = dataclasses.replace(constants, latency=latency)
    return Machine(translated, other, operands).run() / (constants.clock.value * 1e6)


def _dump_of(folder: Path, op: hlo.Op, ops: Sequence[hlo.Op]) -> str | None:
    """The name under which an operation was dumped: the compiler compiles equal ones only once."""

    def kind(one: hlo.Op) -> Any:
        name = re.sub(r"(\.clone|\.\d+)*$", "", one.name) if one.kernel else one.opcode
        return name, one.core, one.results, one.operands

    equal = [op, *(other for other in ops if kind(other) == kind(op))]
    return next((one.name for one in equal if dumps.exists(folder, one.name)), None)


def glue(folder: Path, ops: Sequence[hlo.Op], constants: Rates) -> list[GluePrediction]:
    """What XLA runs around the kernels."""
    constants = dataclasses.replace(constants, bandwidth=constants.xla_bandwidth)
    found = []
    done: dict[str, float | None] = {}
    for op in ops:
        if op.kernel and op.core == "tensorcore":
            continue
        dump = _dump_of(folder, op, ops) if op.core == "tensorcore" else None
        if dump is not None and dump not in done:
            done[dump] = _replayedglue(folder, dump, op, constants)
        milliseconds, how = done.get(dump) if dump else None, "replayed"
        if milliseconds is None:
            milliseconds, how = _estimatedglue(op, constants)
        milliseconds *= op.repeats
        found.append(GluePrediction(op.name, op.opcode, op.core, milliseconds, how, op.source))
    return found


def _replayedglue(folder: Path, dump: str, op: hlo.Op, constants: Rates) -> float | None:
    """Milliseconds of one of XLA's operations; None where its course depends on data."""
    sizes = [shape.size for shape in (*op.operands, *op.results)]
    operands = {index: Operand(size=max(size, 512)) for index, size in enumerate(sizes)}
    try:
        translated = program.load(dumps.read(folder, dump, chips.chip(constants.chip)))
        return Machine(translated, constants, operands).run() / (constants.clock.value * 1e6)
    except (ListingError, ReplayError, UnsupportedError):
        return None


def _estimatedglue(op: hlo.Op, constants: Rates) -> tuple[float, str]:
    """Milliseconds without a replay, and by whose estimate."""
    if op.estimate is not None and op.core == "tensorcore":
        return op.estimate / (constants.clock.value * 1e6), "compiler"
    return op.hbm_bytes / (constants.bandwidth.value * 1e6), "bytes"
