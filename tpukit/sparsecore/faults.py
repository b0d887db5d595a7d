"""What the simulator finds wrong with a kernel."""

from __future__ import annotations


class SimulationError(RuntimeError):
    """A kernel did what it must not do, or what the simulator does not know.

    Attributes:
      what: what is wrong.
      core: the core that did it, "" where none did.
      line: the user's source line, "" where it is not known.
    """

    def __init__(self, what: str, *, core: str = "", line: str = "") -> None:
        self.what = what
        self.core = core
        self.line = line
        super().__init__(": ".join(part for part in (core, line, what) if part))


class UnmodelledError(SimulationError):
    """An operation that the simulator does not know."""


class InFlightError(SimulationError):
    """Memory of a transfer is touched before the transfer is awaited."""


class NotAwaitedError(SimulationError):
    """A kernel ends with transfers that nobody awaited, or with semaphores that are not 0."""


class DeadlockError(SimulationError):
    """All cores that are left wait for what nobody does."""


class OutOfBoundsError(SimulationError):
    """An address outside its array."""


class UnwrittenError(SimulationError):
    """An output that the kernel leaves unwritten, in whole or in part."""


class CarriedError(SimulationError):
    """An iteration of a parallel loop touches what another one writes."""


class MemoryFullError(SimulationError):
    """The scratch memory of a core is too small for a kernel."""


class RaceError(SimulationError):
    """Two cores touch one address, one of them to write, and nothing orders them."""
