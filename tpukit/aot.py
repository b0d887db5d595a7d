"""Compiles for a TPU that is not present, and reports what the compiler made.

`compile_for` compiles in this process: is the kernel legal, does it fit, what does XLA put around
it. `static_report` compiles in a process of its own that dumps the final schedule, since libtpu
reads its flags only once, and returns the loops, slots and buffers of every kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from tpukit import _refusals, chips, errors, listing, sparse_listing
from tpukit._hlo_text import KERNEL_CALL, computations

_MODULE_NAME = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
# Opcodes that compute and move nothing themselves.
_FREE_OPCODES = frozenset(
    [
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
        *("call", "call-start", "call-update", "call-done"),
        *("async-start", "async-update", "async-done"),
    ]
)
_HLO_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class HloOp:
    """An operation that XLA runs beside the kernels: a copy, a transpose, a fusion, ...

    Attributes:
      name: its name in the program ("copy.3").
      opcode: what it is ("copy").
      shape: its result, layout and memory space included; `S(1)` is VMEM.
      core: what runs it, "tensorcore" or "sparsecore".
    """

    name: str
    opcode: str
    shape: str
    core: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled for a chip.

    Attributes:
      chip: its name.
      lower_seconds, compile_seconds: time taken here, tracing included in the first.
      code_bytes: size of the program.
      temp_bytes, argument_bytes, output_bytes: HBM of a device.
      hlo: the optimised program as text.
      executable: JAX's compiled object.
    """

    chip: str
    lower_seconds: float
    compile_seconds: float
    code_bytes: int
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    hlo: str
    executable: jax.stages.Compiled

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the Pallas kernels that run on the TensorCore."""
        return _kernel_names(self.hlo, "tensorcore")

    @property
    def sparse_kernels(self) -> tuple[str, ...]:
        """The names of the Pallas kernels that run on the SparseCore."""
        return _kernel_names(self.hlo, "sparsecore")

    @property
    def other_ops(self) -> tuple[HloOp, ...]:
        """What the program does besides running Pallas kernels."""
        return tuple(
            op
            for op, line in _hlo_ops(self.hlo)
            if op.opcode not in _FREE_OPCODES and KERNEL_CALL not in line
        )


@dataclasses.dataclass(frozen=True)
class StaticReport:
    """What the compiler made of a program, known without running it.

    Attributes:
      target: the function that built the program, "module:function".
      chip: the chip's name.
      kernels: its Pallas kernels on the TensorCore.
      sparse_kernels: those on the SparseCores.
      other_ops: what XLA runs beside them.
      lower_seconds, compile_seconds, code_bytes, temp_bytes, argument_bytes, output_bytes: as in
        `Compiled`.
      versions: of jax and libtpu.
    """

    target: str
    chip: str
    kernels: tuple[listing.Kernel, ...]
    sparse_kernels: tuple[sparse_listing.SparseKernel, ...]
    other_ops: tuple[HloOp, ...]
    lower_seconds: float
    compile_seconds: float
    code_bytes: int
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    versions: Mapping[str, str]

    def kernel(self, name: str) -> listing.Kernel:
        """Returns the kernel called `name`, with or without the compiler's number ("gla.1").

        Raises:
          KeyError: there is none, or several that differ only in that number.
        """
        found = [k for k in self.kernels if name in (k.name, re.sub(r"\.\d+$", "", k.name))]
        if len(found) != 1:
            names = [k.name for k in self.kernels]
            raise KeyError(f"{len(found)} kernels are called {name!r}; the program has {names}")
        return found[0]

    def to_json(self) -> str:
        """Returns it as JSON, keys sorted."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1)


