"""What can be done to q, k and o while they are in VMEM: static facts, memory, and the arithmetic.

A window is rewritten in place, a group of ROWS rows after the other: q and k between their arrival
and their use, o between its last head and its departure. The specification is reference.gla_norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gla.plan import Epilogue, Plan, Problem, Prologue
from gla.schedule import ROWS
from reference.gla_norm import NormGate, NormRope
from tpukit import checks
from tpukit.errors import ArgumentError

Ref = Any
LANES = 128


class Around(NamedTuple):
    """Operands of what is fused, None where nothing is; h = plan.heads."""

    turns: Ref = None  # [T, LANES] f32 in HBM: cosines, then sines
    qk_weight: Ref = None  # [2, key_dim] f32 in VMEM: of q, of k
    gate: Ref = None  # [T, heads * value_dim] in HBM
    o_weight: Ref = None  # [1, h * value_dim] f32 in VMEM

    def with_weights(self, other: Around) -> Around:
        """These rows with the weights of another."""
        return self._replace(qk_weight=other.qk_weight, o_weight=other.o_weight)


def check_prologue(prologue: NormRope | None, dims: checks.Dims) -> Prologue | None:
    """Static facts of a prologue.

    Raises:
      ArgumentError: an array does not suit the call.
    """
    if prologue is None:
        return None
    check_is(prologue, "prologue", NormRope)
    for name, shape in {
        "q_weight": "key_dim",
        "k_weight": "key_dim",
        "cos": "tokens half_rotary_dim",
        "sin": "tokens half_rotary_dim",
    }.items():
        check_array(f"prologue.{name}", getattr(prologue, name), shape, dims, jnp.float32)
    rotary_dim = 2 * prologue.cos.shape[1]
    checks.check_range("gla", "rotary_dim", rotary_dim, low=2, high=dims["key_dim"])
    return Prologue(rotary_dim, check_eps("prologue", prologue.eps))


def check_epilogue(epilogue: NormGate | None, dims: checks.Dims, dtype: Any) -> Epilogue | None:
    """Static facts of an epilogue.

    Raises:
      ArgumentError: an array does not suit the call.
    """
    if epilogue is None:
        return None
    check_is(epilogue, "epilogue", NormGate)
    check_array("epilogue.weight", epilogue.weight, "heads value_dim", dims, jnp.float32)
    check_array("epilogue.gate", epilogue.gate, "tokens heads value_dim", dims, dtype)
    size = epilogue.heads_per_group
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or dims["heads"] % size:
        raise ArgumentError(
            where="gla",
            argument="epilogue.heads_per_group",
            got=f"is {size!r}",
            expected=f"a divisor of the {dims['heads']} heads",
        )
    return Epilogue(size, check_eps("epilogue", epilogue.eps))


def check_is(value: Any, argument: str, kind: type) -> None:
    """Raises `ArgumentError` unless `value` is a `kind`."""
    if not isinstance(value, kind):
        got, expected = f"is a {type(value).__name__}", f"a {kind.__name__} or None"
        raise ArgumentError(where="gla", argument=argument, got=got, expected=expected)


def check_array(argument: str, array: Any, shape: str, dims: checks.Dims, dtype: Any) -> None:
    """Raises `ArgumentError` unless the array has the shape and the type."""
    dims.bind(argument, array, shape)
    checks.check_dtype("gla", argument, array, (dtype,))


def check_eps(argument: str, eps: Any) -> float:
    """The eps as a positive Python number, which a row of zeros needs.

    Raises:
      ArgumentError: it is something else.
    """
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise ArgumentError(
            where="gla",
            argument=f"{argument}.eps",
            got=f"is {eps!r}",
            expected="a Python number between 0 and 1",
        )
    return float(eps)


def value_rules(prologue: NormRope | None, epilogue: NormGate | None) -> list[checks.Condition]:
    """What values have to obey: weights and rotations are finite."""
    arrays = {}
    if prologue is not None:
        for name in ("q_weight", "k_weight", "cos", "sin"):
            arrays[f"prologue.{name}"] = getattr(prologue, name)
    if epilogue is not None:
        arrays["epilogue.weight"] = epilogue.weight
    return [
        checks.Condition(name, x, ~jnp.isfinite(x), "finite numbers") for name, x in arrays.items()
    ]


class Windows(NamedTuple):
    """Their rows in VMEM, None where nothing is fused; P = plan.inputs, W = plan.window."""

    turns: Ref = None  # [P, W, LANES] f32
    gate: Ref = None  # [P, W, h * value_dim]

    @staticmethod
    def shapes(problem: Problem, plan: Plan) -> Windows:
        """Shapes of the fields."""
        windows = Windows()
        if problem.prologue is not None:
            shape = (plan.inputs, plan.window, LANES)
            windows = windows._replace(turns=pltpu.VMEM(shape, jnp.float32))
        if problem.epilogue is not None:
            shape = (plan.inputs, plan.window, plan.heads * problem.value_dim)
            windows = windows._replace(gate=pltpu.VMEM(shape, problem.dtype))
        return windows


def specs(around: Around, heads: int) -> Around:
    """Where the operands lie, with `heads` steps of the grid."""
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return Around(
        turns=None if around.turns is None else hbm,
        qk_weight=None if around.qk_weight is None else pl.BlockSpec(memory_space=pltpu.VMEM),
        gate=None if around.gate is None else hbm,
        o_weight=None
        if around.o_weight is None
        else pl.BlockSpec((1, around.o_weight.shape[1] // heads), lambda block, *_: (0, block)),
    )


def operands(prologue: NormRope | None, epilogue: NormGate | None, num_tokens: int) -> Around:
    """The arrays of a call, rows filled up to `num_tokens`."""

    def rows(x: jax.Array, width: int) -> jax.Array:
        flat = x.reshape(x.shape[0], -1)
        return jnp.pad(flat, ((0, num_tokens - flat.shape[0]), (0, width - flat.shape[1])))

    around = Around()
    if prologue is not None:
        turns = jnp.concatenate([prologue.cos, prologue.sin], axis=1)
        weights = jnp.stack([prologue.q_weight, prologue.k_weight])
        around = around._replace(turns=rows(turns, LANES), qk_weight=weights)
    if epilogue is not None:
        gate, weight = epilogue.gate, epilogue.weight.reshape(1, -1)
        around = around._replace(gate=rows(gate, weight.size), o_weight=weight)
    return around


class Turn(NamedTuple):
    """What a group's rows of q, or of k, are multiplied with; [ROWS, LANES] f32."""

    own: jax.Array  # each lane itself
    other: jax.Array  # the lane it turns with


