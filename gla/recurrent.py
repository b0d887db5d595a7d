"""Recurrent form: one token of one request at a time.

    S' = a S + k^T v        o = scale * q S'

The outer product is a matrix product of which one row is not masked, exact for bf16 operands; the
rest is f32 on the vector unit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from gla.chunk import TN, matmul
from gla.plan import Plan, Problem
from gla.schedule import ROWS
from gla.tables import LANES, iota, spread

Ref = Any


class Staged(NamedTuple):
    """What a group of ROWS tokens is picked from and collected in; h = plan.heads."""

    q: Ref  # [h / group, key_dim, LANES] f32: lane i holds q of row i
    o: Ref  # [h, ROWS, value_dim] f32
    decay: Ref  # [h, key_dim, LANES] f32: lane i holds the decays of row i, if they are per channel

    @staticmethod
    def shapes(problem: Problem, plan: Plan) -> Staged:
        """Shapes of the fields."""
        columns = (plan.heads // problem.group, problem.key_dim, LANES)
        outputs = (plan.heads, ROWS, problem.value_dim)
        decays = (plan.heads, problem.key_dim, LANES) if problem.per_channel else (1, 8, LANES)
        return Staged(*(pltpu.VMEM(shape, jnp.float32) for shape in (columns, outputs, decays)))


def stage(columns: Ref, rows: jax.Array) -> None:
    """Turns rows [ROWS, n * key_dim] into columns: lane i of [n, key_dim, LANES] holds row i."""
    heads, key_dim, _ = columns.shape
    for h in range(heads):
        columns[h, :, :ROWS] = rows[:, h * key_dim : (h + 1) * key_dim].astype(jnp.float32).T


def unstage(staged: Staged) -> jax.Array:
    """The group's outputs, [ROWS, h * value_dim] f32."""
    return jnp.concatenate([staged.o[h] for h in range(staged.o.shape[0])], axis=1)


def pick(columns: jax.Array, lane: jax.Array, width: int) -> jax.Array:
    """[key_dim, width] copies of column `lane` of [key_dim, LANES]."""
    index = jnp.full(columns.shape, lane, jnp.int32)
    column = jnp.take_along_axis(columns, index, axis=1, mode="promise_in_bounds")
    return spread(column, width)


def only(x: jax.Array, row: jax.Array) -> jax.Array:
    """X [ROWS, n] with all rows but one zeroed, whatever they hold."""
    keep = iota(x.shape, 0) == row
    return jnp.where(keep, x.astype(jnp.float32), 0.0).astype(x.dtype)


def decode_token(
    q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array, decay: jax.Array, row: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token of one head.

    Args:
      q: [key_dim, LANES] staged columns of its query/key head.
      k: [ROWS, key_dim] of its group.
      v: [ROWS, value_dim] of its group.
      state: [key_dim, value_dim] f32.
      decay: [1 or key_dim, 1 or value_dim].
      row: row of the token in its group.

    Returns:
      q S' [1, value_dim] and S'.
    """
    state = decay * state + matmul(only(k, row), only(v, row), TN)
    return jnp.sum(pick(q, row, v.shape[1]) * state, axis=0, keepdims=True), state