def compile_for(
    fn: Callable[..., Any],
    *args: Any,
    chip: str,
    topology: str | None = None,
    mesh_axes: Mapping[str, int] | None = None,
    in_specs: Sequence[Any] | None = None,
    describe: str = "",
    plan: Any = None,
    fits: Callable[[int], Any] | None = None,
    static: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles `fn` for a chip that need not be present.

    Args:
      fn: a function, jitted or not.
      *args: its arguments: trees of arrays or `jax.ShapeDtypeStruct`, for shapes and dtypes.
      chip: a name in `chips.CHIPS`.
      topology: the devices to compile for; the chip's smallest topology unless given.
      mesh_axes: name and size of each mesh axis over those devices; one device unless given.
      in_specs: a partition of each argument over `mesh_axes`, or a tree of them that is a prefix of
        the argument; None is replicated.
      describe: what is compiled, for error messages about kernels that have no name.
      plan: the block sizes in use, for error messages.
      fits: given the bytes of VMEM there are, returns the nearest plan that fits or None.
      static: keyword arguments that are not arrays.

    Raises:
      KernelResourceError: a kernel needs more VMEM or SMEM than there is.
      KernelCompileError: the compiler refuses a kernel.
      ToolchainError: libtpu is missing, locked or broken.
      ArgumentError: `chip`, `topology` or the mesh is not possible.
    """
    entry = chips.chip(chip)
    devices = _devices(entry.name, topology or entry.topology)
    mesh = _mesh(devices, mesh_axes)
    shaped = _with_shardings(args, mesh, devices, mesh_axes, in_specs)
    static = static or {}
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn, static_argnames=tuple(static))
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            begin = time.perf_counter()
            lowered = jitted.lower(*shaped, **static)  # type: ignore[attr-defined]
        middle = time.perf_counter()
        executable = lowered.compile()
        end = time.perf_counter()
    except Exception as error:
        translated = _refusals.translate(error, entry.name, describe, plan, fits)
        if translated is None:
            raise
        raise translated from error
    memory: Any = executable.memory_analysis()
    return Compiled(
        chip=entry.name,
        lower_seconds=middle - begin,
        compile_seconds=end - middle,
        code_bytes=memory.generated_code_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        hlo=str(executable.as_text()),
        executable=executable,
    )


def devices(chip: str, topology: str | None = None) -> tuple[Any, ...]:
    """The devices of a topology, the chip's smallest unless given; none of them need exist."""
    return _devices(chip, topology or chips.chip(chip).topology)


def traced_for(fn: Any, args: Any, chip: str, options: Mapping[str, Any]) -> Any:
    """What `compile_for` would lower, traced: arguments and options are the same."""
    here = devices(chip, options.get("topology"))
    axes = options.get("mesh_axes")
    mesh = _mesh(here, axes)
    shaped = _with_shardings(args, mesh, here, axes, options.get("in_specs"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return fn.trace(*shaped)


@contextlib.contextmanager
def as_if_on(chip: str) -> Iterator[None]:
    """Lets code that asks for the TPU's figures (`pltpu.get_tpu_info`) see those of `chip`."""
    entry = chips.chip(chip)
    mesh = _mesh(_devices(entry.name, entry.topology), None)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def static_report(target: str, chip: str, *, timeout: float = 600.0, **kwargs: Any) -> StaticReport:
    """Compiles a program in a process of its own and reads the compiler's dumps.

    Args:
      target: "package.module:function". The function is called with `chip` and `kwargs` and
        returns `(fn, args)`, or `(fn, args, options)` with keyword arguments of `compile_for`.
      chip: a name in `chips.CHIPS`.
      timeout: seconds the process may take.
      **kwargs: plain values (they travel as JSON).

    Raises:
      KernelResourceError, KernelCompileError, ToolchainError: as `compile_for` does.
      ArgumentError: `target` names no function, or `kwargs` are not plain values.
      ListingError: a dump was not understood.
      RuntimeError: the target function failed; the message holds its traceback.
    """
    entry = chips.chip(chip)
    with tempfile.TemporaryDirectory() as folder:
        result = compile_and_dump(target, chip, Path(folder), timeout=timeout, **kwargs)
        kernels = listing.parse_directory(Path(folder), result.pop("kernels"), entry)
        names = result.pop("sparse_kernels")
        sparse_kernels = sparse_listing.parse_directory(Path(folder), names)
    del result["hlo"]
    other_ops = tuple(HloOp(**op) for op in result.pop("other_ops"))
    return StaticReport(
        target=target,
        chip=entry.name,
        kernels=kernels,
        sparse_kernels=sparse_kernels,
        other_ops=other_ops,
        **result,
    )


def compile_and_dump(
    target: str, chip: str, folder: Path, *, timeout: float = 600.0, **kwargs: Any
) -> dict[str, Any]:
    """Compiles a program in a process of its own that leaves the compiler's dumps in `folder`.

    Args and errors are those of `static_report`.

    Returns:
      The names of the kernels, the program as text ("hlo"), and the figures of `StaticReport`.
    """
    if not _MODULE_NAME.match(target):
        raise _target_error(target, "a name like package.module:function")
    try:
        request = json.dumps({"target": target, "chip": chips.chip(chip).name, "kwargs": kwargs})
    except TypeError as error:
        raise _target_error(f"{target} with {kwargs}", "arguments that JSON can hold") from error
    return _run_worker(request, folder, timeout)


def static_reports(
    target: str, chip_names: Sequence[str], **kwargs: Any
) -> dict[str, StaticReport]:
    """Returns the `static_report` of each chip, made one after another."""
    return {name: static_report(target, name, **kwargs) for name in chip_names}


def _target_error(target: str, expected: str) -> errors.ArgumentError:
    return errors.ArgumentError(
        where="static_report", argument="target", got=f"is {target!r}", expected=expected
    )


def _run_worker(request: str, folder: Path, timeout: float) -> dict[str, Any]:
    environment = dict(os.environ)
    environment["JAX_PLATFORMS"] = "cpu"
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=.*(final|profile|vmem).* "
        f"--xla_sc_dump_bundles_to={folder}"
    )
    command = [sys.executable, "-m", "tpukit._aot_worker"]
    try:
        done = subprocess.run(
            command,
            input=request,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        what = f"compiling in a process of its own took more than {timeout:g} s"
        raise errors.ToolchainError(what=what) from error
    answer = folder / "answer.json"
    if not answer.exists():
        tail = " | ".join(done.stderr.strip().splitlines()[-3:])
        what = f"the compiling process ended with code {done.returncode} and no answer: {tail}"
        raise errors.ToolchainError(what=what)
    result = json.loads(answer.read_text())
    if "traceback" in result:
        raise RuntimeError(f"the target function failed:\n{result['traceback']}")
    if "error" in result:
        raise getattr(errors, result["error"])(**result["fields"])
    return result


@functools.cache
def _devices(chip: str, topology: str) -> tuple[Any, ...]:
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/*"):
        # Without a TPU, libtpu must not look for one, nor lock out a second process.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    expected = f"a topology of {chip}, such as {chips.chip(chip).topology!r}"
    wrong = errors.ArgumentError(
        where="compile_for", argument="topology", got=f"is {topology!r}", expected=expected
    )
    if not topology.startswith(f"{chip}:"):
        raise wrong
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:
        if "INVALID_ARGUMENT: Invalid" in str(error):
            raise wrong from error
        raise _toolchain_error(error) from error
    return tuple(devices)


def _toolchain_error(error: Exception) -> errors.ToolchainError:
    known = _refusals.translate(error, "", "", None, None)
    if isinstance(known, errors.ToolchainError):
        return known
    text = " ".join(str(error).split())
    advice = "Install it with pip install 'jax[tpu]'."
    return errors.ToolchainError(what=f"libtpu does not load: {text[:300]}", advice=advice)


def _mesh(devices: Sequence[Any], mesh_axes: Mapping[str, int] | None) -> Mesh:
    axes = dict(mesh_axes or {"device": 1})
    count = int(np.prod(list(axes.values())))
    if not 1 <= count <= len(devices):
        raise errors.ArgumentError(
            where="compile_for",
            argument="mesh_axes",
            got=f"is {axes}, {count} devices",
            expected=f"1 to {len(devices)} devices",
            advice="Name a larger topology.",
        )
    shape = tuple(axes.values())
    return Mesh(np.array(devices[:count], dtype=object).reshape(shape), tuple(axes))


def _with_shardings(
    args: Sequence[Any],
    mesh: Mesh,
    devices: Sequence[Any],
    mesh_axes: Mapping[str, int] | None,
    in_specs: Sequence[Any] | None,
) -> list[Any]:
    specs = list(in_specs) if in_specs is not None else [None] * len(args)
    if len(specs) != len(args) or (in_specs is not None and mesh_axes is None):
        raise errors.ArgumentError(
            where="compile_for",
            argument="in_specs",
            got=f"has {len(specs)} entries",
            expected=f"one for each of the {len(args)} arguments, and mesh_axes",
        )

    def is_spec(tree: Any) -> bool:
        return isinstance(tree, PartitionSpec)

    def shaped(leaf: Any, sharding: Sharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    result = []
    for arg, spec in zip(args, specs, strict=True):
        if mesh_axes is None:
            alone = SingleDeviceSharding(devices[0])
            result.append(jax.tree.map(functools.partial(shaped, sharding=alone), arg))
            continue
        spec = PartitionSpec() if spec is None else spec
        sharding = jax.tree.map(functools.partial(NamedSharding, mesh), spec, is_leaf=is_spec)
        result.append(jax.tree.map(shaped, arg, jax.tree.broadcast(sharding, arg)))
    return result


def _hlo_ops(hlo: str) -> list[tuple[HloOp, str]]:
    """The operations of the program with their lines, without those inside fusions and the like."""
    every = [(one, op) for one in computations(hlo) for op in one.operations]
    inlined = {
        called
        for _, op in every
        if op.opcode not in _FREE_OPCODES
        for called in _HLO_CALLED.findall(op.line)
    }
    return [
        (HloOp(name=op.name, opcode=op.opcode, shape=op.result, core=one.core), op.line)
        for one, op in every
        if one.name not in inlined
    ]


def _kernel_names(hlo: str, core: str) -> tuple[str, ...]:
    return tuple(op.name for op, line in _hlo_ops(hlo) if KERNEL_CALL in line and op.core == core)
