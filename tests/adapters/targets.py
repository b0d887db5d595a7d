"""Programs for `tpukit.aot`, which compiles them in processes of their own."""

import jax
import jax.numpy as jnp

from adapters import tpu_inference

TOKENS, GROUP, HIDDEN = 2048, 8, 4096


def array(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def dense(chip):
    """Weighted sums of eight rows."""
    flat = TOKENS * GROUP
    x, indices = array(flat, HIDDEN, dtype=jnp.bfloat16), array(flat, dtype=jnp.int32)
    weights = array(TOKENS, GROUP, dtype=jnp.float32)
    return lambda *args: tpu_inference.dense_gather_reduce(*args, GROUP), (x, indices, weights)


def ragged(chip):
    """Of the rows that are this device's."""
    _, (x, indices, weights) = dense(chip)
    weights, valid = array(TOKENS * GROUP, dtype=weights.dtype), array(TOKENS * GROUP, dtype=bool)
    args = (x, indices, weights, valid)
    return lambda *args: tpu_inference.ragged_gather_reduce(*args, GROUP), args
