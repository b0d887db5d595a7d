"""Recurrent form: one token of one request at a time, in f32 on the vector unit.

    S' = a S + k^T v        o = scale * q S'

A column of q or k, the same in all lanes, is a permutation per register of a transposed group. The
unit that permutes is the bottleneck, so that q and k of 16 bits share a word and its permutation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from gla.plan import Plan, Problem
from gla.schedule import ROWS
from gla.tables import LANES, spread

Ref = Any


class Staged(NamedTuple):
    """What a group of ROWS tokens is picked from and collected in; h = plan.heads."""

    qk: Ref  # [h / group, key_dim, LANES] int32: lane i has q and k of row i, see `pack`
    v: Ref  # [h, ROWS, value_dim] f32
    o: Ref  # [h, ROWS, value_dim] f32
    decay: Ref  # [h, key_dim, LANES] f32: lane i holds the decays of row i, if they are per channel

    @staticmethod
    def shapes(problem: Problem, plan: Plan) -> Staged:
        """Shapes of the fields."""
        columns = pltpu.VMEM((plan.heads // problem.group, problem.key_dim, LANES), jnp.int32)
        rows = pltpu.VMEM((plan.heads, ROWS, problem.value_dim), jnp.float32)
        decays = (plan.heads, problem.key_dim, LANES) if problem.per_channel else (1, 8, LANES)
        return Staged(columns, rows, rows, pltpu.VMEM(decays, jnp.float32))


def columns_of(rows: jax.Array, columns: Ref) -> None:
    """Turns rows [ROWS, n * key_dim] into columns: lane i of [n, key_dim, LANES] holds row i."""
    heads, key_dim, _ = columns.shape
    for h in range(heads):
        columns[h, :, :ROWS] = rows[:, h * key_dim : (h + 1) * key_dim].T


def stage(staged: Staged, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Turns the rows of q, k [ROWS, h / group * key_dim] into columns, and those of v into f32."""
    heads, key_dim, _ = staged.qk.shape
    for h in range(heads):
        lanes = slice(h * key_dim, (h + 1) * key_dim)
        words = pack(q[:, lanes], k[:, lanes])
        staged.qk[h, :, : words.shape[0]] = words.T
    heads, _, width = staged.v.shape
    for h in range(heads):
        staged.v[h] = v[:, h * width : (h + 1) * width].astype(jnp.float32)


def unstage(staged: Staged) -> jax.Array:
    """The group's outputs, [ROWS, h * value_dim] f32."""
    return jnp.concatenate([staged.o[h] for h in range(staged.o.shape[0])], axis=1)


def pack(q: jax.Array, k: jax.Array) -> jax.Array:
    """Q and k [ROWS, key_dim] as words: [ROWS, key_dim], of 32 bits [2 ROWS, key_dim], q first."""
    high, low = (lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) for x in (q, k))
    if q.dtype == jnp.float32:
        return jnp.concatenate([high, low], axis=0)
    return high | lax.shift_right_logical(low, 16)


def unpack(columns: jax.Array, row: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Q and k of one row, [key_dim, LANES] f32, the same in all lanes."""
    if dtype == jnp.float32:
        words = pick(columns, row), pick(columns, ROWS + row)
    else:
        both = pick(columns, row)
        words = both & -(2**16), both << 16
    q, k = (lax.bitcast_convert_type(x, jnp.float32) for x in words)
    return q, k


def pick(columns: jax.Array, lane: jax.Array) -> jax.Array:
    """[key_dim, LANES] copies of column `lane`."""
    index = jnp.full(columns.shape, lane, jnp.int32)
    return jnp.take_along_axis(columns, index, axis=1, mode="promise_in_bounds")


def decode_token(
    q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array, decay: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token of one head.

    Args:
      q, k: [key_dim, LANES] f32, the same in all lanes.
      v: [1, value_dim] f32 of the token.
      state: [key_dim, value_dim] f32.
      decay: [1 or key_dim, 1 or value_dim].

    Returns:
      q S' [1, value_dim] and S'.
    """
    q, k = (spread(x, v.shape[1]) for x in (q, k))
    state = decay * state + k * v
    return jnp.sum(q * state, axis=0, keepdims=True), state
