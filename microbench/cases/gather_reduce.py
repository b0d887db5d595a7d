"""The combine step of mixture-of-experts layers, per device.

Sizes are those of the published models: DeepSeek-V3 (hidden 7168, 8 of 256 experts), DeepSeek-V2-
Lite (2048, 6), gpt-oss-120b (2880, 4). Dense: a device has rows of every expert. Ragged: it has the
experts of one of 2 or of 16 devices. Rows arrive packed, and weighted by their producer where the
case says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gather_reduce
from gather_reduce.api import problem_of
from gather_reduce.plan import Problem, plan_for, work_of
from microbench.case import Call, Case, Check, Cost
from reference import gather_reduce as reference
from reference.gather_reduce import PackedRows, pack_columns
from tpukit import sparsecore
from tpukit.chips import chip as chip_named

Spec = jax.ShapeDtypeStruct

_SIZES = {
    "deepseek-v3": {"tokens": 2048, "top_k": 8, "hidden_size": 7168},
    "deepseek-v2-lite": {"tokens": 1000, "top_k": 6, "hidden_size": 2048},
    "gpt-oss-120b": {"tokens": 1024, "top_k": 4, "hidden_size": 2880},
}


def _case(model: str, name: str, **changes: Any) -> Case:
    usual = {"rows": "packed bfloat16", "weighted": True, "devices_sharing": 1}
    return Case("gather_reduce", f"{model}/{name}", {**_SIZES[model], **usual, **changes})


CASES = (
    _case("deepseek-v3", "dense"),
    _case("deepseek-v3", "pre-weighted", weighted=False),
    _case("deepseek-v3", "plain rows", rows="bfloat16"),
    _case("deepseek-v3", "float8", rows="packed float8_e4m3fn", scaled=True),
    _case("deepseek-v3", "ragged 2", devices_sharing=2),
    _case("deepseek-v3", "ragged 16", devices_sharing=16),
    _case("deepseek-v3", "small", tokens=256),
    _case("deepseek-v2-lite", "dense"),
    _case("gpt-oss-120b", "dense"),
)
MORE = ()


@dataclasses.dataclass(frozen=True)
class Shape:
    """The parameters of a case; `devices_sharing` is 1 where all rows are valid.

    `scaled` is whether rows have scales, as those of narrow types have.
    """

    tokens: int
    top_k: int
    hidden_size: int
    rows: str
    weighted: bool
    devices_sharing: int
    scaled: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of x: one for each term."""
        return self.tokens * self.top_k

    @property
    def dtype(self) -> Any:
        """Of a row's elements."""
        return jnp.dtype(self.rows.removeprefix("packed "))

    def specs(self) -> tuple[Any, ...]:
        """Shapes of x, indices, and of weights, row scales and valid where there are any."""
        x: Any = Spec((self.num_rows, self.hidden_size), self.dtype)
        if self.rows.startswith("packed"):
            words = jax.eval_shape(pack_columns, x).words
            x = PackedRows(words, self.hidden_size, self.dtype.name)
        size = (self.tokens, self.top_k)
        weights = [Spec(size, jnp.float32)] if self.weighted else []
        scales = [Spec((self.num_rows,), jnp.float32)] if self.scaled else []
        valid = [Spec(size, jnp.bool_)] if self.devices_sharing > 1 else []
        return x, Spec(size, jnp.int32), *weights, *scales, *valid


def shape_of(case: Case) -> Shape:
    """The parameters of a case."""
    params: dict[str, Any] = dict(case.params)
    return Shape(**params)


