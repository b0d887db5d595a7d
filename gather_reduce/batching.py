"""`jax.vmap`: many calls become one, of all their tokens and rows together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gather_reduce.plan import Problem

Run = Callable[..., jax.Array]


def batchable(
    run: Run, problem: Problem, x: jax.Array, indices: jax.Array, *factors: jax.Array
) -> jax.Array:
    """`run(x, indices, *factors, problem=problem)`, which may be batched."""

    @jax.custom_batching.custom_vmap
    def one(x: jax.Array, indices: jax.Array, *factors: jax.Array) -> jax.Array:
        return run(x, indices, *factors, problem=problem)

    @one.def_vmap
    def many(
        size: int, batched: list[bool], x: jax.Array, indices: jax.Array, *factors: jax.Array
    ) -> tuple[jax.Array, bool]:
        entries = [
            array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
            for array, is_batched in zip((indices, *factors), batched[1:], strict=True)
        ]
        num_rows = problem.num_rows
        if batched[0]:
            found = (entries[0] >= 0) & (entries[0] < num_rows)
            first = jnp.arange(size, dtype=jnp.int32)[:, None, None] * x.shape[1]
            entries[0] = jnp.where(found, entries[0] + first, -1)
            num_rows, x = size * x.shape[1], x.reshape(size * x.shape[1], -1)
        whole = dataclasses.replace(
            problem, num_tokens=size * problem.num_tokens, num_rows=num_rows
        )
        out = batchable(run, whole, x, *(e.reshape(-1, problem.top_k) for e in entries))
        return out.reshape(size, problem.num_tokens, -1), True

    return one(x, indices, *factors)
