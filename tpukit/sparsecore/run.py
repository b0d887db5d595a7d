"""Runs a kernel on all cores of its meshes, and what it takes around that."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tpukit import _private, chips, versions
from tpukit.errors import UnsupportedError
from tpukit.sparsecore import values
from tpukit.sparsecore.core import Core, Counts, Machine, Steps, Wait
from tpukit.sparsecore.faults import (
    DeadlockError,
    MemoryFullError,
    NotAwaitedError,
    SimulationError,
    UnmodelledError,
    UnwrittenError,
)
from tpukit.sparsecore.memory import Buffer, Region, garbage
from tpukit.sparsecore.program import Program
from tpukit.sparsecore.transfers import Semaphore, Timing, Transfers

KERNEL = "mpmd_map"


@dataclasses.dataclass(frozen=True)
class KernelRun:
    """What a kernel did.

    Attributes:
      name: of the kernel.
      cores: what each core moved, by its name.
      vmem_bytes: the most that one subcore had allocated.
    """

    name: str
    cores: Mapping[str, Counts]
    vmem_bytes: int

    def total(self, what: str) -> int:
        """The sum of a count over all cores."""
        return sum(getattr(counts, what) for counts in self.cores.values())


class Run(Machine):
    """One kernel on its cores."""

    def __init__(self, eqn: Any, chip: chips.Chip, timing: Timing, seed: int) -> None:
        self._params = eqn.params
        self._chip = chip
        self.draw = random.Random(seed)
        self.transfers = Transfers(timing, self.draw)
        self._semaphores: list[Semaphore] = []
        self._used: dict[int, int] = {}
        self._most = 0
        self._cores: list[tuple[Core, Any]] = []
        self._scratch: dict[tuple[int, int], Buffer] = {}
        self._foreign: dict[int, int] = {}
        self._barriers: dict[int, list[Core]] = {}
        self._passed: dict[int, int] = {}
        self._pipelines: dict[int, Any] = {}
        self._looked_up: dict[int, Program] = {}
        places = [
            (mesh, dict(zip(mesh.shape, at, strict=True)))
            for mesh in self._params["meshes"]
            for at in itertools.product(*map(range, mesh.shape.values()))
        ]
        for number, (mesh, place) in enumerate(places):
            self._cores.append((Core(self, number, place, len(places)), mesh))

    def __call__(self, arrays: Sequence[np.ndarray]) -> tuple[list[np.ndarray], KernelRun]:
        """Runs it; returns outputs and counts."""
        aliases = {out: at for at, out in dict(self._params["input_output_aliases"]).items()}
        inputs = [Buffer(f"input {n}", "hbm", np.array(x)) for n, x in enumerate(arrays)]
        outputs = []
        for n, aval in enumerate(self._params["out_avals"]):
            if n in aliases:
                buffer = Buffer(f"output {n}", "hbm", inputs[aliases[n]].data, shared=True)
                inputs[aliases[n]] = buffer
            else:
                buffer = Buffer(f"output {n}", "hbm", garbage(aval.shape, aval.dtype), shared=True)
                buffer.written = np.zeros(aval.shape, bool)
            outputs.append(buffer)
        programs = []
        for (core, mesh), jaxpr in self._programs():
            given = [*inputs, *outputs]
            scratch = jaxpr.invars[len(given) :]
            owned = [self._scratch_of(core, mesh, n, var.aval) for n, var in enumerate(scratch)]
            programs.append((core, core.run(jaxpr, (), [*given, *owned])))
        with np.errstate(all="ignore"):
            self._schedule(programs)
        self._check_end(outputs)
        counts = {core.name: core.counts for core, _ in self._cores}
        name = str(self._params["name"])
        return [b.data for b in outputs], KernelRun(name, counts, self._most)

    def _programs(self) -> list[tuple[tuple[Core, Any], Any]]:
        jaxprs = self._params["jaxprs"]
        meshes = list(self._params["meshes"])
        return [((core, mesh), jaxprs[meshes.index(mesh)]) for core, mesh in self._cores]

    def _schedule(self, programs: list[tuple[Core, Steps]]) -> None:
        """Lets cores run, in any order, each until it has to wait."""
        left: dict[int, tuple[Core, Steps, Wait | None]] = {
            core.number: (core, steps, None) for core, steps in programs
        }
        while left:
            ready = [n for n, (_, _, wait) in left.items() if wait is None or wait.ready()]
            if not ready:
                told = [f"{core.name} {wait.what}" for core, _, wait in left.values() if wait]
                more = f", and {len(told) - 4} more" if len(told) > 4 else ""
                raise DeadlockError("; ".join(told[:4]) + more)
            number = self.draw.choice(ready)
            core, steps, _ = left[number]
            try:
                left[number] = (core, steps, next(steps))
            except StopIteration:
                del left[number]

    def _check_end(self, outputs: Sequence[Buffer]) -> None:
        for core, _ in self._cores:
            for push in core.pushes:
                raise NotAwaitedError(f"nobody awaited that it was written: {push}")
        for semaphore in self._semaphores:
            for transfer in (*semaphore.waiting, *semaphore.done):
                raise NotAwaitedError(f"nobody awaited {transfer}")
            if semaphore.count:
                raise NotAwaitedError(f"{semaphore.name} is {semaphore.count} at the end, not 0")
        for buffer in outputs:
            if buffer.written is not None and not buffer.written.all():
                first = tuple(int(i) for i in np.argwhere(~buffer.written)[0])
                count = int((~buffer.written).sum())
                raise UnwrittenError(f"{buffer.name}: {count} elements, the first at {first}")

    # What cores ask for.

    def allocate(self, core: Core, aval: Any, name: str) -> Buffer:
        """Fresh memory, full of garbage."""
        space = space_name(aval)
        inner = aval.inner_aval
        if space == "semaphore":
            made = np.empty(inner.shape, object)
            for at in np.ndindex(inner.shape):
                semaphore = Semaphore(f"{name}{list(at) if at else ''}", len(self._cores))
                made[at] = semaphore
                self._semaphores.append(semaphore)
            return Buffer(name, space, made)
        data = garbage(inner.shape, inner.dtype)
        if space == "vmem":
            self._used[core.number] = self._used.get(core.number, 0) + data.nbytes
            self._most = max(self._most, self._used[core.number])
            limit = self._chip.sparse.vmem_bytes if self._chip.sparse else 0
            if self._used[core.number] > limit:
                what = f"{self._used[core.number]} bytes of VMEM, of which it has {limit}"
                raise MemoryFullError(f"needs {what}", core=core.name)
        return Buffer(name, space, data, shared=space == "shared")

    def free(self, core: Core, buffer: Buffer) -> None:
        """Memory goes back when its scope ends, with nothing in flight."""
        if buffer.flights:
            raise NotAwaitedError(f"its scope ends while {buffer.flights[0][1]} is in flight")
        if buffer.space == "vmem":
            self._used[core.number] -= buffer.data.nbytes
        for semaphore in buffer.data.flat if buffer.space == "semaphore" else ():
            if semaphore.count or semaphore.waiting:
                raise NotAwaitedError(f"{semaphore.name} is not 0 where its scope ends")

    def _scratch_of(self, core: Core, mesh: Any, number: int, aval: Any) -> Buffer:
        """Scratch of a kernel: per core, or per SparseCore; empty where it is another mesh's."""
        owner = getattr(aval.memory_space, "mesh", mesh)
        if owner != mesh and space_name(aval) != "shared":
            nothing = np.empty(aval.inner_aval.shape, object)
            foreign = Buffer(f"scratch {number} of other cores", "elsewhere", nothing)
            self._foreign[id(foreign)] = number
            return foreign
        shared = space_name(aval) == "shared"
        key = (number, -1 - sparse_core(core) if shared else core.number)
        if key not in self._scratch:
            self._scratch[key] = self.allocate(core, aval, f"scratch {number}")
        return self._scratch[key]

    def elsewhere(self, core: Core, region: Region, place: Mapping[str, int]) -> Region:
        """The same scratch semaphore of the core at `place`."""
        numbers = {id(buffer): number for (number, _), buffer in self._scratch.items()}
        number = (numbers | self._foreign).get(id(region.buffer), -1)
        wanted = {**core.place, **place}
        for other, _ in self._cores:
            if dict(other.place) == wanted and (number, other.number) in self._scratch:
                return dataclasses.replace(region, buffer=self._scratch[number, other.number])
        raise SimulationError(f"there is no semaphore {region.buffer.name} at {wanted}")

    def barrier(self, core: Core) -> Steps:
        """All vector subcores of a SparseCore meet; each knows what the others did."""
        group = sparse_core(core)
        mine = [c for c, mesh in self._cores if sparse_core(c) == group and len(mesh.shape) == 2]
        here = self._barriers.setdefault(group, [])
        here.append(core)
        number = self._passed.get(group, 0)
        if len(here) < len(mine):
            yield Wait(lambda: self._passed.get(group, 0) > number, f"is at a barrier, {core.line}")
            return
        known = functools.reduce(np.maximum, [c.clock for c in here])
        for member in here:
            member.clock = known.copy()
            member.clock[member.number] += 1
        self._barriers[group], self._passed[group] = [], number + 1

    def pipeline(self, eqn: Any) -> Any:
        """The traced form of a pipeline, made once."""
        if id(eqn) not in self._pipelines:
            axes: dict[str, int] = {}
            for mesh in self._params["meshes"]:
                axes |= dict(mesh.shape)
            self._pipelines[id(eqn)] = _private.pipeline_jaxpr(eqn, axes)
        return self._pipelines[id(eqn)]

    def program(self, jaxpr: Any) -> Program:
        """A jaxpr, looked up once."""
        if id(jaxpr) not in self._looked_up:
            self._looked_up[id(jaxpr)] = Program(jaxpr)
        return self._looked_up[id(jaxpr)]


