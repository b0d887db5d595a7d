"""Kernels whose control depends on what they compute from vectors."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from tpukit.errors import ReplayError
from tpukit.predict import predict


def test_control_by_vectors_is_an_error_or_an_assumption():
    """A loop over a block that is run again where an element is large."""

    def body(x, o):
        o[...] = x[...]

        @pl.when(jnp.max(jnp.where(x[...] > 3, 1, 0)) > 0)
        def _():
            @pl.loop(0, 1000)
            def _(_):
                o[...] = o[...] * 2

    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    fn = jax.jit(lambda x: pl.pallas_call(body, name="rare", out_shape=x)(x))
    with pytest.raises(ReplayError, match="data that only the vector units have"):
        predict(fn, x, chip="tpu7x")
    rare, common = (predict(fn, x, chip="tpu7x", from_vectors=n).kernels[0] for n in (1, 0))
    assert rare.assumed == common.assumed == 1
    assert rare.cycles > common.cycles + 1000
    assert "assumed: what scalars read from vectors, places: 1" in str(
        predict(fn, x, chip="tpu7x", from_vectors=0).text()
    )
