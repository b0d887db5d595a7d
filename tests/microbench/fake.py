"""A suite for a kernel small enough that the command line itself is what is tested."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from microbench.case import Call, Case, Check, Cost
from tpukit import interpret
from tpukit.errors import UnsupportedError

CASES = (
    Case("fake", "model/right", {"rows": 64, "lengths": (1, 2), "fault": "none"}),
    Case("fake", "model/other", {"rows": 128, "lengths": (), "fault": "none"}),
)
MORE: tuple[Case, ...] = ()


def double(x: jax.Array, rows: int, block: int) -> jax.Array:
    def kernel(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = x_ref[...] * 2

    return pl.pallas_call(
        kernel,
        grid=(rows // block,),
        in_specs=[pl.BlockSpec((block, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((block, 128), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        name="double",
    )(x)


def build(
    chip: str, rows: int, fault: str, block: int = 8
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    fn = too_large if fault == "memory" else functools.partial(double, rows=rows, block=block)
    return fn, (jax.ShapeDtypeStruct((rows, 128), jnp.float32),)


def too_large(x: jax.Array) -> jax.Array:
    def kernel(x_ref: Any, o_ref: Any, scratch: Any) -> None:
        scratch[0] = x_ref[...]
        o_ref[...] = scratch[0]

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM((1 << 14, *x.shape), jnp.float32)],
        name="too_large",
    )(x)


def inputs(case: Case, seed: int) -> tuple[Any, ...]:
    return (np.random.default_rng(seed).standard_normal((case.params["rows"], 128)),)


def check(case: Case, seed: int) -> list[Check]:
    match case.params["fault"]:
        case "wrong":
            return [Check("output", 0.5, 0.1, note="row 3 is off"), Check("state", 0.0, 0.0)]
        case "nan":
            return [Check("output", float("nan"), 0.1)]
        case "unsupported":
            raise UnsupportedError(where="fake", what="rows", place="this chip", why="it is a test")
        case "deadlock":
            raise interpret.Deadlock("nobody signals\nsemaphore 3 needs 1, has 0")
        case "interrupt" if case.name == "model/other":
            raise KeyboardInterrupt
    return [Check("output", 0.01, 0.1)]


def timed(case: Case) -> Case:
    return case


def chips(case: Case) -> tuple[str, ...]:
    del case
    return ("v5e", "v5p", "v6e", "tpu7x")


def reference_fn(case: Case) -> Callable[..., Any]:
    return jax.jit(lambda x: x * 2)


def kernel_fn(case: Case) -> Callable[..., Any]:
    raise AssertionError("a kernel is not timed where there is no TPU")


def aot_target(case: Case) -> tuple[str, dict[str, Any]]:
    kept = {k: case.params[k] for k in ("rows", "fault")}
    return "tests.microbench.fake:build", {**kept, **case.plan}


def steered(case: Case, seed: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    _, arguments = aot_target(case)
    return build("", **arguments)


def peers(case: Case, seed: int) -> dict[str, Call]:
    _, args = steered(case, seed)
    return {
        "XLA": (reference_fn(case), args),
        "nobody": (too_large, (jax.ShapeDtypeStruct((64, 128), jnp.float32),)),
    }


def cost(case: Case) -> Cost:
    rows = case.params["rows"]
    assert isinstance(rows, int)
    return Cost(flops=rows * 128.0, hbm_bytes=rows * 128 * 8.0)


@dataclasses.dataclass(frozen=True)
class Plan:
    block: int = 8


@dataclasses.dataclass(frozen=True)
class Explanation:
    plan: Plan

    def __str__(self) -> str:
        return f"rows of {self.plan.block}"


def explain(case: Case, chip: str) -> Explanation:
    fields: dict[str, Any] = dict(case.plan)
    if fields and fields["block"] % 8:
        raise UnsupportedError(where="fake", what=f"plan {fields}", place=chip, why="it is a test")
    return Explanation(Plan(**fields))


def figures(case: Case, report: Any) -> dict[str, float]:
    return {"bundles/row": report.kernels[0].bundles / 8}
