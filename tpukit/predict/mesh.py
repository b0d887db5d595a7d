"""Predicts the time of a program on the devices of a mesh that is not there."""

from __future__ import annotations

import dataclasses
import importlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tpukit import aot, chips, dumps, errors, listing
from tpukit.predict import api, hlo, program
from tpukit.predict.cluster import Cluster
from tpukit.predict.links import Links, grid_of, link_rates
from tpukit.predict.machine import Operand
from tpukit.predict.rates import Rates, rates
from tpukit.predict.report import GluePrediction, KernelPrediction, kernel_lines, summarise
from tpukit.predict.scalars import kernel_calls


@dataclasses.dataclass(frozen=True)
class MeshPrediction:
    """A predicted run of a program on the devices of a mesh, one kernel of which sends messages.

    Attributes:
      chip, wraps: what it was predicted for.
      kernels: that kernel on each device.
      others: the kernels that send none, each on the device where it takes longest.
      glue: what XLA runs beside it, the same on all devices.
      links_milliseconds: how long the busiest link carries messages.
      alone_milliseconds: the kernel's time if messages took no time.
      temp_bytes, argument_bytes, output_bytes: of HBM of a device.
      hlo: the optimised program.
      versions: of jax and libtpu.
    """

    chip: str
    wraps: bool
    kernels: tuple[KernelPrediction, ...]
    others: tuple[KernelPrediction, ...]
    glue: tuple[GluePrediction, ...]
    links_milliseconds: float
    alone_milliseconds: float
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    hlo: str = dataclasses.field(repr=False)
    versions: Mapping[str, str]

    @property
    def kernel_milliseconds(self) -> float:
        """Of the kernel that sends messages, until the last device is done."""
        return max(kernel.milliseconds for kernel in self.kernels)

    @property
    def glue_milliseconds(self) -> float:
        """Of what XLA runs beside the kernels."""
        return sum(op.milliseconds for op in self.glue)

    @property
    def milliseconds(self) -> float:
        """Of the whole program."""
        others = sum(kernel.milliseconds for kernel in self.others)
        return self.kernel_milliseconds + others + self.glue_milliseconds

    @property
    def roofline(self) -> float:
        """Fraction of the roofline reached: of HBM, matrix units or links, by what binds."""
        floor = max(max(x.floor_milliseconds for x in self.kernels), self.links_milliseconds)
        return floor / self.milliseconds

    @property
    def binds(self) -> str:
        """What the time is spent on: "links", or what binds the last device."""
        if self.links_milliseconds >= 0.75 * self.kernel_milliseconds:
            return "links"
        return max(self.kernels, key=lambda kernel: kernel.cycles).binds

    def text(self) -> str:
        """A paragraph about the mesh, and the report of the device that is done last."""
        last = max(self.kernels, key=lambda kernel: kernel.cycles)
        return "\n".join([str(self), *kernel_lines(last)])

    @property
    def hidden(self) -> float:
        """Share of the links' time that passes while devices compute."""
        if not self.links_milliseconds:
            return 1.0
        shown = self.kernel_milliseconds - self.alone_milliseconds
        return 1 - min(max(shown / self.links_milliseconds, 0.0), 1.0)

    def __str__(self) -> str:
        slowest = max(self.kernels, key=lambda kernel: kernel.milliseconds)
        sent = max(kernel.moved.get("to other devices", 0) for kernel in self.kernels)
        return (
            f"predicted {self.milliseconds:.3f} ms on {len(self.kernels)} devices of {self.chip} "
            f"({'torus' if self.wraps else 'mesh'}): kernel {self.kernel_milliseconds:.3f}, "
            f"around it {self.glue_milliseconds:.3f}; without links "
            f"{self.alone_milliseconds:.3f}, busiest link {self.links_milliseconds:.3f}, "
            f"{self.hidden:.0%} hidden; sent at most {sent / 1e6:.1f} MB by a device; slowest "
            f"device: HBM {slowest.use['hbm']:.0%}, MXU {slowest.use['mxu']:.0%}, "
            f"bundles {slowest.bundles / slowest.cycles:.0%} of {slowest.cycles} cycles"
        )


