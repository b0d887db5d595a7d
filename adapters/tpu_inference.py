"""The kernels of vllm-project/tpu-inference, by their names and arguments.

Signatures, layouts and meanings are those of commit b8692ff01fa191343836996c27a39dc95f008b88.
"""

from __future__ import annotations

import jax

import gather_reduce
from adapters.refusals import refuse
from tpukit import checks

__all__ = ["dense_gather_reduce", "ragged_gather_reduce"]


def dense_gather_reduce(
    x: jax.Array,
    indices: jax.Array,
    topk_weights: jax.Array,
    reduce_group_size: int,
    topk_wgt_zero_nan: bool = False,
) -> jax.Array:
    """`kernels.sparse_core.dense_gather_reduce`, as `gather_reduce.dense_gather_reduce`.

    Args:
      x: [rows, hidden_size] bfloat16 or float32.
      indices: [tokens * reduce_group_size] int32; one outside [0, rows) chooses no row.
      topk_weights: [tokens, reduce_group_size], or flat.
      reduce_group_size: rows of a token.
      topk_wgt_zero_nan: ignored: a weight of 0 always chooses no row, so that what the row holds,
        NaN included, does not matter. False means NaN there for such rows in the stack.

    Returns:
      [tokens, hidden_size] in the dtype of x.

    Raises:
      ArgumentError, UnsupportedError: as `gather_reduce.dense_gather_reduce`.
    """
    del topk_wgt_zero_nan
    grouped = _grouped("dense_gather_reduce", reduce_group_size, indices, topk_weights=topk_weights)
    return gather_reduce.dense_gather_reduce(x, *grouped)


def ragged_gather_reduce(
    x: jax.Array,
    indices: jax.Array,
    topk_weights: jax.Array,
    valid_rows_mask: jax.Array,
    reduce_group_size: int,
) -> jax.Array:
    """`kernels.sparse_core.ragged_gather_reduce_v2`, as `gather_reduce.ragged_gather_reduce`.

    Args:
      x: [rows, hidden_size] bfloat16 or float32.
      indices: [tokens * reduce_group_size] int32.
      topk_weights: [tokens * reduce_group_size].
      valid_rows_mask: [tokens * reduce_group_size] bool; other rows are never read.
      reduce_group_size: rows of a token.

    Returns:
      [tokens, hidden_size] in the dtype of x, as the stack's kernel has it; what the stack does
      where its kernel is not used is bfloat16 always.

    Raises:
      ArgumentError, UnsupportedError: as `gather_reduce.ragged_gather_reduce`.
    """
    grouped = _grouped(
        "ragged_gather_reduce",
        reduce_group_size,
        indices,
        topk_weights=topk_weights,
        valid_rows_mask=valid_rows_mask,
    )
    return gather_reduce.ragged_gather_reduce(x, *grouped)


def _grouped(
    where: str, group: int, indices: jax.Array, **others: jax.Array
) -> tuple[jax.Array, ...]:
    """Arrays of one element per row as [tokens, group]."""
    checks.check_type(where, "reduce_group_size", group, int)
    checks.check_range(where, "reduce_group_size", group, low=1)
    for name, array in {"indices": indices, **others}.items():
        checks.check_array(where, name, array)
        if array.size != indices.size:
            refuse(where, name, f"has {array.size} elements", f"{indices.size}, one per index")
    checks.check_multiple(where, "indices", indices.size, group, "Every token has as many.")
    return tuple(array.reshape(-1, group) for array in (indices, *others.values()))
