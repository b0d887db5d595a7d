"""The clock of a replay: bundles, matrix units, transfers and semaphores.

Time is in cycles. A bundle takes one. A matrix unit works through its operations in order and holds
up to `queue` of them; issue stalls while it is full. Transfers that touch HBM share one queue: each
occupies it for its bytes over the bandwidth and completes a latency later, adding its granules to
its semaphore. A wait stalls until the semaphore has enough.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tpukit import chips
from tpukit.errors import ReplayError
from tpukit.predict.instructions import Declaration
from tpukit.predict.program import END, GRANULE_BYTES, HBM_BASE, SMEM_BASE, VMEM_WORD_BYTES, Program
from tpukit.predict.rates import Rates
from tpukit.predict.values import MASK, UNKNOWN, Unpredictable, known

MAX_TRANSFER_BYTES = 1 << 30
_WORD = 4
_GRANULE_WORDS = GRANULE_BYTES // _WORD
_APART = 1024  # granules between operands
_PLAIN_FIELDS = 4  # of a transfer without strides: source, granules, destination, semaphore
OVERRIDES, REMOTE = 6, 1 << 14  # a general one's word that names a device; the semaphore's mark
_GENERAL_FIELDS = 8  # of a general one, the address of its strides among them


@dataclasses.dataclass(frozen=True)
class Operand:
    """What the replay knows of an operand: its size in bytes and, for scalars, its words."""

    size: int
    words: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that lasted: `what` in cycles [start, end)."""

    what: str
    start: int
    end: int
    detail: str = ""


@dataclasses.dataclass
class Totals:
    """What was counted.

    Attributes:
      visits: passes over each segment.
      stalls: cycles by (cause, address); causes are "dma", "semaphore" and "mxu".
      moved: bytes by direction ("hbm_to_vmem").
      transfers: number by direction.
      hbm_busy: cycles that the HBM queue was occupied.
      mxu_busy: cycles of matrix work, over all units.
    """

    visits: list[int]
    stalls: collections.Counter[tuple[str, int]]
    moved: collections.Counter[str]
    transfers: collections.Counter[str]
    hbm_busy: float = 0.0
    mxu_busy: int = 0


