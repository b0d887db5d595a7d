"""The process behind `aot.static_report`: reads a request, compiles, writes `answer.json`.

It exists because libtpu reads LIBTPU_INIT_ARGS, which name the dump directory, once per process.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from tpukit import aot, errors


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    module, _, name = request["target"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise errors.ArgumentError(
            where="static_report",
            argument="target",
            got=f"is {request['target']!r} ({error})",
            expected="a function that can be imported",
        ) from error
    with aot.as_if_on(request["chip"]):
        fn, args, *rest = function(chip=request["chip"], **request["kwargs"])
    compiled = aot.compile_for(fn, *args, chip=request["chip"], **(rest[0] if rest else {}))
    return {
        "kernels": compiled.kernels,
        "sparse_kernels": compiled.sparse_kernels,
        "other_ops": [dataclasses.asdict(op) for op in compiled.other_ops],
        "hlo": compiled.hlo,
        "lower_seconds": compiled.lower_seconds,
        "compile_seconds": compiled.compile_seconds,
        "code_bytes": compiled.code_bytes,
        "temp_bytes": compiled.temp_bytes,
        "argument_bytes": compiled.argument_bytes,
        "output_bytes": compiled.output_bytes,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }


def main() -> None:
    """Answers the request on standard input in the directory that libtpu dumps to."""
    folder = re.search(r"--xla_jf_dump_to=(\S+)", os.environ["LIBTPU_INIT_ARGS"])
    if folder is None:
        raise errors.ToolchainError(what="LIBTPU_INIT_ARGS names no dump directory")
    try:
        answer = _answer(json.load(sys.stdin))
    except (
        errors.ArgumentError,
        errors.KernelResourceError,
        errors.KernelCompileError,
        errors.ToolchainError,
    ) as error:
        fields = {key: _plain(value) for key, value in vars(error).items()}
        answer = {"error": type(error).__name__, "fields": fields}
    except Exception:  # noqa: BLE001  (whatever the target function raises must reach the caller)
        answer = {"traceback": traceback.format_exc()}
    (Path(folder[1]) / "answer.json").write_text(json.dumps(answer))


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else str(value)


if __name__ == "__main__":
    main()
