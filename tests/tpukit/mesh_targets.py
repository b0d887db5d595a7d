"""Programs of several devices that tests compile in a process of its own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS, LANES = 512, 1024


def ring(chip, devices=8, sends=4, ways=1, barrier=True, waits=True, topology=None):
    """Each device sends its array `counts[device]` times to the device `ways` further on."""
    del chip

    def kernel(counts, x, out, scalars, local, sems):
        start = pltpu.make_async_copy(counts, scalars, local)
        start.start()
        start.wait()
        me, sent = scalars[1], scalars[0]
        target = lax.rem(me + ways, devices)
        if barrier:
            semaphore = pltpu.get_barrier_semaphore()
            pl.semaphore_signal(semaphore, device_id={"x": target})
            pl.semaphore_wait(semaphore, 1)
        copy = pltpu.make_async_remote_copy(x, out, sems.at[0], sems.at[1], device_id={"x": target})
        lax.fori_loop(0, sent, lambda _, none: copy.start(), None)
        if waits:
            lax.fori_loop(0, sent, lambda _, none: copy.wait(), None)
        else:
            lax.fori_loop(0, sent + 1, lambda _, none: copy.wait(), None)

    def device(counts, x):
        return pl.pallas_call(
            kernel,
            name="ring",
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)] * 2,
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_shapes=[
                pltpu.SMEM((1024,), jnp.int32),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA((2,)),
            ],
            compiler_params=pltpu.CompilerParams(
                collective_id=0 if barrier else None, has_side_effects=True
            ),
        )(counts, x)

    split = jax.P("x")
    fn = jax.jit(
        lambda counts, x: jax.shard_map(
            lambda c, x: device(c[0], x), in_specs=split, out_specs=split, check_vma=False
        )(counts, x)
    )
    counts = np.zeros((devices, 1024), np.int32)
    counts[:, 0], counts[:, 1] = sends, np.arange(devices)
    x = jax.ShapeDtypeStruct((devices * ROWS, LANES), jnp.float32)
    options = {"mesh_axes": {"x": devices}, "in_specs": (split, split)}
    if topology:
        options["topology"] = topology
    return fn, (counts, x), options


def alone(chip):
    """A program of one device."""
    del chip
    return jax.jit(lambda x: x + 1), (jax.ShapeDtypeStruct((8, 128), jnp.float32),)


def layers(chip, devices=8, sends=(2,), lengths=(4,)):
    """A loop of `lengths[device]` turns in a kernel of its own, XLA's product, then rings."""
    del chip

    def kernel(lengths, x, out):
        out[...] = x[...]

        def turn(_, none):
            out[...] = out[...] * 2

        lax.fori_loop(0, lengths[0], turn, None)

    def local(lengths, x):
        return pl.pallas_call(
            kernel,
            name="local",
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(1,),
                in_specs=[pl.BlockSpec(x.shape, lambda *_: (0, 0))],
                out_specs=pl.BlockSpec(x.shape, lambda *_: (0, 0)),
            ),
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        )(lengths, x)

    split, (ring_fn, (_, x), _) = jax.P("x"), ring("", devices)
    counts = np.zeros((len(sends), devices, 1024), np.int32)
    counts[:, :, 0], counts[:, :, 1] = np.array(sends)[:, None], np.arange(devices)

    def fn(tree, x):
        y = jax.shard_map(local, in_specs=split, out_specs=split, check_vma=False)(
            tree["lengths"], x
        )
        y = jnp.cos(y)
        for i in range(len(sends)):
            y = ring_fn(tree["counts"][i], y)
        return y

    tree = {
        "lengths": np.resize(np.array(lengths, np.int32), devices),
        "counts": counts,
    }
    specs = ({"lengths": split, "counts": jax.P(None, "x")}, split)
    return jax.jit(fn), (tree, x), {"mesh_axes": {"x": devices}, "in_specs": specs}
