"""The public functions: check, plan, dispatch."""

from __future__ import annotations

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gather_reduce import gradient
from gather_reduce.adder import AdderWalk
from gather_reduce.batching import batchable
from gather_reduce.kernel import Walk, gather_reduce_kernel
from gather_reduce.plan import (
    LANES,
    Explanation,
    Plan,
    Problem,
    plan_for,
    stepped,
)
from reference import gather_reduce as reference
from reference.gather_reduce import PackedRows
from tpukit import checks, sparsecore, versions
from tpukit.chips import Chip, current_chip
from tpukit.chips import chip as chip_named
from tpukit.errors import ArgumentError, UnsupportedError
from tpukit.planning import Implementation

SUPPORTED_CHIPS = ("v5p", "v6e", "tpu7x")
Rows = jax.Array | PackedRows

_DTYPES = (jnp.float32, jnp.bfloat16)


def dense_gather_reduce(
    x: Rows,
    indices: jax.Array,
    weights: jax.Array | None = None,
    *,
    row_scales: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
    plan: Plan | None = None,
    validate: bool = False,
) -> jax.Array:
    """Weighted sums of rows: out[t] = sum_k weights[t, k] * x[indices[t, k]].

    Works under `jax.jit`, `shard_map` with its checks, and `vmap`, which makes one call of many.

    Products and sums are float32, in the order of `reference.gather_reduce.tree_sum`: neighbours
    in k first, the same for every token, whatever the batch. The result is rounded once.

    Args:
      x: [rows, hidden_size] float32 or bfloat16; or `PackedRows`, which halves the bytes that are
        gathered: its producer writes the words itself, or calls `pack_columns`. A hidden size that
        is no multiple of 128, or an odd number of bfloat16 rows, is padded in a copy.
      indices: [tokens, top_k] int32; the SparseCore takes a top_k of at most 32. An index outside
        [0, rows), such as -1, chooses no row.
      weights: [tokens, top_k] float32 or bfloat16, or None for rows that are weighted already. A
        weight of 0 chooses no row. Rows that are not chosen are not read: what they hold, NaN
        included, does not matter. A token that chooses none gives exactly 0.
      row_scales: [rows] float32, what rows are to be multiplied by (of float8 rows), or None. A
        scale of 0, like a weight of 0, chooses no row; scales of other rows do not matter.
      out_dtype: float32 or bfloat16; that of x by default, bfloat16 for packed rows.
      implementation: "pallas" (the SparseCore), "interpret" (the kernel on a CPU, slow),
        "reference" (what XLA makes of `reference.gather_reduce`), or "auto": whichever of the
        SparseCore and XLA the cost model finds quicker; XLA where JAX lacks SparseCore fences (see
        `docs/versions.md`).
      plan: instead of the cost model's. With `Plan("adder", ...)`, of float32 rows without weights,
        the order of the sum is that of k.
      validate: check values as well (eager calls only): indices of -1 or of a row, finite weights.

    Returns:
      [tokens, hidden_size]. Differentiable in x, weights and row_scales, but a weight of exactly 0
      has none, as its row is not read; nor have packed rows.

    Raises:
      ArgumentError: an argument that can never work: what it was, what it needs.
      UnsupportedError: valid, but not on this machine or chip.

    Source: `gather_reduce` of tpu-inference; here without its limits on shapes.
    """
    where = "dense_gather_reduce"
    options = (row_scales, out_dtype, implementation, plan, validate)
    return _checked(where, x, indices, weights, None, *options)


def ragged_gather_reduce(
    x: Rows,
    indices: jax.Array,
    weights: jax.Array | None,
    valid: jax.Array,
    *,
    row_scales: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
    plan: Plan | None = None,
    validate: bool = False,
) -> jax.Array:
    """`dense_gather_reduce` of the valid rows only, as an expert-parallel device has them.

    Args:
      x, indices, weights, row_scales, out_dtype, implementation, plan, validate: as there.
      valid: [tokens, top_k] bool: whether the row is of a local expert. Others are never read, so
        that they may be memory that nobody wrote.

    Returns:
      [tokens, hidden_size]; a token without a valid row gives exactly 0.

    Raises:
      ArgumentError, UnsupportedError: as there.
    """
    where = "ragged_gather_reduce"
    options = (row_scales, out_dtype, implementation, plan, validate)
    return _checked(where, x, indices, weights, valid, *options)


