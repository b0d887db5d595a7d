"""The exceptions of this library: each says who refused what, why, and what to do about it.

Every class is built from keyword fields and derives its message from them, so that an error can be
inspected by a program as well as read by a person.
"""

from __future__ import annotations

from typing import Any

_UNITS = (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024))


def _readable(count: int) -> str:
    for unit, size in _UNITS:
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


class ArgumentError(ValueError):
    """An argument that can never work, whatever the chip.

    Attributes:
      where: the public function, such as "gla".
      argument: the name of the argument.
      got: what was passed, as a verb phrase ("has dtype float16").
      expected: what would be right ("bfloat16 or float32").
      advice: what to do, a sentence, or "".
    """

    def __init__(
        self, *, where: str, argument: str, got: str, expected: str, advice: str = ""
    ) -> None:
        self.where = where
        self.argument = argument
        self.got = got
        self.expected = expected
        self.advice = advice
        tail = f" {advice}" if advice else ""
        super().__init__(f"{where}: {argument} {got}; needs {expected}.{tail}")


class UnsupportedError(NotImplementedError, ValueError):
    """A valid request that cannot run in this place.

    Attributes:
      where: the public function.
      what: what was asked for ("float8_e4m3b11fnuz weights").
      place: where it cannot run ("tpu7x").
      why: the reason, a clause.
      advice: what to do instead, a sentence, or "".
    """

    def __init__(self, *, where: str, what: str, place: str, why: str, advice: str = "") -> None:
        self.where = where
        self.what = what
        self.place = place
        self.why = why
        self.advice = advice
        tail = f" {advice}" if advice else ""
        super().__init__(f"{where}: {what} cannot run on {place}: {why}.{tail}")


class KernelResourceError(ValueError):
    """The compiler ran out of memory for a kernel, or for the program around it.

    Attributes:
      kernel: the name of the kernel, as given to `pallas_call`.
      chip: the name of the chip.
      space: the memory that ran out: "vmem", "smem" or "hbm".
      asked: bytes the kernel needs, as the compiler counts them when it gives up.
      limit: bytes it may use.
      what: the allocation that did not fit, in the compiler's words, or "".
      plan: the block sizes the kernel was built with, or None.
      fits: the nearest block sizes that fit, or None where none is known.
    """

    def __init__(
        self,
        *,
        kernel: str,
        chip: str,
        space: str,
        asked: int,
        limit: int,
        what: str = "",
        plan: Any = None,
        fits: Any = None,
    ) -> None:
        self.kernel = kernel
        self.chip = chip
        self.space = space
        self.asked = asked
        self.limit = limit
        self.what = what
        self.plan = plan
        self.fits = fits
        message = (
            f"{kernel}: needs {_readable(asked)} of {space.upper()} on {chip}, "
            f"where the limit is {_readable(limit)}."
        )
        if what:
            message += f" It was allocating: {what}."
        if plan is not None:
            message += f" The plan was {plan}."
        advice = "Shard it or use smaller inputs." if space == "hbm" else "Use smaller blocks."
        nearest = f"The nearest plan that fits is {fits}." if fits is not None else ""
        message += f" {nearest or advice}"
        super().__init__(message)


class KernelCompileError(ValueError):
    """The compiler refused a kernel for a reason other than memory.

    Attributes:
      kernel: the name of the kernel, "" where the compiler does not say.
      chip: the name of the chip.
      reason: the compiler's reason, one line.
      operation: the MLIR operation or JAX primitive that was refused, or "".
    """

    def __init__(self, *, kernel: str, chip: str, reason: str, operation: str = "") -> None:
        self.kernel = kernel
        self.chip = chip
        self.reason = reason
        self.operation = operation
        tail = f" The operation is {operation}" if operation else ""
        super().__init__(f"{kernel or 'kernel'}: does not compile for {chip}: {reason}.{tail}")


class ToolchainError(RuntimeError):
    """The environment is at fault, not the kernel: libtpu is missing, locked or broken.

    Attributes:
      what: what went wrong.
      advice: what to do, a sentence, or "".
    """

    def __init__(self, *, what: str, advice: str = "") -> None:
        self.what = what
        self.advice = advice
        super().__init__(f"{what}. {advice}".rstrip())


class ListingError(ValueError):
    """A compiler dump holds something its parser does not know; no figure is made up from it.

    Attributes:
      file: the name of the dump.
      line: its line number, 0 where the file as a whole is at fault.
      what: what was not understood.
    """

    def __init__(self, *, file: str, line: int, what: str) -> None:
        self.file = file
        self.line = line
        self.what = what
        super().__init__(f"{file}:{line}: {what}")


class ReplayError(RuntimeError):
    """A replay of a schedule that cannot be right: it stops, and gives no number.

    Attributes:
      kernel: the name of the schedule.
      address: of the bundle at fault, or None.
      what: what is wrong.
    """

    def __init__(self, *, kernel: str, address: int | None, what: str) -> None:
        self.kernel = kernel
        self.address = address
        self.what = what
        place = "" if address is None else f", bundle {address:#x}"
        super().__init__(f"{kernel}{place}: {what}")


class TableError(ValueError):
    """A block-size table holds something that its schema does not allow.

    Attributes:
      file: the name of the table.
      entry: the number of the entry, None where the table as a whole is at fault.
      what: what is wrong.
    """

    def __init__(self, *, file: str, entry: int | None, what: str) -> None:
        self.file = file
        self.entry = entry
        self.what = what
        place = "" if entry is None else f", entry {entry}"
        super().__init__(f"{file}{place}: {what}")
