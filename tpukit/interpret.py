"""Strict interpretation: Pallas TPU kernels on a CPU, with every protocol error an exception.

Pallas's TPU interpreter runs a kernel with simulated memories, semaphores and DMAs. It hangs on a
deadlock, prints left-over semaphores, says nothing of a DMA that nobody awaits, and does not notice
a remote DMA into a device that may not have started. Under `strict` each of these raises, as do
races and accesses out of bounds:

    with interpret.strict(interpret.InterpretMode(detect_races=True)):
        out = jax.jit(kernel)(x)

Not seen: reads of unwritten memory (they give NaN: see `assert_initialised`; integers give their
largest value), layouts and memory sizes (compile the kernel for that), and endless loops. The
interpreter refuses `semaphore_read`, so a kernel cannot wait in a loop of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from tpukit import _private, versions


class InterpretError(RuntimeError):
    """A kernel broke a rule while it was interpreted."""


class Deadlock(InterpretError):
    """Every core waits for a semaphore that nobody will signal."""


class LeftoverSemaphore(InterpretError):
    """A semaphore was not zero when its kernel ended."""


class UnawaitedDma(InterpretError):
    """A kernel ended with a DMA that nobody had awaited."""


class RemoteDmaBeforeBarrier(InterpretError):
    """A DMA was sent to a device that may not have entered the kernel."""


class Race(InterpretError):
    """Two accesses of the same memory are not ordered."""


class OutOfBounds(InterpretError):
    """An access outside of a buffer."""


class Uninitialised(InterpretError):
    """A value depends on memory that was never written."""


@dataclasses.dataclass(frozen=True)
class InterpretMode:
    """How a kernel is interpreted.

    Attributes:
      dma: "on_wait" performs each DMA as late as possible and in the last order possible, "eager"
        at once. Different faults show.
      detect_races: check that conflicting accesses are ordered. The time it takes is quadratic in
        the accesses of a buffer.
      random_seed: shuffles the grid points of parallel dimensions.
      cores: per device; more than one split parallel dimensions.
    """

    dma: Literal["on_wait", "eager"] = "on_wait"
    detect_races: bool = False
    random_seed: int | None = None
    cores: int = 1

    def params(self) -> pltpu.InterpretParams:
        """The interpreter's parameters: unwritten memory is NaN, out of bounds raises."""
        return pltpu.InterpretParams(
            dma_execution_mode=self.dma,
            detect_races=self.detect_races,
            random_seed=self.random_seed,
            num_cores_or_threads=self.cores,
            vector_clock_size=64 if self.detect_races else None,
        )


MODES = (InterpretMode(), InterpretMode(dma="eager", detect_races=True))


@dataclasses.dataclass
class Findings:
    """What a run has shown so far.

    Attributes:
      failure: the exception that stopped a kernel, if any.
      problems: what did not stop one.
    """

    failure: BaseException | None = None
    problems: list[InterpretError] = dataclasses.field(default_factory=list)

    def verdict(self) -> InterpretError:
        """The first of what was found, the rest in its notes."""
        failure = [] if self.failure is None else [_typed(self.failure)]
        first, *others = self.problems + failure
        for other in others:
            first.add_note(f"{type(other).__name__}: {other}")
        return first


@dataclasses.dataclass(frozen=True)
class _Wait:
    semaphore: Any
    core: int
    needs: int
    where: str

    @property
    def hopeless(self) -> bool:
        """Nothing under way can end this wait."""
        return (
            self.semaphore.count_by_core[self.core] < self.needs
            and not self.semaphore.tasks[self.core]
        )


