"""Rows in bulk, on one device: what is done outside the kernel, in plain JAX.

Instead of a transfer for each row, rows are gathered into one array sorted by expert before the
kernel, which fetches a tile at once and writes its results at once, and what a token's experts gave
is gathered and added up after it. Each expert's rows begin at a multiple of ROWS, as tiles of
narrow types have to; the rows up to there are padding that nobody reads.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fused_moe.dispatch import fresh, heads, tails
from fused_moe.spec import ROWS, Problem


class Sorted(NamedTuple):
    """The rows of a call; R = problem.bulk_rows."""

    heads: jax.Array  # [head rows, 128] i32: where each expert's rows begin, see `dispatch.Layout`
    rows: jax.Array  # [R, row words] u32: the shared expert's rows, one a token, then the others'
    places: jax.Array  # [top_k, T] i32: the row of each entry
    known: jax.Array  # [top_k, T] bool: whether it has one


def sort_rows(
    tokens: jax.Array, expert_ids: jax.Array, expert_weights: jax.Array, problem: Problem
) -> Sorted:
    """Sorts the rows of a device that has all experts.

    Args:
      tokens: [T, hidden].
      expert_ids: [T, top_k] int32; as `dispatch.describe` takes them.
      expert_weights: [T, top_k] float32.
      problem: static facts of the call.
    """
    ids = expert_ids.T
    entries, num_tokens, num_experts = ids.size, problem.num_tokens, problem.num_experts
    known = fresh(ids, num_experts)
    experts = jnp.where(known, ids, num_experts).ravel()
    counts = jnp.sum(experts[None, :] == jnp.arange(num_experts)[:, None], axis=1)
    padding = -counts % ROWS
    filler = jnp.arange(ROWS - 1)[None, :] < padding[:, None]
    fillers = jnp.where(filler, jnp.arange(num_experts)[:, None], num_experts).ravel()
    # Sorting twice, by expert and back, costs less than scalars scattered by index. An expert and
    # the number of an entry, or of padding behind all entries, are one word.
    numbers = problem.bulk_numbers
    more = numbers - entries - fillers.size
    keys = jnp.pad(jnp.concatenate([experts, fillers]), (0, more), constant_values=num_experts)
    number = jnp.arange(numbers, dtype=jnp.uint32)
    order = lax.sort(keys.astype(jnp.uint32) * numbers | number, is_stable=False) & (numbers - 1)
    _, places = lax.sort((order, number), num_keys=1, is_stable=False)

    rows = problem.rows_out.packed(tokens, tails(expert_ids, expert_weights))
    begin = jnp.arange(num_tokens if problem.shared is not None else 0)
    source = order[: problem.bulk_rows - begin.size] % num_tokens
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts + padding)])
    bounds = jnp.repeat(first, 2)[:-1] + begin.size
    return Sorted(
        heads(bounds, jnp.zeros(num_experts, jnp.int32), problem.layout),
        rows[jnp.concatenate([begin, source.astype(begin.dtype)])],
        places[:entries].astype(jnp.int32).reshape(ids.shape) + begin.size,
        known,
    )


def combine(results: jax.Array, places: jax.Array, known: jax.Array, problem: Problem) -> jax.Array:
    """Adds up what the experts gave each token, in the order of slots, in float32.

    Args:
      results: [R, hidden], weighted; rows that are nobody's may hold anything.
      places, known: see `Sorted`.
      problem: static facts of the call.

    Returns:
      [T, hidden].
    """
    num_tokens = problem.num_tokens
    found = results[jnp.where(known, places, 0).ravel()].reshape(*places.shape, -1)
    total = jnp.zeros((num_tokens, problem.hidden), jnp.float32)
    for j in range(problem.top_k):
        total += jnp.where(known[j, :, None], found[j].astype(jnp.float32), 0.0)
    if problem.shared is not None:
        total += results[:num_tokens].astype(jnp.float32)
    return total.astype(problem.dtype)
