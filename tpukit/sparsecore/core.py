"""One simulated core: it interprets the traced form of a kernel, as a coroutine."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tpukit import _private
from tpukit.sparsecore import values
from tpukit.sparsecore.faults import (
    CarriedError,
    OutOfBoundsError,
    SimulationError,
    UnmodelledError,
)
from tpukit.sparsecore.memory import Buffer, Iterations, Region
from tpukit.sparsecore.program import Program
from tpukit.sparsecore.transfers import (
    Semaphore,
    Transfer,
    Transfers,
    check_flights,
    check_order,
)

_VALUE_SPACES = ("vmem", "smem", "shared")
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}


@dataclasses.dataclass
class Counts:
    """What a core had moved.

    Attributes:
      transfers: how many it started.
      hbm_read, hbm_written, shared_read, shared_written: bytes, without ignored rows.
    """

    transfers: int = 0
    hbm_read: int = 0
    hbm_written: int = 0
    shared_read: int = 0
    shared_written: int = 0


@dataclasses.dataclass(frozen=True)
class Wait:
    """What a core stops for: `ready` says whether it may go on, `what` says it to people."""

    ready: Callable[[], bool]
    what: str


Steps = Generator[Wait, None, Any]


class Machine:
    """What cores share; see `run.Run`, which is one."""

    transfers: Transfers
    draw: random.Random

    def allocate(self, core: Core, aval: Any, name: str) -> Buffer:
        """Fresh memory of a core."""
        raise NotImplementedError

    def free(self, core: Core, buffer: Buffer) -> None:
        """Gives it back."""
        raise NotImplementedError

    def elsewhere(self, core: Core, region: Region, place: Mapping[str, int]) -> Region:
        """The same semaphore of another core."""
        raise NotImplementedError

    def barrier(self, core: Core) -> Steps:
        """Waits for the other vector subcores of the same SparseCore."""
        raise NotImplementedError

    def pipeline(self, eqn: Any) -> Any:
        """The traced form of a pipeline."""
        raise NotImplementedError

    def program(self, jaxpr: Any) -> Program:
        """A jaxpr, looked up."""
        raise NotImplementedError


class Core:
    """A subcore at work.

    Attributes:
      number: among all cores of the run.
      name: for messages.
      place: its index on each mesh axis.
      clock: what it knows of each core's clock, its own included.
      counts: what it moved.
      pushes: those it has not fenced.
    """

    def __init__(self, machine: Machine, number: int, place: Mapping[str, int], cores: int) -> None:
        self.machine = machine
        self.number = number
        self.place = place
        self.name = ", ".join(f"{axis} {at}" for axis, at in place.items())
        self.clock = np.zeros(cores, np.int32)
        self.clock[number] = 1
        self.counts = Counts()
        self.pushes: list[Transfer] = []
        self._source: Any = None
        self._loops: list[Iterations] = []
        self._grid: list[Any] = []

    @property
    def line(self) -> str:
        """The user's source line of its last effect."""
        return _private.where(self._source)

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> Steps:
        """Interprets a jaxpr; returns its results."""
        program = self.machine.program(jaxpr)
        env = program.environment(consts, args)
        for step in program.steps:
            operands = [env[at] for at in step.reads]
            try:
                if step.rule is None:
                    results = yield from self._effect(step.name, step.eqn, operands)
                else:
                    result = step.rule(*operands)
                    if step.fits(result):
                        env[step.writes[0]] = result
                        continue
                    results = values.fitted(step.name, result, step.wanted)
            except SimulationError as error:
                if error.line:
                    raise
                line = _private.where(step.eqn.source_info)
                raise type(error)(error.what, core=error.core or self.name, line=line) from None
            for at, result in zip(step.writes, results, strict=True):
                env[at] = result
        return [env[at] for at in program.results]

    def _effect(self, name: str, eqn: Any, operands: list[Any]) -> Steps:
        """An operation that has effects, or other operations inside."""
        if name in _CALLS:
            inner = eqn.params[_CALLS[name]]
            return (yield from self.run(inner.jaxpr, inner.consts, operands))
        self._source = eqn.source_info
        handler = getattr(self, f"_do_{name}", None)
        if handler is None:
            raise UnmodelledError(f"the primitive {name!r} is not modelled")
        results = handler(operands, eqn.params, eqn)
        if isinstance(results, Generator):
            results = yield from results
        return [] if results is None else results

    # Control flow.

    def _do_cond(self, operands: list[Any], params: Any, eqn: Any) -> Steps:
        branch = params["branches"][int(operands[0])]
        return (yield from self.run(branch.jaxpr, branch.consts, operands[1:]))

    def _do_while(self, operands: list[Any], params: Any, eqn: Any) -> Steps:
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        tests, consts, carry = operands[: split[0]], operands[slice(*split)], operands[split[1] :]
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        while True:
            (go,) = yield from self.run(test.jaxpr, test.consts, [*tests, *carry])
            if not go:
                return carry
            carry = yield from self.run(body.jaxpr, body.consts, [*consts, *carry])

    def _do_scan(self, operands: list[Any], params: Any, eqn: Any) -> Steps:
        consts, carry, columns = map(list, params["ft_in"].update(operands).unpack())
        carried, body = len(carry), params["jaxpr"]
        order = range(params["length"])
        rows: list[Any] = []
        for at in reversed(order) if params["reverse"] else order:
            inputs = [*consts, *carry, *(x[at] for x in columns)]
            results = yield from self.run(body.jaxpr, body.consts, inputs)
            carry = results[:carried]
            rows.append(results[carried:])
        rows = rows[::-1] if params["reverse"] else rows
        return [*carry, *(np.stack(column) for column in zip(*rows, strict=True))]

    def _do_parallel_loop(self, operands: list[Any], params: Any, eqn: Any) -> Steps:
        low, high, step, consts, carry = jax.tree.unflatten(params["tree"], operands)
        order = list(range(int(low), int(high), int(step)))
        if not carry:  # what is carried is handed on in order
            self.machine.draw.shuffle(order)
        loop, body = Iterations(), params["jaxpr"]
        self._loops.append(loop)
        body_consts = getattr(body, "consts", ())
        for at in order:
            loop.current = at
            inputs = [*consts, np.int32(at), *carry]
            body_jaxpr = getattr(body, "jaxpr", body)
            carry = yield from self.run(body_jaxpr, body_consts, inputs)
        self._loops.pop()
        return carry

    def _do_run_scoped(self, operands: list[Any], params: Any, eqn: Any) -> Steps:
        jaxpr = params["jaxpr"]
        if params["collective_axes"]:
            raise UnmodelledError("run_scoped with collective axes")
        inner = [
            self.machine.allocate(self, var.aval, f"scoped memory of {self.line}")
            for var in jaxpr.invars
        ]
        results = yield from self.run(jaxpr, operands, inner)
        for buffer in inner:
            self.machine.free(self, buffer)
        return results

    def _do_emit_pipeline(self, operands: list[Any], params: Any, eqn: Any) -> Steps:
        inner = self.machine.pipeline(eqn)
        return (yield from self.run(inner.jaxpr, inner.consts, operands))

    def _do_pipeline_body(self, operands: list[Any], params: Any, eqn: Any) -> Steps:
        step, consts, refs = params["in_tree"].unflatten(operands)
        explicit = jax.tree.leaves(step) if params.get("_explicit_indices", False) else []
        jaxpr = params["jaxpr"]
        self._grid.append(step.index)
        inputs = [*consts, *explicit, *refs]
        inner, closed = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
        results = yield from self.run(inner, closed, inputs)
        self._grid.pop()
        return results

    def _do_program_id(self, operands: list[Any], params: Any, eqn: Any) -> list[Any]:
        return [np.int32(self._grid[-1][params["axis"]])]

    def _do_axis_index(self, operands: list[Any], params: Any, eqn: Any) -> list[Any]:
        return [np.int32(self.place[params["axis_name"]])]

    # Memory.

    def region(self, ref: Any) -> Region:
        """The part of memory that a ref means, with its transforms."""
        if isinstance(ref, Buffer):
            return ref.whole()
        if isinstance(ref, Region):
            return ref
        return self._transformed(self.region(ref.ref), ref.transforms)

    def _transformed(self, region: Region, transforms: Sequence[Any]) -> Region:
        for transform in transforms:
            if isinstance(transform, _private.NDIndexer):
                region = region.then(transform, self)
            elif isinstance(transform, _private.BitcastTransform):
                if region != region.buffer.whole():
                    raise UnmodelledError("a bitcast of a part of a ref")
                region = dataclasses.replace(region, dtype=np.dtype(transform.dtype))
                full = tuple(slice(0, n) for n in region.seen_shape)
                region = dataclasses.replace(region, index=full)
            else:
                raise UnmodelledError(f"{type(transform).__name__} of a ref")
        return region

    def _touch(self, region: Region, *, write: bool, adds: bool = False) -> None:
        """Checks a load or a store of this core."""
        if region.buffer.space not in _VALUE_SPACES:
            raise SimulationError(f"loads and stores cannot reach {region.buffer.name}, in HBM")
        check_flights(region, write, adds, self.name)
        check_order(region, self, write, adds)
        self._iterate(region, write)

    def _iterate(self, region: Region, write: bool) -> None:
        """Checks that no other iteration of a parallel loop disturbs a touch of this one."""
        for loop in self._loops:
            if loop.conflict(region, write):
                verb = "writes" if write else "reads"
                raise CarriedError(
                    f"{verb} {region.buffer.name} that another iteration of a parallel loop"
                    " touches, one of them to write"
                )

    def _do_get(self, operands: list[Any], params: Any, eqn: Any) -> list[Any]:
        transforms = jax.tree.unflatten(params["tree"], operands[1:])
        region = self._transformed(self.region(operands[0]), transforms)
        self._touch(region, write=False)
        return [region.read()]

    def _do_load(self, operands: list[Any], params: Any, eqn: Any) -> list[Any]:
        mask = operands.pop() if params["has_mask"] else None
        (value,) = self._do_get(operands, params, eqn)
        return [value if mask is None else value[np.cumsum(mask) - 1]]

    def _do_swap(self, operands: list[Any], params: Any, eqn: Any) -> list[Any]:
        mask = operands.pop() if params.get("has_mask") else None
        transforms = jax.tree.unflatten(params["tree"], operands[2:])
        region = self._transformed(self.region(operands[0]), transforms)
        value, old = np.asarray(operands[1]), region.read()
        add = bool(params.get("add"))
        self._touch(region, write=True, adds=add)
        if mask is not None and params.get("compress"):
            packed = np.zeros_like(value)
            packed[: mask.sum()] = value[mask]
            value, mask = packed, np.arange(value.size) < mask.sum()
        new = old + value if add else value
        region.write(new if mask is None else np.where(mask, new, old))
        return [old]

    def _do_addupdate(self, operands: list[Any], params: Any, eqn: Any) -> None:
        transforms = jax.tree.unflatten(params["tree"], operands[2:])
        region = self._transformed(self.region(operands[0]), transforms)
        self._touch(region, write=True)
        region.write(operands[1], add=True)

    def _do_gather(self, operands: list[Any], params: Any, eqn: Any) -> list[Any]:
        region, index, mask = self._elements(params, operands, 2)
        full = np.full(mask.shape, 0, region.buffer.data.dtype)
        full[mask] = region.buffer.data[index]
        return [full]

    def _do_scatter(self, operands: list[Any], params: Any, eqn: Any) -> None:
        region, index, mask = self._elements(params, operands, 2, write=True)
        value = np.asarray(jax.tree.unflatten(params["tree"], operands)[3])[mask]
        if params["add"]:
            np.add.at(region.buffer.data, index, value)
        else:
            region.buffer.data[index] = value

    def _elements(
        self, params: Any, operands: list[Any], at: int, *, write: bool = False
    ) -> tuple[Region, tuple[np.ndarray, ...], np.ndarray]:
        """The elements of a `load_gather` or `store_scatter`: region, index, mask."""
        parts = jax.tree.unflatten(params["tree"], operands)
        ref, transforms, indices, mask = parts[0], parts[1], parts[at], parts[-1]
        region = self._transformed(self.region(ref), transforms)
        if any(isinstance(part, slice) and part.step not in (None, 1) for part in region.index):
            raise UnmodelledError("elements of a strided ref")
        mask = np.ones(indices[0].shape, bool) if mask is None else np.asarray(mask)
        chosen, wanted = [], iter(indices)
        for part in region.index:
            if not isinstance(part, slice):
                chosen.append(np.full(int(mask.sum()), part))
                continue
            index = np.asarray(next(wanted))[mask]
            if index.size and (index.min() < 0 or part.start + index.max() >= part.stop):
                low, high = int(index.min()), int(index.max())
                what = f"elements {low} to {high} of {region.buffer.name}"
                raise OutOfBoundsError(f"{what}, which has {part.stop - part.start} there")
            chosen.append(part.start + index)
        touched = dataclasses.replace(region, index=tuple(chosen))
        if touched.index[0].size:
            self._touch(touched, write=write)
        return region, tuple(chosen), mask

    # Transfers and semaphores.

    def _semaphore(self, ref: Any, transforms: Sequence[Any] = ()) -> Region:
        return self._transformed(self.region(ref), transforms)

    def _do_dma_start(self, operands: list[Any], params: Any, eqn: Any) -> None:
        source, target, semaphore, other, device = params["tree"].unflatten(operands)
        if device is not None:
            raise UnmodelledError("a transfer to another core or device")
        regions = self.region(source), self.region(target)
        size = size_of(regions)
        if is_push(regions, self.place):
            counter = None if other is None else self._semaphore(other).read().item()
            push = Transfer(*regions, False, counter, self, size, size, self.line, push=True)
            self._start(push)
            return
        if semaphore is None or other is not None:
            raise SimulationError("only a copy from VMEM to HBM or shared memory has `src_sem`")
        counter = self._semaphore(semaphore).read().item()
        self._start(Transfer(*regions, params["add"], counter, self, size, size, self.line))

    def _start(self, transfer: Transfer) -> None:
        """Starts a transfer, whose ends in this core's memory an iteration touches by that."""
        for region, write, adds in transfer.touched():
            atomic = adds and region.buffer.space == "shared"
            if region.buffer.space in _VALUE_SPACES and not atomic:
                self._iterate(region, write)
        self.machine.transfers.start(transfer)

    def _do_dma_wait(self, operands: list[Any], params: Any, eqn: Any) -> Steps:
        source, target, semaphore, _, _ = params["tree"].unflatten(operands)
        given = [self.region(ref) if ref is not None else None for ref in (source, target)]
        regions = [region for region in given if region is not None]
        if not params.get("is_wait_send", False) and is_push(given, self.place):
            self.machine.transfers.fence(self)
            return
        amount = size_of(regions)
        counter = self._semaphore(semaphore).read().item()
        yield from self._await(counter, amount)
        self.machine.transfers.retire(counter, amount)

    def _await(self, counter: Semaphore, amount: int) -> Steps:
        def ready() -> bool:
            return self.machine.transfers.bring(counter, amount)

        if not ready():
            what = f"waits for {counter.name} to be {amount}, which is {counter.count}"
            yield Wait(ready, f"{what}, at {self.line}")

    def _do_semaphore_signal(self, operands: list[Any], params: Any, eqn: Any) -> None:
        parts = jax.tree.unflatten(params["args_tree"], operands)
        region, device = self._semaphore(parts[0], parts[1]), parts[3]
        if device is not None:
            if not isinstance(device, Mapping):
                raise UnmodelledError(f"a signal to {device!r}")
            place = {str(axis): int(at) for axis, at in device.items()}
            region = self.machine.elsewhere(self, region, place)
        counter = region.read().item()
        counter.clock = np.maximum(counter.clock, self.clock)
        counter.count += int(parts[2])
        self.clock[self.number] += 1

    def _do_semaphore_wait(self, operands: list[Any], params: Any, eqn: Any) -> Steps:
        ref, transforms, amount, decrement = jax.tree.unflatten(params["args_tree"], operands)
        counter = self._semaphore(ref, transforms).read().item()
        yield from self._await(counter, int(amount))
        self.clock = np.maximum(self.clock, counter.clock)
        if decrement:
            self.machine.transfers.retire(counter, int(amount))

    def _do_semaphore_read(self, operands: list[Any], params: Any, eqn: Any) -> list[Any]:
        ref, transforms = jax.tree.unflatten(params["args_tree"], operands)
        return [np.int32(self._semaphore(ref, transforms).read().item().count)]

    def _do_barrier(self, operands: list[Any], params: Any, eqn: Any) -> Steps:
        return self.machine.barrier(self)


def is_push(regions: Sequence[Region | None], place: Mapping[str, int]) -> bool:
    """Whether a copy between the regions is a push; that takes a vector subcore."""
    source, target = regions
    if source is None or target is None or len(place) < 2:
        return False
    if source.indirect is not None or target.indirect is not None:
        return False
    return source.buffer.space == "vmem" and target.buffer.space in ("hbm", "shared")


def size_of(regions: Sequence[Region]) -> int:
    """Bytes of a transfer: of its side that says how many rows there are."""
    near = next((r for r in regions if r.indirect is None), regions[0])
    count = 1
    for part in near.index:
        if isinstance(part, slice):
            count *= len(range(part.start, part.stop, part.step or 1))
    return count * near.itemsize