class _Watch:
    """Watches the interpreter while a `strict` context is open."""

    def __init__(self, deadlock_after: float) -> None:
        self.findings = Findings()
        self.deadlock_after = deadlock_after
        self.lock = threading.Lock()
        self.memory: Any = None
        self.waits: dict[int, _Wait] = {}
        self.dmas: list[Any] = []
        self.synchronised = False  # all devices have passed the barrier before the kernel
        self.stalled: tuple[float, tuple[Any, ...]] | None = None

    # What the interpreter's own code calls instead of its own methods.

    def patches(self) -> Iterator[Any]:
        """The replacements, to be entered."""
        semaphore, memory = _private.shared_memory.Semaphore, _private.shared_memory.SharedMemory
        interpreter = _private.interpreter
        wait, failed = semaphore.wait, memory.set_failed
        clear, barrier, dma = (
            interpreter._clear_shared_memory,
            interpreter._update_clocks_for_global_barrier,
            interpreter.DMA,
        )
        started = self.start

        def watched_wait(this: Any, value: Any, core: Any, **options: Any) -> None:
            info = getattr(options.get("logging_info"), "source_info", None)
            with self.waiting(_Wait(this, int(core), int(value), _private.where(info))):
                wait(this, value, core, **options)

        def watched_failure(this: Any, exception: Exception, *args: Any, **options: Any) -> None:
            with self.lock:
                self.findings.failure = self.findings.failure or exception
            failed(this, exception, *args, **options)

        def watched_clear() -> None:
            self.end_of_kernel(interpreter._shared_memory)
            clear()

        def watched_barrier() -> None:
            self.synchronised = True
            barrier()

        class WatchedDma(dma):  # pyright: ignore[reportGeneralTypeIssues]
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                started(self)

        yield mock.patch.object(semaphore, "wait", watched_wait)
        yield mock.patch.object(memory, "set_failed", watched_failure)
        yield mock.patch.object(memory, "get_sempahores_with_nonzero_count", lambda *_: [])
        yield mock.patch.object(interpreter, "_clear_shared_memory", watched_clear)
        yield mock.patch.object(interpreter, "_update_clocks_for_global_barrier", watched_barrier)
        yield mock.patch.object(interpreter, "DMA", WatchedDma)

    @contextlib.contextmanager
    def waiting(self, wait: _Wait) -> Iterator[None]:
        """While a core waits."""
        with self.lock:
            self.memory = wait.semaphore.shared_memory
            self.waits[wait.core] = wait
        try:
            yield
        finally:
            with self.lock:
                self.waits.pop(wait.core, None)

    def start(self, dma: Any) -> None:
        """A DMA has been started."""
        self.dmas.append(dma)
        remote = dma.dst_device_id != dma.src_device_id
        clock = _private.clock(dma)
        if not remote or self.synchronised or not dma.detect_races or clock is None:
            return
        if clock[dma.dst_global_core_id] == 0:
            self.report(
                RemoteDmaBeforeBarrier(
                    f"device {dma.src_device_id} sends a DMA to device {dma.dst_device_id} without "
                    f"knowing that it has entered the kernel{_at(dma.source_info)}; wait for a "
                    "barrier semaphore first"
                )
            )

    def report(self, problem: InterpretError) -> None:
        """Notes a problem."""
        with self.lock:
            self.findings.problems.append(problem)

    def end_of_kernel(self, memory: Any) -> None:
        """All devices are done: whatever is still pending was forgotten."""
        if memory is not None and memory._failure is None:
            for dma in self.dmas:
                if dma.state is not _private.interpreter.DmaState.COMPLETED:
                    self.report(UnawaitedDma(f"{_describe(dma)} was never awaited"))
            for kind, table in (
                ("semaphore", memory.sem),
                ("barrier semaphore", memory.fixed_id_sem),
            ):
                for semaphore in table.values():
                    self.check_zero(kind, semaphore)
        self.dmas, self.waits = [], {}
        self.synchronised, self.memory = False, None

    def check_zero(self, kind: str, semaphore: Any) -> None:
        """Reports what is left in a semaphore."""
        users = [d for d in self.dmas if semaphore in (d.src_sem, d.dst_sem)]
        for core in np.flatnonzero(semaphore.count_by_core):
            count = int(semaphore.count_by_core[core])
            cause = f"; {_describe(users[-1])} signals it" if users else ""
            what = f"{kind} {semaphore.id} of core {core} ends at {count}, not 0"
            self.report(LeftoverSemaphore(what + cause))

    # The monitor.

    def monitor(self, closing: threading.Event) -> None:
        """Looks for deadlocks until the context closes."""
        while not closing.wait(self.deadlock_after / 4):
            with self.lock:
                memory, waits = self.memory, tuple(sorted(self.waits.items()))
            if memory is None or not waits or not self.stuck(memory, waits):
                self.stalled = None
            elif self.stalled is None or self.stalled[1] != waits:
                self.stalled = (time.monotonic(), waits)
            elif time.monotonic() - self.stalled[0] >= self.deadlock_after / 2:
                # Not top level: this thread must not take a device's place at the last barrier.
                memory.set_failed(Deadlock(_table(memory, waits)), top_level=False)
                with self.lock:
                    self.memory, self.waits = None, {}

    def stuck(self, memory: Any, waits: tuple[tuple[int, _Wait], ...]) -> bool:
        """Whether all cores wait, or have ended, and no wait can end."""
        at_barrier = memory.barrier.n_waiting + memory.clean_up_barrier.n_waiting
        idle = len(waits) + at_barrier * memory.num_cores_per_device
        if memory.num_cores_per_device > 1:  # cores of a device that have ended cannot be seen
            idle = memory.num_cores
        return idle >= memory.num_cores and all(wait.hopeless for _, wait in waits)


