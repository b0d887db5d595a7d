"""The calls behind the published times: kernels of other projects, from their own packages.

tokamax (PyPI, Apache-2.0) publishes with its kernels the times it measured for them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from microbench.validation.rows import Row
from tpukit.errors import UnsupportedError

_OPS = "tokamax._src.ops"

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def build(row: Row) -> Call:
    """The function and the arguments of a row: shapes, and values where they steer a kernel.

    Raises:
      UnsupportedError: the package that holds the kernel is not installed.
    """
    if row.kernel in _OF_TOKAMAX and importlib.util.find_spec("tokamax") is None:
        raise UnsupportedError(
            where="validate",
            what=f"row {row.id}",
            place="this environment",
            why="its kernel is in tokamax, which is not installed",
            advice="Install it with pip install tokamax.",
        )
    return _BUILDERS[row.kernel](row)


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _grouped_matmul(row: Row) -> Call:
    ragged_dot = importlib.import_module(f"{_OPS}.ragged_dot.base")
    pallas_mosaic_tpu = importlib.import_module(f"{_OPS}.ragged_dot.pallas_mosaic_tpu")

    args, config, kind = row.args, dict(row.config), row.args["dims"]
    if kind == "dlhs":  # these times are of a version that named the two tiles the other way round
        config["tile_k"], config["tile_n"] = config["tile_n"], config["tile_k"]
    op = pallas_mosaic_tpu.PallasMosaicTpuRaggedDot(
        config=pallas_mosaic_tpu.Config(**config), bypass_device_check=True
    )
    dimensions = {
        "fwd": pallas_mosaic_tpu.DEFAULT_RAGGED_DOT_DIM_NUMS,
        "dlhs": pallas_mosaic_tpu.DLHS_RAGGED_DOT_DIM_NUMS,
        "drhs": pallas_mosaic_tpu.DRHS_RAGGED_DOT_DIM_NUMS,
    }[kind]
    groups = args["groups"]
    if isinstance(groups, dict):  # drawn as tokamax draws them
        groups = ragged_dot.generate_group_sizes(m=args["lhs"][0], num_groups=groups["count"])

    def fn(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> Any:
        return op(
            lhs,
            rhs,
            group_sizes=sizes,
            ragged_dot_dimension_numbers=dimensions,
            return_residuals=args["residuals"],
        )

    return fn, (_array(*args["lhs"]), _array(*args["rhs"]), jnp.asarray(groups, jnp.int32))


def _flash_attention(row: Row) -> Call:
    pallas_mosaic_tpu = importlib.import_module(f"{_OPS}.attention.pallas_mosaic_tpu")

    args = row.args
    op = pallas_mosaic_tpu.PallasMosaicTpuFlashAttention(
        config=pallas_mosaic_tpu.Config(**row.config), bypass_device_check=True
    )

    def fn(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return op(q, k, v, is_causal=args["causal"], return_residuals=args["residuals"])

    return fn, (_array(*args["q"]), _array(*args["k"]), _array(*args["v"]))


def _xla_matmul(row: Row) -> Call:
    size = row.args["size"]
    return lambda a, b: a @ b, (_array(size, size), _array(size, size))


def _hbm_copy(row: Row) -> Call:
    return jnp.copy, (_array(row.args["bytes"] // 2048, 1024),)


_OF_TOKAMAX = {"grouped_matmul": _grouped_matmul, "flash_attention": _flash_attention}
_BUILDERS: dict[str, Callable[[Row], Call]] = {
    **_OF_TOKAMAX,
    "xla_matmul": _xla_matmul,
    "hbm_copy": _hbm_copy,
}