def explain(
    x: Any,
    indices: Any,
    weights: Any = None,
    *,
    chip: str,
    out_dtype: DTypeLike | None = None,
    plan: Plan | None = None,
) -> Explanation:
    """The plan for these arrays or shapes on a chip that need not be present.

    Raises:
      ArgumentError, UnsupportedError: what a call would raise there.
    """
    problem = problem_of("explain", x, indices, weights, None, None, out_dtype)
    return plan_for(problem, chip_named(chip), plan)


def supports(
    x: Any,
    indices: Any,
    weights: Any = None,
    *,
    chip: str,
    out_dtype: DTypeLike | None = None,
    plan: Plan | None = None,
) -> bool:
    """Whether the SparseCores of a chip can run the kernel for these arrays or shapes."""
    try:
        problem = problem_of("supports", x, indices, weights, None, None, out_dtype)
        found = plan_for(problem, chip_named(chip), plan, sparse_only=True)
    except (ArgumentError, UnsupportedError):
        return False
    return found.plan.engine != "xla"


def problem_of(
    where: str,
    x: Any,
    indices: Any,
    weights: Any,
    valid: Any,
    row_scales: Any,
    out_dtype: DTypeLike | None,
) -> Problem:
    """Checks shapes and dtypes.

    Raises:
      ArgumentError: one of them is wrong.
    """
    dims = checks.Dims(where)
    packed = isinstance(x, PackedRows)
    if packed:
        dims.bind("x.words", x.words, "rows words")
        checks.check_dtype(where, "x.words", x.words, (jnp.int32,))
        checks.check_choice(where, "x.dtype", x.dtype, ("bfloat16", "float8_e4m3fn"))
        advice = "Make it with pack_columns."
        checks.check_multiple(where, "words of x", dims["words"], LANES, advice)
        checks.check_range(where, "x.hidden_size", x.hidden_size, 0, dims["words"] * x.parts)
        words, kind, name = dims["words"], jnp.dtype(jnp.bfloat16), f"packed {x.dtype}"
    else:
        dims.bind("x", x, "rows hidden_size")
        check_rows(where, x)
        words = -(-dims["hidden_size"] // LANES) * LANES
        kind = jnp.dtype(x.dtype)
        name = kind.name
    dims.bind("indices", indices, "tokens top_k")
    checks.check_dtype(where, "indices", indices, (jnp.int32,))
    checks.check_range(where, "top_k", dims["top_k"], 1)
    if weights is not None:
        dims.bind("weights", weights, "tokens top_k")
        checks.check_dtype(where, "weights", weights, _DTYPES)
    if valid is not None:
        dims.bind("valid", valid, "tokens top_k")
        checks.check_dtype(where, "valid", valid, (jnp.bool_,))
    if row_scales is not None:
        dims.bind("row_scales", row_scales, "rows")
        checks.check_dtype(where, "row_scales", row_scales, (jnp.float32,))
    out = kind if out_dtype is None else jnp.dtype(out_dtype)
    checks.check_choice(where, "out_dtype", out.name, ("float32", "bfloat16"))
    return Problem(
        num_tokens=dims["tokens"],
        top_k=dims["top_k"],
        num_rows=dims["rows"],
        words=words,
        rows=name,
        weighted=weights is not None or row_scales is not None,
        narrow=out == jnp.bfloat16,
        ragged=valid is not None,
    )


def check_rows(where: str, x: Any) -> None:
    """Raises `ArgumentError` unless rows that are not packed are of a type that can be gathered."""
    if jnp.dtype(x.dtype) == jnp.float8_e4m3fn:
        raise ArgumentError(
            where=where,
            argument="x",
            got="has dtype float8_e4m3fn",
            expected="float32, bfloat16 or PackedRows",
            advice="Pack it with gather_reduce.pack_columns(x).",
        )
    checks.check_dtype(where, "x", x, _DTYPES)


def _checked(
    where: str,
    x: Rows,
    indices: jax.Array,
    weights: jax.Array | None,
    valid: jax.Array | None,
    row_scales: jax.Array | None,
    out_dtype: DTypeLike | None,
    implementation: Implementation,
    plan: Plan | None,
    validate: bool,
) -> jax.Array:
    """A call with its arguments checked, its plan made, its rows masked."""
    problem = problem_of(where, x, indices, weights, valid, row_scales, out_dtype)
    checks.check_choice(where, "implementation", implementation, get_args(Implementation))
    if validate:
        checks.raise_if_bad(where, value_rules(indices, weights, problem.num_rows))
    chosen, chip, plan = choose(where, implementation, problem, plan)
    if valid is not None:
        indices = jnp.where(valid, indices, -1)
    factors = reference.factors_of(indices, weights, row_scales)
    run = functools.partial(launch, problem=problem, plan=plan, chosen=chosen, chip=chip)
    return gradient.differentiable(run, x, indices, factors)


def value_rules(
    indices: jax.Array, weights: jax.Array | None, num_rows: int
) -> list[checks.Condition]:
    """What values have to obey."""
    rules = [checks.in_range("indices", indices, -1, num_rows)]
    if weights is not None:
        bad = ~jnp.isfinite(weights)
        rules.append(checks.Condition("weights", weights, bad, "finite weights"))
    return rules


def choose(
    where: str, implementation: Implementation, problem: Problem, plan: Plan | None
) -> tuple[Implementation, Chip, Plan]:
    """Resolves "auto", and names the chip to plan for; interpretation plans as for tpu7x.

    Raises:
      UnsupportedError: the kernel was asked for where it cannot run.
    """
    here = current_chip()
    chip = here or chip_named("tpu7x")
    able = here is not None and versions.has("SparseCore fences")
    if implementation == "reference" or (implementation == "auto" and not able):
        return "reference", chip, Plan("xla")
    if implementation == "pallas" and (here is None or here.sparse is None):
        raise UnsupportedError(
            where=where,
            what="implementation='pallas'",
            place=here.name if here else jax.default_backend(),
            why=f"the kernel runs on the SparseCores of {', '.join(SUPPORTED_CHIPS)}",
            advice="Use 'auto' or 'reference', or 'interpret' to run the kernel on a CPU.",
        )
    found = plan_for(problem, chip, plan, sparse_only=implementation != "auto").plan
    if found.engine == "xla":
        return "reference", chip, found
    return ("pallas" if implementation == "auto" else implementation), chip, found


def launch(
    x: Rows,
    indices: jax.Array,
    factors: jax.Array | None,
    *,
    problem: Problem,
    plan: Plan,
    chosen: Implementation,
    chip: Chip,
) -> jax.Array:
    """Brings the arguments into the kernel's layout, and runs what was chosen."""
    hidden_size = x.hidden_size if isinstance(x, PackedRows) else x.shape[1]
    out_dtype = jnp.bfloat16 if problem.narrow else jnp.float32
    if not problem.num_tokens or not problem.num_rows or not hidden_size:
        return jnp.zeros((problem.num_tokens, hidden_size), out_dtype)
    if chosen == "reference" or chip.sparse is None:
        return reference.gather_reduce(x, indices, factors, out_dtype=out_dtype)
    array = x.words if isinstance(x, PackedRows) else x
    shared = problem.format.rows_per_word
    padding = (-array.shape[0] % shared, problem.words - array.shape[1])
    if any(padding):
        array = jnp.pad(array, ((0, padding[0]), (0, padding[1])))
    sparse, walk = chip.sparse, AdderWalk if plan.engine == "adder" else Walk

    def run(*operands: jax.Array, problem: Problem) -> jax.Array:
        kernel = functools.partial(
            gather_reduce_kernel,
            problem=stepped(problem, plan, sparse),
            plan=plan,
            sparse=sparse,
            walk=walk,
        )
        if chosen == "interpret":
            return sparsecore.interpret(kernel, *operands, chip=chip.name)
        return kernel(*operands)

    operands = (array, indices) if factors is None else (array, indices, factors)
    return batchable(run, problem, *operands)[:, :hidden_size]