def _at(source_info: Any) -> str:
    place = _private.where(source_info)
    return f" at {place}" if place else ""


def _describe(dma: Any) -> str:
    devices = f"device {dma.src_device_id} to device {dma.dst_device_id}"
    return f"the DMA from {devices}{_at(dma.source_info)}"


def _table(memory: Any, waits: tuple[tuple[int, _Wait], ...]) -> str:
    rows = [("device", "core", "semaphore", "needs", "has", "where")]
    for core, wait in waits:
        device, local = memory.global_core_id_to_thread(core)
        barrier = wait.semaphore.id in memory.fixed_id_sem
        name = f"{wait.semaphore.id} (barrier)" if barrier else str(wait.semaphore.id)
        has = int(wait.semaphore.count_by_core[core])
        rows.append((str(device), str(local), name, str(wait.needs), str(has), wait.where))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (zip(row, widths, strict=True) for row in rows)
    text = "\n".join("  ".join(cell.ljust(w) for cell, w in line).rstrip() for line in lines)
    return f"every core waits and nothing will signal:\n{text}"


def _typed(failure: BaseException) -> InterpretError:
    text = str(failure)
    if isinstance(failure, InterpretError):
        return failure
    if "RACE DETECTED" in text:
        return Race(text)
    if isinstance(failure, IndexError) or "ut-of-bounds" in text or "out of bounds" in text:
        return OutOfBounds(text)
    return InterpretError(f"{type(failure).__name__}: {text}")


_open = threading.Lock()


@contextlib.contextmanager
def strict(
    mode: InterpretMode = InterpretMode(), *, deadlock_after: float = 0.4
) -> Iterator[Findings]:
    """Interprets every Pallas TPU kernel that is called within, and raises what it did wrong.

    Kernels end inside the context: leaving it waits for them. One context at a time.

    Args:
      mode: how to interpret; it also overrides the `interpret` argument of a `pallas_call`.
      deadlock_after: seconds in which nothing can happen any more before a deadlock is reported.

    Yields:
      What has been found so far.

    Raises:
      InterpretError: one of its subclasses, for the first thing that went wrong; where several
        things were left over at the end of a kernel, the others are in its notes.
    """
    if not _open.acquire(blocking=False):
        raise RuntimeError("interpret.strict does not nest")
    try:
        if moved := _private.self_test():
            raise RuntimeError(f"this JAX's interpreter cannot be watched: {'; '.join(moved)}")
        if not versions.has("interpreted faults"):
            warnings.warn(versions.lack("interpreted faults"), stacklevel=3)
        watch, closing = _Watch(deadlock_after), threading.Event()
        monitor = threading.Thread(target=watch.monitor, args=(closing,), daemon=True)
        with contextlib.ExitStack() as stack:
            for patch in watch.patches():
                stack.enter_context(patch)
            stack.enter_context(pltpu.force_tpu_interpret_mode(mode.params()))
            monitor.start()
            try:
                yield watch.findings
                jax.effects_barrier()
            except Exception as error:
                if watch.findings.failure is None:
                    raise
                raise watch.findings.verdict() from error
            finally:
                closing.set()
                monitor.join()
                if watch.findings.failure is not None:
                    reset()
        if watch.findings.failure is not None or watch.findings.problems:
            raise watch.findings.verdict()
    finally:
        _open.release()


def reset() -> None:
    """Forgets a run that failed, so that the next one starts clean."""
    with contextlib.suppress(Exception):
        jax.effects_barrier()
    _private.interpreter.reset_tpu_interpret_mode_state()


def assert_initialised(name: str, array: Any) -> None:
    """Raises `Uninitialised` if a floating-point result holds NaN, as unwritten memory does."""
    bad = np.isnan(np.asarray(array).astype(np.float64))
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise Uninitialised(f"{name} is NaN at {index}, {int(bad.sum())} elements in all")
