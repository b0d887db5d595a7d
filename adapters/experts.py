"""Weights of experts as SGLang-JAX holds them, in this library's terms."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import fused_moe
from adapters.refusals import refuse
from tpukit import checks

SWIGLUOAI_LIMIT = 7.0  # fixed in the stack


@dataclasses.dataclass(frozen=True)
class Projections:
    """The stack's w1, w3 and w2, and their scales or None.

    Attributes:
      gate, up: [E, hidden, inter]; of a shared expert without E.
      down: [E, inter, hidden].
      gate_scale, up_scale, down_scale: [E, blocks, 1, outputs]; of a shared expert [1, outputs].
    """

    gate: jax.Array | None
    up: jax.Array | None
    down: jax.Array | None
    gate_scale: jax.Array | None
    up_scale: jax.Array | None
    down_scale: jax.Array | None


NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def routed_weights(where: str, held: Projections, quant_block_k: int | None) -> fused_moe.Weights:
    """The weights of routed experts; nothing is moved, scales lose a dimension of 1.

    Raises:
      ArgumentError: a scale is not as many blocks of inputs as it should be.
    """
    fields: dict[str, Any] = {name: getattr(held, name) for name in NAMES}
    for name, stack_name in NAMES.items():
        checks.check_array(where, stack_name, fields[name])
        scale = getattr(held, f"{name}_scale")
        if scale is None:
            continue
        experts, inputs, outputs = fields[name].shape
        wanted = (experts, inputs // (quant_block_k or inputs), 1, outputs)
        if tuple(scale.shape) != wanted:
            got = f"has shape {tuple(scale.shape)}"
            refuse(where, f"{stack_name}_scale", got, f"{wanted} for quant_block_k={quant_block_k}")
        fields[f"{name}_scale"] = scale[:, :, 0].astype(jnp.float32)
    return fused_moe.Weights(**fields)


def shared_weights(where: str, held: Projections) -> fused_moe.Weights:
    """The weights of the shared expert.

    Raises:
      ArgumentError: a matrix is missing, or a scale is not one per output.
    """
    fields: dict[str, Any] = {name: getattr(held, name) for name in NAMES}
    for name, stack_name in NAMES.items():
        checks.check_array(where, f"{stack_name}_shared", fields[name])
        if (scale := getattr(held, f"{name}_scale")) is not None:
            if scale.size != fields[name].shape[-1]:
                got = f"has shape {tuple(scale.shape)}"
                wanted = f"[1, {fields[name].shape[-1]}]"
                refuse(where, f"{stack_name}_shared_scale", got, wanted)
            fields[f"{name}_scale"] = scale.reshape(1, -1).astype(jnp.float32)
    return fused_moe.Weights(**fields)


def limit_of(where: str, act_fn: str, **limits: float | None) -> float | None:
    """What gate and up projections are clipped to.

    Raises:
      ArgumentError: the stack would clip the gate after its activation.
    """
    if act_fn == "swigluoai":
        return SWIGLUOAI_LIMIT
    for name, limit in limits.items():
        if limit is not None:
            refuse(
                where,
                name,
                f"is {limit}",
                "None",
                "The stack clips silu(gate), this library's kernel can clip the gate only.",
            )
    return None
