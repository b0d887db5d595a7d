"""A program for `tpukit.aot`, which compiles it in a process of its own."""

import jax
import jax.numpy as jnp

from adapters import tpu_inference

TOKENS, GROUP, HIDDEN = 2048, 8, 4096


def array(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def sums(chip):
    """Weighted sums of eight rows, of all and of those that are this device's."""
    flat = TOKENS * GROUP
    x, indices = array(flat, HIDDEN, dtype=jnp.bfloat16), array(flat, dtype=jnp.int32)
    weights, valid = array(TOKENS, GROUP, dtype=jnp.float32), array(flat, dtype=jnp.bool_)

    def fn(x, indices, weights, valid):
        return (
            tpu_inference.dense_gather_reduce(x, indices, weights, GROUP),
            tpu_inference.ragged_gather_reduce(x, indices, weights.reshape(-1), valid, GROUP),
        )

    return fn, (x, indices, weights, valid)
