"""Converters of weights, to be run once, when a model is loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fused_moe.dispatch import round_up
from reference.fused_moe import Weights
from tpukit.errors import ArgumentError

HIDDEN_MULTIPLE = 512  # rows are packed into words of four columns, 128 words at a time
INTER_MULTIPLE = 256
PROJECTIONS = {"gate": ("hidden", "inter"), "up": ("hidden", "inter"), "down": ("inter", "hidden")}


def padded_width(hidden: int) -> int:
    """The width that `pad` gives to a hidden dimension."""
    return round_up(hidden, HIDDEN_MULTIPLE)


def pad(weights: Weights) -> Weights:
    """Pads the widths with zeros to what the kernel needs: hidden to 512s, intermediate to 256s.

    Scales must be per output channel where an input dimension grows; padded channels have scale 1
    and bias 0, so that they stay zero. `fused_moe` pads tokens by itself.

    Raises:
      ArgumentError: scales per block would be cut.
    """
    hidden, inter = weights.gate.shape[-2:]
    sizes = {"hidden": padded_width(hidden), "inter": round_up(inter, INTER_MULTIPLE)}
    fields: dict[str, Any] = {}
    for name, (inputs, outputs) in PROJECTIONS.items():
        weight = getattr(weights, name)
        more_inputs = sizes[inputs] - weight.shape[-2]
        more_outputs = sizes[outputs] - weight.shape[-1]
        fields[name] = widen(widen(weight, -2, more_inputs, 0), -1, more_outputs, 0)
        scale, bias = getattr(weights, f"{name}_scale"), getattr(weights, f"{name}_bias")
        if scale is not None:
            if scale.shape[-2] > 1 and more_inputs:
                raise ArgumentError(
                    where="pad",
                    argument=f"{name}_scale",
                    got=f"has {scale.shape[-2]} blocks of {weight.shape[-2]} inputs",
                    expected="one scale per output channel where inputs are padded",
                )
            fields[f"{name}_scale"] = widen(scale, -1, more_outputs, 1)
        if bias is not None:
            fields[f"{name}_bias"] = widen(bias, -1, more_outputs, 0)
    shared = None if weights.shared is None else pad(weights.shared)
    return dataclasses.replace(weights, **fields, shared=shared)


def widen(x: jax.Array, axis: int, more: int, value: float) -> jax.Array:
    """X with `more` elements of a value behind it."""
    if not more:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, more)
    return jnp.pad(x, widths, constant_values=jnp.asarray(value, x.dtype))


def expand_block_scales(scale: jax.Array, outputs: int) -> jax.Array:
    """Scales of blocks of inputs and outputs [E, B, C], as DeepSeek has them, as [E, B, outputs].

    Raises:
      ArgumentError: C does not divide outputs.
    """
    if outputs % scale.shape[-1]:
        raise ArgumentError(
            where="expand_block_scales",
            argument="outputs",
            got=f"is {outputs}",
            expected=f"a multiple of the {scale.shape[-1]} blocks",
        )
    return jnp.repeat(scale.astype(jnp.float32), outputs // scale.shape[-1], axis=-1)


def quantise(weights: Weights, dtype: Any, *, block: int | None = None) -> Weights:
    """Weights in a narrow type, float8_e4m3fn or int8, with float32 scales.

    Args:
      weights: without scales.
      dtype: of the result.
      block: inputs that share a scale in each output channel; all of them by default.
    """
    kind = jnp.dtype(dtype)
    largest = 127.0 if kind == jnp.int8 else float(jnp.finfo(kind).max)
    fields: dict[str, Any] = {}
    for name in PROJECTIONS:
        weight = getattr(weights, name).astype(jnp.float32)
        *outer, inputs, outputs = weight.shape
        blocks = weight.reshape(*outer, inputs // (block or inputs), block or inputs, outputs)
        amax = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
        scale = jnp.where(amax == 0, 1.0, amax / largest)
        narrow = blocks / scale
        narrow = jnp.round(narrow) if kind == jnp.int8 else narrow
        fields[name] = narrow.astype(kind).reshape(weight.shape)
        fields[f"{name}_scale"] = scale[..., 0, :]
    shared = None if weights.shared is None else quantise(weights.shared, dtype, block=block)
    return dataclasses.replace(weights, **fields, shared=shared)
