"""From arguments to the static problem: every check of shapes, types and options."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from fused_moe.dispatch import MAX_TOP_K, round_up
from fused_moe.spec import ROWS, ExpertShape, Problem
from fused_moe.weights import HIDDEN_MULTIPLE, PROJECTIONS, padded_width
from reference.fused_moe import ACTIVATIONS, Activation, Weights
from tpukit import checks
from tpukit.errors import ArgumentError

WHERE = "fused_moe"
FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)
WEIGHT_DTYPES = (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8)
LANES = 128


def problem_of(
    tokens: Any,
    weights: Weights,
    expert_ids: Any,
    expert_weights: Any,
    *,
    axes: tuple[tuple[str, int], ...],
    activation: Activation,
    limit: float | None,
    activation_dtype: Any,
    return_dtype: Any,
) -> Problem:
    """The problem of one device.

    Raises:
      ArgumentError: an argument is wrong.
    """
    dims = checks.Dims(WHERE)
    dims.bind("tokens", tokens, "tokens hidden")
    dims.bind("expert_ids", expert_ids, "tokens top_k")
    dims.bind("expert_weights", expert_weights, "tokens top_k")
    checks.check_dtype(WHERE, "tokens", tokens, (jnp.bfloat16,))
    checks.check_dtype(WHERE, "expert_ids", expert_ids, (jnp.int32,))
    checks.check_dtype(WHERE, "expert_weights", expert_weights, (jnp.float32,))
    check_options(activation, limit, activation_dtype, return_dtype)
    routed = expert_shape(weights, "weights", "experts ", padded_width(dims["hidden"]))
    shared = None
    if weights.shared is not None:
        hidden = weights.gate.shape[1]
        shared = expert_shape(weights.shared, "weights.shared", "", hidden)
        checks.check_dtype(WHERE, "weights.shared.gate", weights.shared.gate, (weights.gate.dtype,))
    row_dtype = jnp.dtype(jnp.bfloat16 if activation_dtype is None else activation_dtype)
    if activation_dtype is not None:
        checks.check_dtype(WHERE, "weights.gate", weights.gate, (jnp.float8_e4m3fn,))
    num_devices = 1
    for _, size in axes:
        num_devices *= size
    problem = Problem(
        axes=axes,
        num_tokens=max(round_up(dims["tokens"], ROWS), ROWS),
        top_k=dims["top_k"],
        num_experts=weights.gate.shape[0] * num_devices,
        hidden=weights.gate.shape[1],
        dtype=jnp.dtype(tokens.dtype),
        weight_dtype=jnp.dtype(weights.gate.dtype),
        row_dtype=row_dtype,
        return_dtype=jnp.dtype(return_dtype),
        routed=routed,
        shared=shared,
        activation=activation,
        limit=None if limit is None else float(limit),
    )
    checks.check_range(WHERE, "num_experts", problem.num_experts, 1)
    checks.check_range(WHERE, "top_k", problem.top_k, 1, min(MAX_TOP_K, problem.num_experts))
    return problem


def check_options(
    activation: str, limit: float | None, activation_dtype: Any, return_dtype: Any
) -> None:
    """Checks what is not an array."""
    checks.check_choice(WHERE, "activation", activation, ACTIVATIONS)
    number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if limit is not None and (not number or not limit > 0):
        raise ArgumentError(
            where=WHERE,
            argument="limit",
            got=f"is {limit!r}",
            expected="a positive Python number or None",
        )
    for name, value, choices in (
        ("activation_dtype", activation_dtype, (None, "float8_e4m3fn")),
        ("return_dtype", return_dtype, ("bfloat16", "float8_e4m3fn")),
    ):
        try:
            called = None if value is None else jnp.dtype(value).name
        except TypeError:
            called = value
        checks.check_choice(WHERE, name, called, choices)


def expert_shape(weights: Weights, argument: str, lead: str, hidden: int) -> ExpertShape:
    """Checks the arrays of routed or shared experts; `lead` names their leading dimension.

    Raises:
      ArgumentError: one of them is wrong.
    """
    if not isinstance(weights, Weights):
        raise ArgumentError(
            where=WHERE,
            argument=argument,
            got=f"is a {type(weights).__name__}",
            expected="Weights(gate, up, down, ...)",
        )
    dims = checks.Dims(WHERE)
    for name, (inputs, outputs) in PROJECTIONS.items():
        weight = getattr(weights, name)
        dims.bind(f"{argument}.{name}", weight, f"{lead}{inputs} {outputs}")
    checks.check_dtype(WHERE, f"{argument}.gate", weights.gate, WEIGHT_DTYPES)
    for name in ("up", "down"):
        weight = getattr(weights, name)
        checks.check_dtype(WHERE, f"{argument}.{name}", weight, (weights.gate.dtype,))
    if dims["hidden"] != hidden:
        raise ArgumentError(
            where=WHERE,
            argument=f"{argument}.gate",
            got=f"has hidden dimension {dims['hidden']}",
            expected=f"{hidden}, that of tokens up to the next multiple of {HIDDEN_MULTIPLE}",
            advice="Pad the weights once with fused_moe.pad(weights).",
        )
    advice = "Pad the weights once with fused_moe.pad(weights)."
    checks.check_multiple(WHERE, f"{argument} intermediate", dims["inter"], LANES, advice)
    checks.check_range(WHERE, f"{argument} intermediate", dims["inter"], LANES)
    blocks = check_scales(weights, argument, lead, dims)
    biased = check_biases(weights, argument, lead, dims)
    return ExpertShape(dims["inter"], *blocks, biased)


def all_or_none(weights: Weights, argument: str, part: str) -> bool:
    """Whether the projections have scales, or biases; some having them is an error."""
    there = [name for name in PROJECTIONS if getattr(weights, name + part) is not None]
    if len(there) not in (0, len(PROJECTIONS)):
        missing = next(name for name in PROJECTIONS if name not in there)
        raise ArgumentError(
            where=WHERE,
            argument=f"{argument}.{missing}{part}",
            got="is None",
            expected=f"an array, as {argument}.{there[0]}{part} is one",
        )
    return bool(there)


def check_scales(weights: Weights, argument: str, lead: str, dims: checks.Dims) -> tuple[int, int]:
    """Blocks of inputs with scales of their own, of gate and up, and of down; 0 without scales."""
    scaled = all_or_none(weights, argument, "_scale")
    wide = jnp.dtype(weights.gate.dtype) == jnp.bfloat16
    if scaled == wide:
        raise ArgumentError(
            where=WHERE,
            argument=f"{argument}.gate_scale",
            got="is given" if scaled else "is None",
            expected=f"{'None' if wide else 'scales'} for weights of {weights.gate.dtype}",
        )
    if not scaled:
        return 0, 0
    for name, (inputs, outputs) in PROJECTIONS.items():
        scale = getattr(weights, f"{name}_scale")
        blocks = "down_blocks" if name == "down" else "gate_blocks"
        dims.bind(f"{argument}.{name}_scale", scale, f"{lead}{blocks} {outputs}")
        checks.check_dtype(WHERE, f"{argument}.{name}_scale", scale, (jnp.float32,))
        count = dims[blocks]
        if count < 1 or dims[inputs] % count or (count > 1 and dims[inputs] // count % LANES):
            raise ArgumentError(
                where=WHERE,
                argument=f"{argument}.{name}_scale",
                got=f"has {count} blocks for {dims[inputs]} inputs",
                expected=f"1, or equal blocks of a multiple of {LANES} inputs",
            )
    return dims["gate_blocks"], dims["down_blocks"]


def check_biases(weights: Weights, argument: str, lead: str, dims: checks.Dims) -> bool:
    """Whether there are biases."""
    biased = all_or_none(weights, argument, "_bias")
    if biased:
        for name, (_, outputs) in PROJECTIONS.items():
            bias = getattr(weights, f"{name}_bias")
            dims.bind(f"{argument}.{name}_bias", bias, f"{lead}{outputs}")
            checks.check_dtype(WHERE, f"{argument}.{name}_bias", bias, (jnp.float32,))
    return biased
