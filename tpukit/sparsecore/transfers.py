"""Transfers and semaphores of a simulated SparseCore, and when the first are performed.

A copy from a vector subcore's memory to HBM or to the shared memory is a push: its semaphore counts
what was read, and only a fence, which waits for all pushes of the core, tells that it was written.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any, Literal

import numpy as np

from tpukit.sparsecore.faults import InFlightError, OutOfBoundsError, RaceError
from tpukit.sparsecore.memory import Region

Timing = Literal["eager", "lazy", "random"]
_FAR = ("hbm", "shared")


class Semaphore:
    """A counter; of transfers it counts bytes.

    Attributes:
      name: for messages.
      count: its value.
      clock: what its signals know of the cores.
      waiting: transfers that will add to it and are not performed, in order of their start.
      done: those performed, in that order, whose bytes nobody has awaited.
    """

    def __init__(self, name: str, cores: int) -> None:
        self.name = name
        self.count = 0
        self.clock = np.zeros(cores, np.int32)
        self.waiting: list[Transfer] = []
        self.done: list[Transfer] = []


@dataclasses.dataclass(eq=False)
class Transfer:
    """A DMA or a stream.

    Attributes:
      source, target: of the same shape, but where one of them chooses rows by indices.
      add: adds to the target in flight.
      semaphore: that its bytes are added to; None of a push whose reading nobody asks for.
      core: who started it.
      size: bytes, those of rows that are ignored included.
      left: bytes not awaited.
      line: the user's source line.
      push: whether it is one.
      value: what a push has read and not yet written.
    """

    source: Region
    target: Region
    add: bool
    semaphore: Semaphore | None
    core: Any
    size: int
    left: int
    line: str
    push: bool = False
    value: np.ndarray | None = None

    def touched(self) -> list[tuple[Region, bool, bool]]:
        """The regions it uses, whether it writes them, and whether that is an addition."""
        found = [(self.source, False, False), (self.target, True, self.add)]
        for region in (self.source, self.target):
            indices = region.indirect.region if region.indirect is not None else None
            if indices is not None:
                found.append((indices, False, False))
        return found

    def __str__(self) -> str:
        return (
            f"the transfer {self.source.buffer.name} -> {self.target.buffer.name}"
            f" of {self.size} bytes started by {self.core.name} at {self.line or 'an unknown line'}"
        )


class Transfers:
    """All transfers of a run.

    Attributes:
      timing: "eager" performs a transfer when it starts; "lazy" when it must have happened, the
        newest of a semaphore first; "random" at any time between, in any order.
    """

    def __init__(self, timing: Timing, draw: random.Random) -> None:
        self.timing: Timing = timing
        self._draw = draw

    def start(self, transfer: Transfer) -> None:
        """Starts one.

        Raises:
          InFlightError: its memory is in use by a transfer that has not been awaited.
        """
        for region, writes, adds in transfer.touched():
            check_flights(region, writes, adds, f"{transfer}")
        for region, writes, adds in transfer.touched():
            region.buffer.flights.append((region, transfer, writes, adds))
        if transfer.push:
            transfer.core.pushes.append(transfer)
        if transfer.semaphore is not None:
            transfer.semaphore.waiting.append(transfer)
        if self.timing == "eager":
            self._perform(transfer)
        elif self.timing == "random" and transfer.semaphore is not None:
            waiting = transfer.semaphore.waiting
            while waiting and self._draw.random() < 0.5:
                self._perform(self._draw.choice(waiting))

    def fence(self, core: Any) -> None:
        """Performs all pushes of a core, which it need not await any more."""
        pushes = list(reversed(core.pushes))
        if self.timing == "random":
            self._draw.shuffle(pushes)
        for push in pushes:
            if push.value is None:
                self._perform(push)
            write_pushed(push)
            _land(push)
        core.pushes.clear()

    def bring(self, semaphore: Semaphore, amount: int) -> bool:
        """Performs what it takes for a semaphore to reach an amount; whether it did."""
        while semaphore.count < amount and semaphore.waiting:
            last = semaphore.waiting[-1]
            chosen = last if self.timing == "lazy" else self._draw.choice(semaphore.waiting)
            self._perform(chosen)
        return semaphore.count >= amount

    def retire(self, semaphore: Semaphore, amount: int) -> None:
        """Takes an awaited amount from a semaphore, and lets go of what it covers."""
        semaphore.count -= amount
        while amount and semaphore.done:
            first = semaphore.done[0]
            covered = min(amount, first.left)
            first.left -= covered
            amount -= covered
            if not first.left:
                semaphore.done.pop(0)
                _land(first, only=first.source if first.push else None)

    def _perform(self, transfer: Transfer) -> None:
        if transfer.push:
            check_order(transfer.source, transfer.core, False, False)
            transfer.value = transfer.source.read()
            if self.timing == "eager":
                transfer.target.write(transfer.value)
        else:
            move(transfer)
        if transfer.semaphore is not None:
            transfer.semaphore.waiting.remove(transfer)
            transfer.semaphore.count += transfer.size
            transfer.semaphore.done.append(transfer)


def _land(transfer: Transfer, only: Region | None = None) -> None:
    """A transfer is over, or (of a push) no longer needs the region `only`."""
    for region, _, _ in transfer.touched():
        if only is None or region is only:
            flights = region.buffer.flights
            region.buffer.flights = [
                f
                for f in flights
                if f[1] is not transfer or (only is not None and f[0] is not only)
            ]


def check_flights(region: Region, writes: bool, adds: bool, who: str) -> None:
    """Raises unless a region is free of transfers that a touch of it would disturb."""
    for other, transfer, other_writes, other_adds in region.buffer.flights:
        if not (writes or other_writes):
            continue
        if adds and other_adds and region.buffer.space == "shared":  # the one place with atomics
            continue
        if region.overlaps(other):
            verb = "writes" if writes else "reads"
            raise InFlightError(f"{who} {verb} {region.buffer.name} while {transfer} is in flight")


def check_order(region: Region, core: Any, writes: bool, adds: bool) -> None:
    """Raises if a touch of shared memory races; notes it otherwise."""
    shadow = region.buffer.shadow
    if shadow is None:
        return
    index = region.base_index
    if shadow.unordered(index, core.number, core.clock, writes, adds):
        verb = "writes" if writes else "reads"
        raise RaceError(
            f"{verb} {region.buffer.name} that another core touches, and nothing orders the two",
            core=core.name,
        )
    shadow.record(index, core.number, int(core.clock[core.number]), writes, adds)
    if writes and region.buffer.written is not None:
        region.buffer.written[index] = True


def write_pushed(push: Transfer) -> None:
    """The second half of a push."""
    check_order(push.target, push.core, True, False)
    push.target.write(np.asarray(push.value))
    count(push, push.size)


def count(transfer: Transfer, size: int) -> None:
    """Adds a transfer to the counts of the core that started it."""
    counts = transfer.core.counts
    counts.transfers += 1
    for region, way in ((transfer.source, "read"), (transfer.target, "written")):
        if region.buffer.space in _FAR:
            name = f"{region.buffer.space}_{way}"
            setattr(counts, name, getattr(counts, name) + size)


def move(transfer: Transfer) -> None:
    """Performs a transfer: bounds, order, contents, and the counts of the core that started it."""
    source, target = transfer.source, transfer.target
    far = source if source.indirect is not None else target
    if far.indirect is None:
        for region, writes in ((source, False), (target, True)):
            check_order(region, transfer.core, writes, transfer.add and writes)
        value, size = source.read(), transfer.size
        target.write(value, add=transfer.add)
    else:
        rows = far.indirect.rows()
        keep = np.ones(len(rows), bool)
        if far.indirect.ignored is not None:
            keep = rows != far.indirect.ignored
        _check_rows(far, rows[keep])
        for region, writes in ((source, False), (target, True)):
            check_order(region, transfer.core, writes, transfer.add and writes)
        if far is source:
            target.write(source.read(rows[keep]), add=transfer.add, rows=_placed(target, keep))
        else:
            target.write(source.read(_placed(source, keep)), add=transfer.add, rows=rows[keep])
        size = transfer.size * int(keep.sum()) // max(1, len(rows))
    count(transfer, size)


def _placed(region: Region, keep: np.ndarray) -> np.ndarray:
    """The rows of a near region that take part."""
    rows = next(part for part in region.index if isinstance(part, slice))
    return rows.start + np.flatnonzero(keep)


def _check_rows(region: Region, rows: np.ndarray) -> None:
    size = region.seen_shape[0]
    wrong = rows[(rows < 0) | (rows >= size)]
    if wrong.size:
        what = f"row {int(wrong[0])} of {region.buffer.name}, which has {size}"
        raise OutOfBoundsError(what)
