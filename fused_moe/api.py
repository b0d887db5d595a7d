"""The public functions: check, plan, dispatch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from fused_moe import bulk, grouped
from fused_moe.dispatch import describe
from fused_moe.kernel import bulk_kernel, fused_moe_kernel
from fused_moe.plan import Explanation, schedule
from fused_moe.problem import FLOAT8, check_options, problem_of
from fused_moe.spec import Plan, Problem
from reference import fused_moe as reference
from reference.fused_moe import Activation, Weights
from tpukit import checks
from tpukit.chips import Chip, current_chip
from tpukit.chips import chip as chip_named
from tpukit.errors import ArgumentError, UnsupportedError

Implementation = Literal["auto", "pallas", "interpret", "grouped", "reference"]
SUPPORTED_CHIPS = ("v5e", "v6e", "tpu7x")


def fused_moe(
    tokens: jax.Array,
    weights: Weights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    axis_name: str | Sequence[str] | None = None,
    mesh: Mesh | None = None,
    activation: Activation = "silu",
    limit: float | None = None,
    activation_dtype: Any = None,
    return_dtype: Any = jnp.bfloat16,
    implementation: Implementation = "auto",
    plan: Plan | None = None,
    validate: bool = False,
) -> jax.Array:
    """A mixture-of-experts layer, its experts spread over the devices of mesh axes.

    For a token x with experts id_j and weights w_j: y = sum_j w_j expert_{id_j}(x) + shared(x),
    where expert(x) = gated(x W_gate + b_gate, x W_up + b_up) W_down + b_down. One kernel: rows are
    quantised once, sent once to each device that has experts of the token, computed while others
    are on the way, added up there and sent back. On one device rows are sorted before the kernel
    and added up after it instead, where that costs less.

    Args:
      tokens: [T, hidden] bfloat16.
      weights: see `Weights`: bfloat16, float8_e4m3fn or int8, the narrow ones with scales. Widths
        are multiples of 512 (hidden) and 128 (intermediate); see `pad` for others.
      expert_ids: [T, top_k] int32; ids outside [0, num_experts), such as -1, are skipped, also
        single ones. An expert that a token names twice counts with the sum of its weights.
      expert_weights: [T, top_k] float32.
      axis_name: mesh axes over which tokens and experts are split, in order; None on one device.
        Inside `shard_map` the arrays are this device's: T of its tokens, E_l of its experts (as
        many on each device), ids of all experts.
      mesh: call from outside `shard_map`: arrays are whole, axis_name defaults to all axes.
      activation: "silu", "gelu" (tanh form) or "swigluoai", see `reference.fused_moe.gated`.
      limit: clips gate and up projections before the activation, or None.
      activation_dtype: float8_e4m3fn quantises each token once, before it is sent, and again
        between the two products, so that both run at the float8 rate; needs float8 weights. None
        keeps bfloat16.
      return_dtype: of results between devices: bfloat16, or float8_e4m3fn with a scale per row.
        Where rows travel in bulk, on one device (`Plan.bulk`), they are bfloat16.
      implementation: "pallas" (a TPU), "interpret" (the kernel on a CPU, slow), "grouped"
        (`grouped_moe`), "reference" (one device), or "auto": on a TPU that supports the kernel the
        one of both that costs less, see `explain`, else "grouped".
      plan: block sizes instead of the tuned ones.
      validate: check values as well (eager calls only): ids and weights.

    Returns:
      [T, hidden] bfloat16. Sums run over a device's experts in the order of their ids in float32,
      are rounded to return_dtype, and are added in the order of slots in float32; in bulk each
      expert's result is rounded. So no bit depends on the values of other tokens or on timing,
      while the number of devices, and of tokens where it changes the plan, changes the rounding.

    Raises:
      ArgumentError: an argument that can never work: what it was, what it needs.
      UnsupportedError: valid, but not on this machine or chip.

    Source: SGLang-JAX Fused MoE V2, DeepSeek-V3 (arXiv 2412.19437).
    """
    options: dict[str, Any] = {
        "activation": activation,
        "limit": limit,
        "activation_dtype": activation_dtype,
        "return_dtype": return_dtype,
        "implementation": implementation,
        "plan": plan,
    }
    checks.check_choice("fused_moe", "implementation", implementation, get_args(Implementation))
    if validate:
        validate_values(expert_ids, expert_weights, weights, axis_name, mesh)
    if mesh is not None:
        axes = axes_of_mesh(mesh, axis_name)
        return from_outside(tokens, weights, expert_ids, expert_weights, mesh, axes, options)
    axes = sizes_of(axis_name)
    return one_device(tokens, weights, expert_ids, expert_weights, axes, **options)


def grouped_moe(
    tokens: jax.Array,
    weights: Weights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    axis_name: str | Sequence[str] | None = None,
    parallel: Literal["expert", "tensor"] = "expert",
    activation: Activation = "silu",
    limit: float | None = None,
    activation_dtype: Any = None,
) -> jax.Array:
    """The same layer from sorted rows and grouped matrix products; differentiable.

    Args:
      tokens, weights, expert_ids, expert_weights: as `fused_moe`; any floating type, any widths.
      axis_name: mesh axes, inside `shard_map`; None on one device.
      parallel: "expert": each device has some experts, and its own tokens. "tensor": each device
        has a part of the intermediate dimension of every expert, and all tokens.
      activation, limit, activation_dtype: as `fused_moe`.

    Returns:
      [T, hidden] in the dtype of tokens; in tensor parallel form the same on all devices.

    Raises:
      ArgumentError: an option is wrong.

    Source: MegaBlocks (arXiv 2211.15841).
    """
    check_options(activation, limit, activation_dtype, jnp.bfloat16)
    checks.check_choice("grouped_moe", "parallel", parallel, ("expert", "tensor"))
    axes = tuple(name for name, _ in sizes_of(axis_name))
    spread = grouped.tensor_parallel if parallel == "tensor" and axes else grouped.expert_parallel
    return spread(
        tokens,
        weights,
        expert_ids,
        expert_weights,
        axes,
        activation=activation,
        limit=limit,
        activation_dtype=activation_dtype,
    )


def received_tokens(
    expert_ids: jax.Array, num_experts: int, *, axis_name: str | Sequence[str] | None = None
) -> jax.Array:
    """How many tokens each expert of this device receives, for balancing the load of experts.

    Args:
      expert_ids: [T, top_k] int32; ids outside [0, num_experts) and repeated ids do not count.
      num_experts: of all devices.
      axis_name: as in `fused_moe`, inside `shard_map`; None on one device.

    Returns:
      [num_experts / devices] int32.
    """
    axes = sizes_of(axis_name)
    chosen = jnp.any(expert_ids[:, :, None] == jnp.arange(num_experts), axis=1)
    counts = jnp.sum(chosen, axis=0, dtype=jnp.int32)
    return lax.psum_scatter(counts, tuple(n for n, _ in axes), tiled=True) if axes else counts


def explain(
    tokens: Any,
    weights: Weights,
    expert_ids: Any,
    expert_weights: Any,
    *,
    chip: str,
    axes: Sequence[tuple[str, int]] = (),
    activation: Activation = "silu",
    limit: float | None = None,
    activation_dtype: Any = None,
    return_dtype: Any = jnp.bfloat16,
    plan: Plan | None = None,
) -> Explanation:
    """The plan of the kernel on a chip that need not be present, and what "auto" would run there.

    Args:
      tokens, weights, expert_ids, expert_weights: arrays or shapes of one device.
      chip: a name in `tpukit.chips.CHIPS`.
      axes: name and size of each mesh axis that the experts are spread over.
      activation, limit, activation_dtype, return_dtype, plan: as in `fused_moe`.

    Raises:
      ArgumentError, UnsupportedError: what `fused_moe` would raise there.
    """
    problem = problem_of(
        tokens,
        weights,
        expert_ids,
        expert_weights,
        axes=tuple(axes),
        activation=activation,
        limit=limit,
        activation_dtype=activation_dtype,
        return_dtype=return_dtype,
    )
    target = chip_named(chip)
    check_chip(problem, target)
    return schedule(problem, target, plan)[0]


def supports(*args: Any, **kwargs: Any) -> bool:
    """Whether `fused_moe` runs its kernel for these shapes on a chip; arguments as `explain`."""
    try:
        explain(*args, **kwargs)
    except (ArgumentError, UnsupportedError):
        return False
    return True


def sizes_of(axis_name: str | Sequence[str] | None) -> tuple[tuple[str, int], ...]:
    """Name and size of each axis; of the mesh that the call is mapped over.

    Raises:
      ArgumentError: there is no such axis here.
    """
    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    try:
        return tuple((name, int(lax.axis_size(name))) for name in names)
    except NameError as error:
        raise ArgumentError(
            where="fused_moe",
            argument="axis_name",
            got=f"is {axis_name!r}",
            expected="mesh axes of the shard_map that this call is in",
            advice="Call it inside jax.shard_map, or pass mesh=.",
        ) from error


def axes_of_mesh(mesh: Mesh, axis_name: str | Sequence[str] | None) -> tuple[str, ...]:
    """The axes to use of a mesh.

    Raises:
      ArgumentError: the mesh has no such axis.
    """
    names = mesh.axis_names if axis_name is None else axis_name
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        checks.check_choice("fused_moe", "axis_name", name, mesh.axis_names)
    return names


def validate_values(
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    weights: Weights,
    axis_name: str | Sequence[str] | None,
    mesh: Mesh | None,
) -> None:
    """Checks values; -1 is the one id outside the range that is not a mistake.

    Raises:
      ArgumentError: an id or a weight is wrong, or values are not known.
    """
    num_experts = weights.gate.shape[0]
    if mesh is None:
        num_experts *= math.prod(size for _, size in sizes_of(axis_name))
    finite = ~jnp.isfinite(expert_weights)
    rules = [
        checks.in_range("expert_ids", expert_ids, -1, num_experts),
        checks.Condition("expert_weights", expert_weights, finite, "finite weights"),
    ]
    checks.raise_if_bad("fused_moe", rules)


def from_outside(
    tokens: jax.Array,
    weights: Weights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    mesh: Mesh,
    axes: tuple[str, ...],
    options: dict[str, Any],
) -> jax.Array:
    """Splits whole arrays over the axes of a mesh, tokens padded to an equal number each."""
    sizes = tuple((name, mesh.shape[name]) for name in axes)
    devices = math.prod(size for _, size in sizes)
    checks.check_multiple(
        "fused_moe", "num_experts", weights.gate.shape[0], devices, "Each device has as many."
    )
    num_tokens = tokens.shape[0]
    padded = with_padding(tokens, expert_ids, expert_weights, -num_tokens % devices)
    split_ = PartitionSpec(axes)
    shared, routed = weights.shared, dataclasses.replace(weights, shared=None)

    def device(tokens: Any, routed: Any, shared: Any, ids: Any, expert_weights: Any) -> jax.Array:
        held = dataclasses.replace(routed, shared=shared)
        return one_device(tokens, held, ids, expert_weights, sizes, **options)

    out = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(split_, split_, PartitionSpec(), split_, split_),
        out_specs=split_,
    )(padded[0], routed, shared, *padded[1:])
    return out[:num_tokens]


def check_chip(problem: Problem, chip: Chip) -> None:
    """Checks that a chip has what the problem asks for.

    Raises:
      UnsupportedError: it has not.
    """
    why = ""
    if chip.name not in SUPPORTED_CHIPS:
        why = f"the kernel runs on {', '.join(SUPPORTED_CHIPS)}"
    elif not chip.fp8_tflops and FLOAT8 in (problem.weight_dtype, problem.return_dtype):
        why = "it has no float8"
    if why:
        raise UnsupportedError(
            where="fused_moe",
            what=f"{problem.weight_dtype.name} weights with {problem.return_dtype.name} results",
            place=chip.name,
            why=why,
            advice="Use bfloat16 or int8 weights, or implementation='grouped'.",
        )


def choose(
    implementation: Implementation, problem: Problem, plan: Plan | None
) -> tuple[Implementation, Chip]:
    """Resolves "auto" and names the chip to plan for; interpretation plans as for tpu7x.

    Raises:
      UnsupportedError: the kernel was asked for where it cannot run.
    """
    here = current_chip()
    target = here or chip_named("tpu7x")
    if implementation == "auto":
        if here is None:
            return "grouped", target
        try:
            check_chip(problem, here)
            return schedule(problem, here, plan)[0].implementation, target
        except UnsupportedError:
            return "grouped", target
    if implementation == "pallas":
        if here is None:
            raise UnsupportedError(
                where="fused_moe",
                what="implementation='pallas'",
                place=jax.default_backend(),
                why=f"the kernel runs on {', '.join(SUPPORTED_CHIPS)}",
                advice="Use implementation='grouped', or 'interpret' to run the kernel on a CPU.",
            )
        check_chip(problem, here)
    return implementation, target


def one_device(
    tokens: jax.Array,
    weights: Weights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    axes: tuple[tuple[str, int], ...],
    *,
    activation: Activation,
    limit: float | None,
    activation_dtype: Any,
    return_dtype: Any,
    implementation: Implementation,
    plan: Plan | None,
) -> jax.Array:
    """One device's part of the layer."""
    problem = problem_of(
        tokens,
        weights,
        expert_ids,
        expert_weights,
        axes=axes,
        activation=activation,
        limit=limit,
        activation_dtype=activation_dtype,
        return_dtype=return_dtype,
    )
    chosen, target = choose(implementation, problem, plan)
    num_tokens, hidden = tokens.shape
    if chosen == "reference" and problem.num_devices > 1:
        raise UnsupportedError(
            where="fused_moe",
            what="implementation='reference'",
            place=f"{problem.num_devices} devices",
            why="the reference is the layer on one device",
            advice="Use implementation='grouped'.",
        )
    if num_tokens == 0:
        return tokens
    tokens = jnp.pad(tokens, ((0, 0), (0, problem.hidden - hidden)))
    if chosen in ("grouped", "reference"):
        spread = grouped.expert_parallel if chosen == "grouped" else on_one_device
        out = spread(
            tokens,
            weights,
            expert_ids,
            expert_weights,
            tuple(name for name, _ in axes),
            activation=activation,
            limit=limit,
            activation_dtype=activation_dtype,
        )
        return out[:, :hidden]
    found, calls = schedule(problem, target, plan)
    part, plan = found.problem, found.plan
    interpret = pltpu.InterpretParams() if chosen == "interpret" else False
    padding = calls * part.num_tokens - num_tokens
    padded = with_padding(tokens, expert_ids, expert_weights, padding)
    outs = []
    for call in range(calls):
        here = slice(call * part.num_tokens, (call + 1) * part.num_tokens)
        rows, ids, routing = (x[here] for x in padded)
        outs.append(launch(rows, ids, routing, weights, part, plan, interpret))
    out = outs[0] if calls == 1 else jnp.concatenate(outs)
    return out[:num_tokens, :hidden]


