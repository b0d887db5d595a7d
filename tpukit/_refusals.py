"""Translates what the TPU compiler says when it refuses a program."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax

from tpukit import errors

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_ALLOCATION = re.compile(
    r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)"
    r"(?: :: #\S+ \[shape = '([^']*)', space=(\w+),.*?tag = '([^']*)'\])?(?: :: (\S+))?"
)
_SCOPED = re.compile(
    r"memory space (\w+) while allocating on stack for %?(\S+) = .*?"
    r"Scoped allocation with size ([\d.]+)([KMG]?)B? and limit ([\d.]+)([KMG]?)B?",
    re.DOTALL,
)
_PROGRAM = re.compile(
    r"Ran out of memory in memory space (\w+)\. Used ([\d.]+)([KMG]?)B? of ([\d.]+)([KMG]?)B?"
)
_HBM = re.compile(
    r"Ran out of memory on HBM, .*?\(([\d.]+)([KMGT]?)B?\) exceeds available HBM "
    r"\(([\d.]+)([KMGT]?)B?\)"
)
_LABEL = re.compile(r"XLA label: (\S+) = ")
_MOSAIC = re.compile(
    r"Mosaic failed to compile TPU kernel(?: with MLIR module name `(\S*)` HLO name `\S*`)?:? ?"
)
_OPERATION = re.compile(r"(?:The MLIR operation involved|see current operation):\s*(.+)")
_LOWERING = re.compile(r"Pallas TPU lowering|Pallas lowering|Unimplemented primitive|Mosaic")
_APPEAL = re.compile(r" Please file an? (?:bug|issue) at \S+")
_PRIMITIVE = re.compile(r"Unimplemented primitive in Pallas TPU lowering for \w+: ([\w\-]+)")


def translate(
    error: Exception,
    chip: str,
    describe: str,
    plan: Any,
    fits: Callable[[int], Any] | None,
) -> Exception | None:
    """Returns our exception for one of JAX's or libtpu's, or None where it is not about a kernel.

    Args:
      error: what was raised while lowering or compiling.
      chip: the chip's name.
      describe: what was compiled, where the compiler names no kernel.
      plan: the block sizes in use, for the message.
      fits: given the bytes of VMEM there are, returns the nearest plan that fits or None.
    """
    text = str(error)
    if "lockfile" in text and "libtpu" in text:
        advice = "Set ALLOW_MULTIPLE_LIBTPU_LOAD=1 before JAX is imported."
        return errors.ToolchainError(what="another process holds libtpu", advice=advice)
    if "RESOURCE_EXHAUSTED" in text:
        found = _resource(text)
        if found is not None:
            limit = found["limit"]
            return errors.KernelResourceError(
                **{**found, "kernel": found["kernel"] or describe or "program"},
                chip=chip,
                plan=plan,
                fits=fits(limit) if fits is not None and found["space"] == "vmem" else None,
            )
    # Pallas's own error classes are private; their names are not.
    if type(error).__name__ in ("MosaicError", "VerificationError") or _refused(error):
        return _mosaic(text, chip, describe)
    if isinstance(error, NotImplementedError | ValueError) and _LOWERING.search(text):
        primitive = _PRIMITIVE.search(text)
        return errors.KernelCompileError(
            kernel=describe,
            chip=chip,
            reason=_sentence(text),
            operation=primitive[1] if primitive else "",
        )
    return None


def _refused(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(
        ("INTERNAL", "UNIMPLEMENTED", "INVALID_ARGUMENT")
    )


def _mosaic(text: str, chip: str, describe: str) -> errors.KernelCompileError:
    match = _MOSAIC.search(text)
    operation = _OPERATION.search(text)
    return errors.KernelCompileError(
        kernel=(match[1] if match and match[1] else "") or describe,
        chip=chip,
        reason=_sentence(text[match.end() :] if match else text),
        operation=operation[1].strip() if operation else "",
    )


def _sentence(text: str) -> str:
    first = _APPEAL.sub("", text.strip().split("\n")[0]).strip()
    return first.rstrip(".") if first else "no reason given"


def _resource(text: str) -> dict[str, Any] | None:
    match = _ALLOCATION.search(text)
    if match is not None:
        shape, tag = match[3] or "", match[5] or ""
        what = f"{shape} ({tag})" if shape else ""
        kernel = _plain(match[6] or "")
        space = match[4] or "vmem"
        asked, limit = int(match[1]), int(match[2])
        return {"kernel": kernel, "space": space, "asked": asked, "limit": limit, "what": what}
    match = _SCOPED.search(text)
    if match is not None:
        asked, limit = _bytes(match[3], match[4]), _bytes(match[5], match[6])
        what = "all buffers of the kernel, against its scoped limit (vmem_limit_bytes)"
        kernel = _plain(match[2])
        return {"kernel": kernel, "space": match[1], "asked": asked, "limit": limit, "what": what}
    match = _PROGRAM.search(text)
    if match is not None:
        asked, limit = _bytes(match[2], match[3]), _bytes(match[4], match[5])
        label = _LABEL.search(text)
        kernel = _plain(label[1]) if label else ""
        return {"kernel": kernel, "space": match[1], "asked": asked, "limit": limit, "what": ""}
    match = _HBM.search(text)
    if match is not None:
        asked, limit = _bytes(match[1], match[2]), _bytes(match[3], match[4])
        return {"kernel": "", "space": "hbm", "asked": asked, "limit": limit, "what": ""}
    return None


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def _plain(name: str) -> str:
    return re.sub(r"\.\d+$", "", name)