class Machine:
    """A TensorCore that replays a program."""

    def __init__(self, program: Program, rates: Rates, operands: Mapping[int, Operand]) -> None:
        self.program = program
        self.rates = rates
        self.now = 0
        self.s: list[Any] = [UNKNOWN] * 64
        self.p: list[Any] = [UNKNOWN] * 32
        self.mem: dict[int, Any] = {1: 0}  # word 1 holds the number of the core
        self.taken = [False] * program.branches
        self.tokens: dict[str, Any] = {}
        self.flags: collections.Counter[int] = collections.Counter()
        self.pending: list[tuple[int, int, int, int]] = []
        self.hbm_free = 0.0
        self.local_free = 0.0
        self.count = 0
        self.totals = Totals(
            visits=[0] * len(program.segments),
            stalls=collections.Counter(),
            moved=collections.Counter(),
            transfers=collections.Counter(),
        )
        self.spans: list[Span] | None = None
        self.words: dict[int, tuple[int, ...]] = {}  # known contents of operands, by granule
        self.holding: dict[int, int] = {}  # end of each operand that holds some, by its begin
        self.ends: dict[int, int] = {}  # end of each operand, by its begin
        self._units: tuple[tuple[int, ...], ...] = ((),) * rates.mxus
        self._stalls: dict[Any, tuple[int, tuple[tuple[int, ...], ...]]] = {}
        self._costs = [
            [(cycle, unit, rates.matmul_cycles(dtype)) for cycle, unit, dtype in seg.matmuls]
            for seg in program.segments
        ]
        self._busy = [sum(cost for *_, cost in costs) for costs in self._costs]
        # Granules from which operands are laid out, and the unit of addresses, by space.
        granules_of_smem = (SMEM_BASE + 0x60000) * _WORD // GRANULE_BYTES
        vmem_end = (program.vmem_end + _APART) * VMEM_WORD_BYTES // GRANULE_BYTES
        self._next = {"hbm": HBM_BASE, "vmem": vmem_end, "smem": granules_of_smem}
        hbm_unit = chips.chip(rates.chip).hbm_address_bytes
        self._address_bytes = {"hbm": hbm_unit, "vmem": VMEM_WORD_BYTES, "smem": _WORD}
        for declaration in program.declarations:
            self._declare(declaration, operands)

    def _declare(self, one: Declaration, operands: Mapping[int, Operand]) -> None:
        """Gives an operand its address, or its value."""
        operand = operands.get(one.index)
        if operand is None:
            raise self._error(None, f"operand {one.index} ({one.shape}) is missing")
        words = operand.words
        if one.space == "value":
            value = UNKNOWN if words is None else int(words[0])
        else:
            begin = self._next[one.space]
            granules = -(-operand.size // GRANULE_BYTES)
            self._next[one.space] = begin + -(-granules // _APART) * _APART + _APART
            value = begin * GRANULE_BYTES // self._address_bytes[one.space]
            self.ends[begin] = begin + granules
            if words is not None and one.space == "smem":
                self.mem.update(enumerate(map(int, words), start=value))
            elif words is not None:
                padded = np.pad(words, (0, -len(words) % _GRANULE_WORDS)).reshape(
                    -1, _GRANULE_WORDS
                )
                self.holding[begin] = begin + granules
                self.words.update(enumerate(map(tuple, padded.tolist()), start=begin))
        self.s[int(one.register[2:-1])] = value

    def run(self, limit: int = 1 << 40) -> int:
        """Replays to the end; returns the cycles.

        Raises:
          ReplayError: the replay cannot be right.
        """
        blocks, s, p, mem, taken = self.program.blocks, self.s, self.p, self.mem, self.taken
        at = 0
        try:
            while at != END:
                if self.now > limit:
                    raise self._error(self.program.starts[at], f"more than {limit} cycles")
                at = blocks[at](self, s, p, mem, taken)
        except Unpredictable as error:
            raise self._error(self.program.starts[at], str(error)) from error
        if self.pending:
            raise self._error(None, f"{len(self.pending)} transfers never awaited")
        return self.now

    def step(self, number: int) -> None:
        """The bundles of a segment were issued."""
        self.totals.visits[number] += 1
        segment, stall = self.program.segments[number], 0
        if self._costs[number]:
            key = (number, self._units)
            if key not in self._stalls:
                self._stalls[key] = self._matmuls(number)
            stall, self._units = self._stalls[key]
            self.totals.mxu_busy += self._busy[number]
            if stall:
                self.totals.stalls["mxu", segment.start] += stall
        else:
            self._units = self._aged(self._units, segment.cycles)
        end = self.now + segment.cycles + stall
        if self.spans is not None:
            self.spans.append(Span("issue", self.now, end, f"{segment.start:#x}"))
            if segment.matmuls:
                what = f"{len(segment.matmuls)} products"
                self.spans.append(Span("matrix units", self.now, end, what))
        self.now = end

    @staticmethod
    def _aged(units: tuple[tuple[int, ...], ...], by: int) -> tuple[tuple[int, ...], ...]:
        """The same ends of matrix operations, seen `by` cycles later."""
        if not any(units):
            return units
        return tuple(tuple(end - by for end in unit if end > by) for unit in units)

    def _matmuls(self, number: int) -> tuple[int, tuple[tuple[int, ...], ...]]:
        """Stall cycles of a segment and the ends of operations still under way after it."""
        units = [list(unit) for unit in self._units]
        stall = 0
        for cycle, which, cost in self._costs[number]:
            unit, at = units[which], cycle + stall
            while unit and unit[0] <= at:
                unit.pop(0)
            if len(unit) >= self.rates.mxu_queue:
                wait = unit[-self.rates.mxu_queue] - at
                stall, at = stall + wait, at + wait
            unit.append(max(at, unit[-1] if unit else 0) + cost)
        end = self.program.segments[number].cycles + stall
        return stall, self._aged(tuple(map(tuple, units)), end)

    def transfer(self, opcode: str, place: int, *fields: Any) -> None:
        """Starts a DMA: source, granules, destination, semaphore, and what strides it has."""
        source, granules, destination, flag = (
            known(value, what)
            for value, what in zip(
                fields,
                ("a DMA's source", "a DMA's size", "its target", "its semaphore"),
                strict=False,
            )
        )
        if len(fields) > OVERRIDES and flag & REMOTE:
            raise self._error(place, "a transfer to another device")
        size = granules * GRANULE_BYTES
        if size > MAX_TRANSFER_BYTES:
            raise self._error(place, f"a transfer of {size} bytes")
        direction = opcode.removeprefix("dma.")
        if direction == "general":
            direction = f"{space(source)}_to_{space(destination)}"
        self._move_words(source, granules, destination, fields, direction)
        through_hbm = "hbm" in direction
        rates = self.rates
        if through_hbm:
            begin = self.occupy_hbm(size)
            done = self.hbm_free + rates.hbm_latency
        else:
            begin = max(self.now, self.local_free)
            self.local_free = begin + rates.local_cycles(size)
            done = self.local_free + rates.local_latency_cycles
        self.totals.moved[direction] += size
        self.totals.transfers[direction] += 1
        self.complete_at(done, flag, granules)
        if self.spans is not None:
            self.spans.append(Span(direction, int(begin), int(done), f"{size} bytes at {place:#x}"))

    def occupy_hbm(self, size: int) -> float:
        """Takes a turn on HBM for so many bytes; returns when it begins."""
        begin = max(self.now, self.hbm_free)
        self.hbm_free = begin + self.rates.hbm_cycles(size)
        self.totals.hbm_busy += self.hbm_free - begin
        return begin

    def complete_at(self, done: float, flag: int, granules: int) -> None:
        """Something will be added to a semaphore."""
        self.count += 1
        heapq.heappush(self.pending, (math.ceil(done), self.count, flag, granules))

    def _move_words(
        self, source: int, granules: int, destination: int, fields: tuple[Any, ...], direction: str
    ) -> None:
        """Moves what is known of the data with it: into SMEM, or from place to place in HBM."""
        if direction.endswith("to_smem"):
            known_part = (self.words.get(source + i) for i in range(granules))
            for i, words in enumerate(known_part):
                place = destination + i * _GRANULE_WORDS
                for word in range(_GRANULE_WORDS):
                    if words is None:
                        self.mem.pop(place + word, None)
                    else:
                        self.mem[place + word] = words[word]
        elif direction == "hbm_to_hbm" and self.plain(fields):
            self.receive(destination, [self.words.get(source + i) for i in range(granules)])
        else:
            self._forget(destination, granules)

    def plain(self, fields: tuple[Any, ...]) -> bool:
        """Whether a transfer has no strides: no further fields, or an empty descriptor."""
        return len(fields) <= _PLAIN_FIELDS or (
            len(fields) == _GENERAL_FIELDS and fields[5] not in self.mem
        )

    def receive(self, destination: int, contents: list[tuple[int, ...] | None]) -> None:
        """Known and unknown granules arrive in HBM."""
        if any(words is not None for words in contents):
            begin = max(begin for begin in self.ends if begin <= destination)
            self.holding[begin] = self.ends[begin]
        self._forget(destination, len(contents))
        known_part = enumerate(contents, start=destination)
        self.words.update((place, words) for place, words in known_part if words is not None)

    def _forget(self, destination: int, granules: int) -> None:
        """Data that the replay does not have overwrites what it knew of an operand."""
        for begin, end in self.holding.items():
            for place in range(max(begin, destination), min(end, destination + granules)):
                self.words.pop(place, None)

    def wait(self, place: int, flag: int, amount: int) -> None:
        """Waits until the semaphore has the amount; does not take it."""
        flag, amount = known(flag, "a semaphore"), known(amount, "an amount awaited")
        self._complete()
        before = self.now
        while self.flags[flag] < amount:
            what = f"waits for {amount} on a semaphore that has {self.flags[flag]}, for ever"
            self.next_event(place, what)
        if self.now > before:
            self.totals.stalls["dma", place] += self.now - before
            self._units = self._aged(self._units, self.now - before)
            if self.spans is not None:
                self.spans.append(Span("waits", before, self.now, f"{place:#x}"))

    def next_event(self, place: int, what: str) -> None:
        """Waits for the next completion."""
        if not self.pending:
            raise self._error(place, what)
        self._finish()

    def _finish(self) -> None:
        """Lets the next transfer complete, at its time or now if that is past."""
        done, _, flag, granules = heapq.heappop(self.pending)
        self.now = max(self.now, done)
        self.flags[flag] += granules

    def _complete(self) -> None:
        """Lets all transfers complete whose time has come."""
        while self.pending and self.pending[0][0] <= self.now:
            self._finish()

    def vsyncadd(self, flag: int, amount: int) -> None:
        """Adds to a semaphore; large numbers are negative."""
        amount = known(amount, "an amount")
        signed = amount - (MASK + 1) if amount > MASK // 2 else amount
        self.flags[known(flag, "a semaphore")] += signed

    def vsyncadd_remote(self, flag: int, amount: int) -> None:
        """Adds to a semaphore of another device."""
        del flag, amount
        raise self._error(None, "a signal to another device")

    def vsyncpa(self, flag: int, value: int) -> None:
        """Sets a semaphore."""
        self.flags[known(flag, "a semaphore")] = known(value, "a semaphore's value")

    vsyncset = vsyncpa

    def flag(self, flag: int) -> int:
        """Reads a semaphore."""
        self._complete()
        return self.flags[known(flag, "a semaphore")] & MASK

    def halt(self, place: int, comment: str) -> None:
        """A check that the compiler put in has fired."""
        raise self._error(place, f"a check fired: {comment[:160]}")

    def check_branches(self, number: int) -> None:
        """A branch is taken: no other may be under way."""
        if any(flag is True for flag in self.taken):
            raise self._error(None, f"two branches taken at once, one is {number}")

    def _error(self, address: int | None, what: str) -> ReplayError:
        return ReplayError(kernel=self.program.name, address=address, what=what)


def space(address: int) -> str:
    """The memory that an address of a general transfer is in."""
    if address >= HBM_BASE:
        return "hbm"
    return "smem" if address >= SMEM_BASE else "vmem"