def with_padding(
    tokens: jax.Array, expert_ids: jax.Array, expert_weights: jax.Array, more: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same with `more` tokens that go nowhere."""
    rows = ((0, more), (0, 0))
    ids = jnp.pad(expert_ids, rows, constant_values=-1)
    return jnp.pad(tokens, rows), ids, jnp.pad(expert_weights, rows)


def on_one_device(
    tokens: jax.Array,
    weights: Weights,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    axes: tuple[str, ...],
    **options: Any,
) -> jax.Array:
    """The reference, called like the layers that are spread over axes; there are none."""
    del axes
    return reference.fused_moe(tokens, weights, expert_ids, expert_weights, **options)


def launch(
    tokens: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    weights: Weights,
    problem: Problem,
    plan: Plan,
    interpret: Any,
) -> jax.Array:
    """Brings the arguments into the kernel's layout and runs it."""
    held = dataclasses.replace(with_rows(weights), shared=None)
    if weights.shared is not None:
        shared = with_rows(jax.tree.map(lambda w: w[None], weights.shared))
        held = dataclasses.replace(held, shared=shared)
    options: dict[str, Any] = {"problem": problem, "plan": plan, "interpret": interpret}
    if plan.bulk:
        found = bulk.sort_rows(tokens, expert_ids, expert_weights, problem)
        results = bulk_kernel(found.heads, found.rows, held, **options)
        return bulk.combine(results, found.places, found.known, problem)
    me = lax.axis_index(tuple(name for name, _ in problem.axes)) if problem.axes else 0
    lists, tails = describe(
        expert_ids, expert_weights, problem.num_experts, problem.num_devices, me
    )
    return fused_moe_kernel(lists, tails, tokens, held, **options)


def with_rows(weights: Weights) -> Weights:
    """Weights whose biases [E, width] are [E, 1, width], as scales are."""
    biases = {
        f"{name}_bias": bias[:, None]
        for name in ("gate", "up", "down")
        if (bias := getattr(weights, f"{name}_bias")) is not None
    }
    return dataclasses.replace(weights, **biases)
