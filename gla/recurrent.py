"""Recurrent form: one token of one request at a time, in f32 on the vector unit.

    S' = a S + k^T v        o = scale * q S'

A group of ROWS tokens is staged once: its q and k are turned into columns, its v into f32 rows, so
that each token's column or row can be picked by a dynamic index.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gla.plan import Plan, Problem
from gla.schedule import ROWS

Ref = Any
LANES = 128


class Staged(NamedTuple):
    """A group of tokens, ready to be picked from; h = plan.heads."""

    columns: Ref  # [h / group, key_dim, LANES] f32: lane i holds q of row i, lane ROWS + i its k
    v: Ref  # [h, ROWS, value_dim] f32
    o: Ref  # [h, ROWS, value_dim] f32

    @staticmethod
    def scratch(problem: Problem, plan: Plan) -> "Staged":
        """Shapes of the fields."""
        values = pltpu.VMEM((plan.heads, ROWS, problem.value_dim), jnp.float32)
        columns = (plan.heads // problem.group, problem.key_dim, LANES)
        return Staged(pltpu.VMEM(columns, jnp.float32), values, values)


def stage(staged: Staged, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Stages a group: q, k [ROWS, h / group * key_dim], v [ROWS, h * value_dim]."""
    heads, key_dim, _ = staged.columns.shape
    for h in range(heads):
        lanes = slice(h * key_dim, (h + 1) * key_dim)
        both = jnp.concatenate([q[:, lanes], k[:, lanes]], axis=0).astype(jnp.float32)
        staged.columns[h, :, : 2 * ROWS] = both.T
    heads, _, width = staged.v.shape
    for h in range(heads):
        staged.v[h] = v[:, h * width : (h + 1) * width].astype(jnp.float32)


def unstage(staged: Staged) -> jax.Array:
    """The group's outputs, [ROWS, h * value_dim] f32."""
    return jnp.concatenate([staged.o[h] for h in range(staged.o.shape[0])], axis=1)


def pick(columns: jax.Array, lane: jax.Array, width: int) -> jax.Array:
    """[key_dim, width] copies of column `lane` of [key_dim, LANES]."""
    index = jnp.full(columns.shape, lane, jnp.int32)
    column = jnp.take_along_axis(columns, index, axis=1, mode="promise_in_bounds")
    return jnp.concatenate([column] * -(-width // LANES), axis=1)[:, :width]


def decode_token(
    columns: jax.Array, v: jax.Array, state: jax.Array, decay: jax.Array, row: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token of one head.

    Args:
      columns: [key_dim, LANES] of its query/key head.
      v: [1, value_dim] f32.
      state: [key_dim, value_dim] f32.
      decay: [1, 1 or value_dim].
      row: row of the token in its group.

    Returns:
      q S' [1, value_dim] and S'.
    """
    width = v.shape[1]
    state = decay * state + pick(columns, ROWS + row, width) * v
    return jnp.sum(pick(columns, row, width) * state, axis=0, keepdims=True), state
