"""Several devices that replay one program together, with the links between them.

Each device has a thread; only one runs at a time, always the one that is furthest behind, until it
is a step ahead of the next or has to wait for something that may still be sent. So no device uses
what another would have done later, up to the length of a step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tpukit import chips
from tpukit.predict.links import Links
from tpukit.predict.machine import GRANULE_BYTES, OVERRIDES, REMOTE, Machine, Operand, Span, space
from tpukit.predict.program import Program
from tpukit.predict.rates import Rates
from tpukit.predict.values import known

# How the compiler writes another device: in the semaphore and the word of overrides of a transfer,
# in the address of a semaphore of its own.
_DMA_CORE, _DMA_FLAG, _DMA_CHIP = 13, (1 << 13) - 1, (1 << 14) - 1
_SIGNAL_REMOTE, _SIGNAL_CHIP, _SIGNAL_CORE, _SIGNAL_FLAG = 1 << 15, 17, 14, (1 << 14) - 1
STEP_US = 0.5


class _Stopped(Exception):
    """Another device has failed."""


class Member(Machine):
    """One device of a cluster."""

    def __init__(
        self,
        program: Program,
        rates: Rates,
        operands: Mapping[int, Operand],
        cluster: Cluster,
        number: int,
    ) -> None:
        super().__init__(program, rates, operands)
        self.cluster = cluster
        self.number = number
        self.horizon = 0.0
        self.waiting = False
        self.finished = False
        self.failure: BaseException | None = None
        self.turn = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._live, daemon=True)

    def _live(self) -> None:
        self.turn.acquire()
        try:
            if not self.cluster.failed:
                self.run()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  (handed to the cluster, which raises it)
            self.failure = error
        self.finished = True
        self.cluster.back.release()

    @property
    def key(self) -> float:
        """The time of the next thing that this device does by itself."""
        if not self.waiting:
            return self.now
        return max(self.now, self.pending[0][0]) if self.pending else math.inf

    def _pause(self) -> None:
        """Lets another device go on."""
        self.cluster.back.release()
        self.turn.acquire()
        if self.cluster.failed:
            raise _Stopped

    def transfer(self, opcode: str, place: int, *fields: Any) -> None:
        """Starts a DMA, perhaps to another device."""
        if self.now > self.horizon:
            self._pause()
        flag = known(fields[3], "a semaphore")
        if len(fields) > OVERRIDES and flag & REMOTE:
            self.cluster.send(self, place, fields)
        else:
            super().transfer(opcode, place, *fields)

    def vsyncadd_remote(self, address: int, amount: int) -> None:
        """Adds to a semaphore of another device."""
        address, amount = known(address, "a semaphore"), known(amount, "an amount")
        if not address & _SIGNAL_REMOTE:
            raise self._error(None, f"a remote semaphore at {address:#x}")
        device = self.cluster.device(
            address >> _SIGNAL_CHIP, address >> _SIGNAL_CORE & 1, address & _SIGNAL_REMOTE
        )
        _, arrival = self.cluster.links.send(self.number, device, GRANULE_BYTES, self.now)
        self.cluster.deliver(device, arrival, address & _SIGNAL_FLAG, amount)

    def next_event(self, place: int, what: str) -> None:
        """Waits for the next completion; others may still cause an earlier one."""
        del place, what
        self.waiting = True
        while not self.pending or self.pending[0][0] > self.horizon:
            self._pause()
        self.waiting = False
        self._finish()


class Cluster:
    """Devices of a mesh that run the same kernel."""

    def __init__(
        self,
        program: Program,
        rates: Rates,
        operands: Sequence[Mapping[int, Operand]],
        links: Links,
        spans: Sequence[int] = (),
    ) -> None:
        self.links = links
        self.rates = rates
        self.failed = False
        self.back = threading.Semaphore(0)
        chip = chips.chip(rates.chip)
        self.devices_per_chip = chip.cores // chip.cores_per_device
        self.members = [Member(program, rates, one, self, i) for i, one in enumerate(operands)]
        for number in spans:
            self.members[number].spans = []

    def device(self, chip: int, core: int, marked: int) -> int:
        """The number of a device from that of its chip and core."""
        number = chip * self.devices_per_chip + core
        if not marked or number >= len(self.members):
            raise self.members[0]._error(None, f"no device has chip {chip} and core {core}")
        return number

    def send(self, sender: Member, place: int, fields: tuple[Any, ...]) -> None:
        """A transfer from one device's memory into another's."""
        names = ("source", "size", "target", "semaphore", "own semaphore")
        source, granules, target, flag, own = (
            known(value, f"a DMA's {name}") for value, name in zip(fields, names, strict=False)
        )
        overrides = known(fields[OVERRIDES], "a DMA's overrides")
        device = self.device(overrides & _DMA_CHIP, flag >> _DMA_CORE & 1, overrides & REMOTE)
        size, receiver, rates = granules * GRANULE_BYTES, self.members[device], self.rates
        ready = float(sender.now)
        if space(source) == "hbm":
            ready = sender.occupy_hbm(size)
        left, arrival = self.links.send(sender.number, device, size, ready)
        if space(target) == "hbm":
            receiver.occupy_hbm(size)
            contents = [sender.words.get(source + i) for i in range(granules)]
            receiver.receive(target, contents if sender.plain(fields) else [None] * granules)
        sender.totals.moved["to other devices"] += size
        sender.totals.transfers["to other devices"] += 1
        sender.complete_at(left, own & _DMA_FLAG, granules)
        self.deliver(device, arrival + rates.hbm_latency, flag & _DMA_FLAG, granules)
        if sender.spans is not None:
            what = f"{size} bytes to device {device} at {place:#x}"
            sender.spans.append(Span("to other devices", sender.now, int(arrival), what))
        if receiver.spans is not None:
            what = f"{size} bytes from device {sender.number}"
            receiver.spans.append(Span("from other devices", int(ready), int(arrival), what))

    def deliver(self, device: int, arrival: float, flag: int, amount: int) -> None:
        """Something reaches a semaphore of a device."""
        self.members[device].complete_at(arrival, flag, amount)

    def run(self) -> None:
        """Replays all devices to their ends.

        Raises:
          ReplayError: a replay cannot be right, or all devices wait for one another.
        """
        step = STEP_US * 1e3 * self.rates.clock.value
        for member in self.members:
            member.thread.start()
        while alive := [member for member in self.members if not member.finished]:
            first = min(alive, key=lambda member: member.key)
            if first.key == math.inf:
                self._stop()
                names = ", ".join(str(member.number) for member in alive)
                raise first._error(None, f"devices {names} wait for one another, for ever")
            others = [member.key for member in alive if member is not first]
            first.horizon = min(others, default=math.inf) + step
            first.turn.release()
            self.back.acquire()
            if first.failure is not None:
                self._stop()
                raise first.failure

    def _stop(self) -> None:
        """Ends all threads."""
        self.failed = True
        for member in self.members:
            while member.thread.is_alive():
                member.turn.release()
                member.thread.join(timeout=0.05)