def _call(shape: Shape, run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`run(x, indices, weights, valid, row_scales=...)` on the arrays of a case."""

    def fn(x: Any, indices: jax.Array, *rest: jax.Array) -> jax.Array:
        optional = list(rest)
        weights = optional.pop(0) if shape.weighted else None
        scales = optional.pop(0) if shape.scaled else None
        return run(x, indices, weights, optional[0] if optional else None, row_scales=scales)

    return fn


def _kernel(fields: Mapping[str, Any]) -> Callable[..., jax.Array]:
    """The kernel with a case's plan, or its own where there are no fields."""
    options: dict[str, Any] = {"implementation": "pallas"}
    options["plan"] = gather_reduce.Plan(**fields) if fields else None

    def fn(x: Any, indices: jax.Array, weights: Any, valid: Any, row_scales: Any) -> jax.Array:
        given = options | {"row_scales": row_scales}
        if valid is None:
            return gather_reduce.dense_gather_reduce(x, indices, weights, **given)
        return gather_reduce.ragged_gather_reduce(x, indices, weights, valid, **given)

    return fn


def inputs(case: Case, seed: int) -> tuple[Any, ...]:
    """See `microbench.case.Suite`, as for all that follows."""
    return _inputs(shape_of(case), seed)


def _inputs(shape: Shape, seed: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    size = (shape.tokens, shape.top_k)
    x = rng.standard_normal((shape.num_rows, shape.hidden_size), np.float32)
    rows = jnp.asarray(x, shape.dtype)
    packed = pack_columns(rows) if shape.rows.startswith("packed") else rows
    indices = jnp.asarray(rng.permutation(shape.num_rows).reshape(size), jnp.int32)
    weights = [jnp.asarray(rng.random(size, np.float32))] if shape.weighted else []
    local = rng.integers(0, shape.devices_sharing, size) == 0
    valid = [jnp.asarray(local)] if shape.devices_sharing > 1 else []
    scales = [jnp.asarray(rng.random(shape.num_rows, np.float32))] if shape.scaled else []
    return packed, indices, *weights, *scales, *valid


def timed(case: Case) -> Case:
    """On a CPU, at most 256 tokens."""
    if jax.default_backend() == "tpu":
        return case
    tokens = min(shape_of(case).tokens, 256)
    return dataclasses.replace(case, params={**case.params, "tokens": tokens})


def chips(case: Case) -> tuple[str, ...]:
    """Those with SparseCores."""
    del case
    return gather_reduce.SUPPORTED_CHIPS


def reference_fn(case: Case) -> Callable[..., Any]:
    """The specification."""
    return jax.jit(_call(shape_of(case), reference.gather_reduce))


def kernel_fn(case: Case) -> Callable[..., Any]:
    """The kernel on this machine's TPU."""
    return jax.jit(_call(shape_of(case), _kernel(case.plan)))


def check(case: Case, seed: int) -> list[Check]:
    """Bit for bit; on a TPU at full size, elsewhere on simulated SparseCores, with bytes moved."""
    shape = shape_of(case)
    if jax.default_backend() == "tpu":
        args = _inputs(shape, seed)
        return [_same(shape, args, kernel_fn(case)(*args))]
    shape = dataclasses.replace(shape, tokens=min(shape.tokens, 64), hidden_size=512)
    args = _inputs(shape, seed)
    try:
        kernel = _call(shape, _kernel(case.plan))
        found = sparsecore.simulate(kernel, *args, timing="random", seed=seed)
    except sparsecore.faults.SimulationError as error:
        return [Check(f"runs: {type(error).__name__}", float("inf"), 0.0, note=str(error))]
    (kernel,) = found.kernels
    entries = _entry_bytes(shape)
    read = kernel.total("hbm_read") / (_gathered_bytes(shape, args) + entries)
    limit = 2.2 if shape.rows == "bfloat16" else 1.1  # rows of bfloat16 share words in pairs
    written = kernel.total("hbm_written") / (shape.tokens * shape.hidden_size * 2)
    return [
        _same(shape, args, found.out),
        Check("bytes read / of valid rows and entries", read, limit),
        Check("bytes written / of the result", written, 1.0),
    ]


def _same(shape: Shape, args: tuple[Any, ...], found: Any) -> Check:
    """Elements that are not those of the specification, operation by operation."""
    right = _call(shape, reference.gather_reduce)(*args)
    wrong = np.sum(np.asarray(right, np.float32) != np.asarray(found, np.float32))
    return Check("elements that differ", float(wrong), 0.0)


def _gathered_bytes(shape: Shape, args: tuple[Any, ...]) -> int:
    valid = int(np.sum(args[-1])) if shape.devices_sharing > 1 else shape.num_rows
    return valid * shape.hidden_size * shape.dtype.itemsize


def _entry_bytes(shape: Shape) -> int:
    """Indices, and factors where there are any."""
    return 4 * shape.num_rows * (2 if shape.weighted or shape.scaled else 1)


def aot_target(case: Case) -> tuple[str, dict[str, Any]]:
    """Names `build`."""
    return "microbench.cases.gather_reduce:build", {**case.params, "plan": dict(case.plan)}


def build(
    chip: str, plan: Mapping[str, Any], **params: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The full-size call, for a chip that need not be present."""
    del chip  # the kernel asks what it is compiled for
    shape = Shape(**params)
    return jax.jit(_call(shape, _kernel(plan))), shape.specs()


def steered(case: Case, seed: int) -> None:
    """Schedules of SparseCores are not replayed."""
    del case, seed


def peers(case: Case, seed: int) -> dict[str, Call]:
    """None: the kernel's own time is not predicted."""
    del case, seed
    return {}


def cost(case: Case) -> Cost:
    """Valid rows, indices and factors read once, the result written once; no matrix products."""
    shape = shape_of(case)
    row = shape.hidden_size * shape.dtype.itemsize
    rows = shape.num_rows / shape.devices_sharing
    scales = 4 * shape.num_rows if shape.scaled else 0
    moved = rows * row + _entry_bytes(shape) + scales + shape.tokens * shape.hidden_size * 2
    return Cost(flops=0.0, hbm_bytes=moved)


def explain(case: Case, chip: str) -> gather_reduce.Explanation:
    """What the kernel would run on the SparseCores, even where XLA is expected to be quicker."""
    plan = gather_reduce.Plan(**dict[str, Any](case.plan)) if case.plan else None
    return plan_for(problem_in(case), chip_named(chip), plan, sparse_only=True)


def problem_in(case: Case) -> Problem:
    """The static problem of a case."""
    shape = shape_of(case)
    x, indices, *rest = shape.specs()
    weights = rest.pop(0) if shape.weighted else None
    scales = rest.pop(0) if shape.scaled else None
    valid = rest[0] if rest else None
    return problem_of("microbench", x, indices, weights, valid, scales, None)


def figures(case: Case, report: Any) -> dict[str, float]:
    """Bundles of the loops over columns, and of a whole call on one subcore."""
    loops = column_loops(report)
    few = {} if loops.few is None else {"where 2 rows count": loops.few}
    return {
        "bundles/vector": loops.clean,
        "where rows do not count": loops.masked,
        **few,
        "bundles/subcore": bundles(case, report),
    }


def subcores(report: Any) -> Any:
    """The program of the vector subcores in a `tpukit.aot.StaticReport`."""
    (kernel,) = report.sparse_kernels
    return next(section for section in kernel.sections if section.name == "subcores")


class ColumnLoops(NamedTuple):
    """Bundles of a pass through the loops over columns."""

    clean: int  # where every row counts
    masked: int  # where some do not
    few: int | None  # where at most two per token do, of ragged calls


def column_loops(report: Any) -> ColumnLoops:
    """The loops over columns; the first loop without transfers cleans the indices."""
    _, *loops = (loop.bundles for loop in _innermost(report))
    *few, clean, masked = sorted(loops)
    return ColumnLoops(clean, masked, few[0] if few else None)


def _innermost(report: Any) -> list[Any]:
    """Loops without transfers that have no other loop inside."""
    loops = subcores(report).loops
    return [
        x
        for x in loops
        if not x.streams and not any(x.start <= y.start < x.end for y in loops if y is not x)
    ]


def bundles(case: Case, report: Any) -> float:
    """At most what a subcore issues; expected, where chance decides which rows are valid.

    Everything outside the loops over columns and over indices is taken to be issued in every step
    for every part of a word that is decoded by itself, whatever its branch.
    """
    shape = shape_of(case)
    problem, found = problem_in(case), explain(case, report.chip).plan
    chip = chip_named(report.chip)
    if chip.sparse is None:
        return 0
    work = work_of(problem, found, chip.sparse)
    code, loops = subcores(report), column_loops(report)
    per_pass = float(loops.clean)
    if loops.few is not None:
        share = few_share(shape.top_k, 1 / shape.devices_sharing) ** problem.group
        per_pass = share * loops.few + (1 - share) * loops.masked
    once = code.bundles - sum(loop.bundles for loop in _innermost(report))
    rounds = problem.format.parts // problem.format.together
    # One vector of columns is outside the loop, whose passes overlap.
    passes = found.chunk // chip.sparse.lanes - 1
    return work.steps * work.chunks * rounds * (once + passes * per_pass)


def few_share(top_k: int, valid: float) -> float:
    """How many tokens have at most two valid rows."""
    return sum(math.comb(top_k, n) * valid**n * (1 - valid) ** (top_k - n) for n in range(3))