def partner(rotary_dim: int) -> jax.Array:
    """[ROWS, LANES] lane that each lane turns with; itself from rotary_dim on."""
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    half = rotary_dim // 2
    turned = jnp.where(lane < half, lane + half, lane - half)
    return jnp.where(lane < rotary_dim, turned, lane)


def take(x: jax.Array, lanes: jax.Array) -> jax.Array:
    """X [ROWS, LANES] with its lanes in another order."""
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


def turn(angles: jax.Array, weight: jax.Array, rotary_dim: int) -> Turn:
    """Factors of norm weight and rope together.

    Args:
      angles: [ROWS, LANES] f32, cosines in the first rotary_dim / 2 lanes, then as many sines.
      weight: [1, LANES] f32.
      rotary_dim: lanes that turn.
    """
    lane = lax.broadcasted_iota(jnp.int32, angles.shape, 1)
    half = rotary_dim // 2
    place = jnp.where(lane < half, lane, jnp.where(lane < rotary_dim, lane - half, 0))
    cos, sin = take(angles, place), take(angles, place + half)
    sin = jnp.where(lane < half, -sin, sin)
    weight = jnp.broadcast_to(weight, angles.shape)
    turns = lane < rotary_dim
    own = jnp.where(turns, cos, 1.0) * weight
    return Turn(own, jnp.where(turns, sin, 0.0) * take(weight, partner(rotary_dim)))


def norm_rope(x: jax.Array, turn: Turn, lanes: jax.Array, eps: float) -> jax.Array:
    """A head's rows [ROWS, LANES], normed and turned, f32.

    A row's norm is one factor, so it comes last.
    """
    wide = x.astype(jnp.float32)
    square = jnp.mean(wide * wide, axis=1, keepdims=True)
    return (wide * turn.own + take(wide, lanes) * turn.other) * lax.rsqrt(square + eps)


def norm_gate(x: jax.Array, gate: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """The rows of a group of heads [ROWS, n], normed and gated, f32; rows of zeros stay zero."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(wide * wide, axis=1, keepdims=True)
    gated = wide * lax.rsqrt(square + eps) * weight * jax.nn.sigmoid(gate.astype(jnp.float32))
    return jnp.where(square == 0, 0.0, gated)


def each_group(end: jax.Array, action: Any) -> None:
    """action(rows) for every group of rows before `end`."""

    def group(i: jax.Array, _: None) -> None:
        action(pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS))

    lax.fori_loop(0, (end + ROWS - 1) // ROWS, group, None)


def apply_norm_rope(
    q: Ref, k: Ref, angles: Ref, weight: Ref, end: jax.Array, spec: Prologue
) -> None:
    """Rewrites the rows before `end` of a window of q and k.

    Args:
      q, k: [W, h / group * LANES].
      angles: [W, LANES] f32, see `turn`.
      weight: [2, LANES] f32.
      end: rows that count, at least.
      spec: static facts.
    """
    lanes = partner(spec.rotary_dim)

    def group(rows: Any) -> None:
        turns = [turn(angles[rows], weight[n : n + 1], spec.rotary_dim) for n in range(2)]
        for first in range(0, q.shape[1], LANES):
            for window, factors in zip((q, k), turns, strict=True):
                part = window.at[rows, first : first + LANES]
                part[...] = norm_rope(part[...], factors, lanes, spec.eps).astype(part.dtype)

    each_group(end, group)


def apply_norm_gate(o: Ref, gate: Ref, weight: Ref, end: jax.Array, width: int, eps: float) -> None:
    """Rewrites the rows before `end` of a window of o.

    Args:
      o, gate: [W, h * value_dim].
      weight: [1, h * value_dim] f32.
      end: rows that count, at least.
      width: lanes of a group of heads.
      eps: of the norm.
    """

    def group(rows: Any) -> None:
        for first in range(0, o.shape[1], width):
            lanes = slice(first, first + width)
            part = o.at[rows, lanes]
            gated = norm_gate(part[...], gate[rows, lanes], weight[:, lanes], eps)
            part[...] = gated.astype(part.dtype)

    each_group(end, group)