def predict_mesh(
    target: str,
    chip: str,
    arguments: Mapping[str, Any],
    *,
    wraps: bool = False,
    spans: Sequence[int] = (),
    from_vectors: int | None = None,
    timeout: float = 600.0,
) -> MeshPrediction:
    """Predicts a program that runs a kernel that sends messages on every device of a mesh.

    All devices replay the kernel's final schedule together, each with its own scalars; messages
    between them share the links of `tpukit.predict.links`. Kernels that send none are replayed for
    the devices whose scalars differ. Collectives of XLA's are among the `glue` with the time that
    their bytes take in HBM, which is no prediction.

    Args:
      target: "package.module:function", as for `aot.static_report`; the function returns
        `(fn, args, options)` whose options have `mesh_axes`. Arguments whose values steer the
        kernel are arrays, whole ones; the others are shapes.
      chip: a name in `tpukit.predict.links.LINK_RATES`.
      arguments: plain values for the function.
      wraps: whether the ends of dimensions longer than two are linked.
      spans: the devices for which to keep what happened when.
      from_vectors: as for `predict`.
      timeout: seconds the compilation may take.

    Raises:
      ArgumentError, UnsupportedError: no such chip, constants that are not known, not one kernel
        that sends messages.
      KernelResourceError, KernelCompileError, ToolchainError, ListingError, ReplayError: as
        `predict` does.
    """
    constants, links = rates(chip), link_rates(chip)
    fn, args, options = _built(target, chip, arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        answer = aot.compile_and_dump(target, chip, folder, timeout=timeout, **arguments)
        ops = hlo.parse(answer["hlo"])
        talker = _talker(target, ops)
        steered = _operands_of_devices(ops, fn, args, chip, options)
        operands = steered.pop(talker.name)
        dump = dumps.read(folder, talker.name, chips.chip(chip))
        others = tuple(
            _slowest(folder, name, found, constants, from_vectors)
            for name, found in steered.items()
        )
        glue = api.glue(folder, ops, constants)
    with aot.as_if_on(chip):
        grid = grid_of(aot.devices(chip, options.get("topology"))[: len(operands)], wraps)
    translated = program.load(dump, from_vectors)

    def replay(speed: float, spans: Sequence[int]) -> Cluster:
        network = Links(grid, links, constants.clock.value, speed)
        cluster = Cluster(translated, constants, operands, network, spans)
        cluster.run()
        return cluster

    cluster, alone = replay(1.0, spans), replay(1e6, ())
    parsed = listing.parse_kernel(dump)
    reports = [summarise(one, constants, dump.slots, parsed) for one in cluster.members]
    per_ms = constants.clock.value * 1e6
    return MeshPrediction(
        chip=constants.chip,
        wraps=wraps,
        kernels=tuple(reports),
        others=others,
        glue=tuple(glue),
        links_milliseconds=max(cluster.links.busy.values(), default=0.0) / per_ms,
        alone_milliseconds=max(one.now for one in alone.members) / per_ms,
        temp_bytes=answer["temp_bytes"],
        argument_bytes=answer["argument_bytes"],
        output_bytes=answer["output_bytes"],
        hlo=answer["hlo"],
        versions=answer["versions"],
    )


def _built(target: str, chip: str, arguments: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """What the target function returns."""
    module, _, name = target.partition(":")
    with aot.as_if_on(chip):
        fn, args, *rest = getattr(importlib.import_module(module), name)(chip=chip, **arguments)
    options = dict(rest[0]) if rest else {}
    if "mesh_axes" not in options:
        raise errors.ArgumentError(
            where="predict_mesh",
            argument="target",
            got=f"is {target!r}, whose options are {sorted(options)}",
            expected="options with mesh_axes",
        )
    return fn, args, options


def _kernels(ops: Sequence[hlo.Op]) -> list[hlo.Op]:
    """The kernels on the TensorCore."""
    return [op for op in ops if op.kernel and op.core == "tensorcore"]


def _talker(target: str, ops: Sequence[hlo.Op]) -> hlo.Op:
    """The kernel that sends messages, or the only one.

    Raises:
      ArgumentError: there is none, or more than one.
    """
    kernels = _kernels(ops)
    found = kernels if len(kernels) == 1 else [op for op in kernels if op.messages]
    if len(found) != 1:
        raise errors.ArgumentError(
            where="predict_mesh",
            argument="target",
            got=f"is {target!r}, {len(found)} of whose {len(kernels)} kernels send messages",
            expected="a program with one such kernel",
        )
    return found[0]


def _operands_of_devices(
    ops: Sequence[hlo.Op], fn: Any, args: Any, chip: str, options: dict[str, Any]
) -> dict[str, list[dict[int, Operand]]]:
    """Sizes of each kernel's operands, and values of scalars, on each device."""
    traced = aot.traced_for(fn, args, chip, options)
    leaves = jax.tree.leaves(args)
    found: dict[str, list[dict[int, Operand]]] = {op.name: [] for op in _kernels(ops)}
    for place in _places(options["mesh_axes"]):
        calls = kernel_calls(traced.jaxpr, leaves, place)
        for op in _kernels(ops):
            found[op.name].append(api.operands(op, api.take(calls, op)))
    return found


def _slowest(
    folder: Path,
    name: str,
    operands: Sequence[dict[int, Operand]],
    constants: Rates,
    from_vectors: int | None,
) -> KernelPrediction:
    """A kernel that sends nothing, where it takes longest; equal devices are replayed once."""
    different = {
        tuple(None if one.words is None else one.words.tobytes() for one in device.values()): device
        for device in operands
    }
    found = (
        api.replay(folder, name, device, constants, from_vectors=from_vectors)
        for device in different.values()
    )
    return max(found, key=lambda kernel: kernel.cycles)


def _places(axes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The index along each axis of every device, in order."""
    for number in range(math.prod(axes.values())):
        index = np.unravel_index(number, tuple(axes.values()))
        yield dict(zip(axes, map(int, index), strict=True))
