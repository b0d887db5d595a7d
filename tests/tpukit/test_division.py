"""Quotients and remainders, which scalar units leave in a queue, one or both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpukit.compat import in_hbm
from tpukit.predict import predict

ROWS = {"quotient": 8, "remainder": 16}  # of the transfers that count each


def body(numbers, x, o, buffer, semaphore, *, wanted):
    """As many transfers of 8 rows as the quotient says, and of 16 as the remainder says."""
    operands = numbers[0], numbers[1]
    found = {"quotient": lax.div(*operands), "remainder": lax.rem(*operands)}
    for name in wanted:

        @pl.loop(0, found[name])
        def _(_, rows=ROWS[name]):
            copy = pltpu.make_async_copy(x.at[pl.ds(0, rows)], buffer.at[pl.ds(0, rows)], semaphore)
            copy.start()
            copy.wait()

    o[...] = buffer[0:8]


@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
@pytest.mark.parametrize(
    "wanted", [("quotient",), ("remainder",), ("quotient", "remainder")], ids=str
)
def test_quotients_and_remainders(chip, wanted):
    call = pl.pallas_call(
        functools.partial(body, wanted=wanted),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec((8, 128), lambda *_: (0, 0)),
            grid=(),
            scratch_shapes=[pltpu.VMEM((16, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        name="division",
    )
    x = jax.ShapeDtypeStruct((16, 128), jnp.float32)
    fn = jax.jit(lambda numbers, x: call(numbers, in_hbm(x)))
    (kernel,) = predict(fn, np.array([1000, 327], np.int32), x, chip=chip).kernels
    counts = {"quotient": 3, "remainder": 19}
    moved = sum(counts[name] * ROWS[name] * 512 for name in wanted)
    assert kernel.moved["hbm_to_vmem"] == moved