def sparse_core(core: Core) -> int:
    """The SparseCore that a core is of; the first mesh axis counts them."""
    return next(iter(core.place.values()))


def space_name(aval: Any) -> str:
    """The memory space of a ref, in this module's terms."""
    space = getattr(aval.memory_space, "memory_space", aval.memory_space)
    name = str(getattr(space, "value", space))
    names = {
        "hbm": "hbm",
        "any": "hbm",
        "vmem": "vmem",
        "smem": "smem",
        "vmem_shared": "shared",
        "semaphore_mem": "semaphore",
    }
    if name not in names:
        raise UnmodelledError(f"memory space {name}")
    return names[name]


Runner = Callable[[Any, Sequence[np.ndarray]], list[np.ndarray]]


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], kernel: Runner) -> list[Any]:
    """Evaluates a program around kernels with numpy; `kernel` runs each of them."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else env[atom]

    for eqn in jaxpr.eqns:
        operands = [np.asarray(read(atom)) for atom in eqn.invars]
        name = eqn.primitive.name
        inner = next(
            (eqn.params[k] for k in ("jaxpr", "call_jaxpr", "call") if k in eqn.params), None
        )
        if name == KERNEL:
            results = kernel(eqn, operands)
        elif inner is not None:
            results = evaluate(inner.jaxpr, inner.consts, operands, kernel)
        elif name in values.RULES:
            results = values.evaluate(name, operands, eqn.params, [v.aval for v in eqn.outvars])
        else:
            results = eqn.primitive.bind(*operands, **eqn.params)
            results = results if eqn.primitive.multiple_results else [results]
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def traced(fn: Callable[..., Any], args: Sequence[Any], chip: chips.Chip) -> Any:
    """The traced form of `fn` on a chip that need not be present, and the tree of its results."""
    if chip.sparse is None:
        raise UnsupportedError(
            where="sparsecore", what="a SparseCore kernel", place=chip.name, why="it has none"
        )
    if not versions.has("SparseCore simulator"):
        raise UnsupportedError(
            where="sparsecore",
            what="a SparseCore kernel",
            place=f"a simulator under JAX {jax.__version__}",
            why=versions.lack("SparseCore simulator"),
        )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tuple(args))
    kind = "TPU7x" if chip.name == "tpu7x" else f"TPU {chip.name}"
    device = jax.sharding.AbstractDevice(
        device_kind=kind, num_cores=chip.cores_per_device, platform="tpu"
    )
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("device",), axis_types=auto, abstract_device=device)

    def trace() -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.make_jaxpr(fn, return_shape=True)(*shapes)

    if jax.sharding.get_abstract_mesh().empty:
        return trace()
    with concurrent.futures.ThreadPoolExecutor(1) as elsewhere:  # a mesh is a thread's own
        return elsewhere.submit(trace).result()
