"""Small kernels, right ones and wrong twins, that calibrate the strict harness.

Every entry of FAULTS is (builder, modes in which it is caught, what it raises); the builder returns
a function without arguments that runs the kernel. GOOD are the right twins.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from tpukit import interpret

F32 = jnp.float32
TILE = (8, 128)
ANY = pl.BlockSpec(memory_space=pl.ANY)
DMA, REGULAR = pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.REGULAR


def local(body, *scratch, grid=(1,), rows=8, in_spec=ANY, out_spec=ANY, params=None):
    """Runs `body(x, o, *scratch)` on one device; x is [rows, 128]."""
    x = jnp.arange(rows * 128, dtype=F32).reshape(rows, 128)

    @jax.jit
    def run(x):
        return pl.pallas_call(
            body,
            grid=grid,
            in_specs=[in_spec],
            out_specs=out_spec,
            out_shape=jax.ShapeDtypeStruct((rows, 128), F32),
            scratch_shapes=scratch,
            compiler_params=params,
        )(x)

    return lambda: run(x)


def on_devices(body, count, *scratch, collective_id=0, rows=8):
    """Runs `body(x, o, *scratch)` on `count` devices of the axis "d"; x is [rows, 128] on each."""
    mesh = jax.make_mesh(
        (count,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
    )
    params = pltpu.CompilerParams(collective_id=collective_id)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    def run(x):
        return pl.pallas_call(
            body,
            in_specs=[ANY],
            out_specs=ANY,
            out_shape=jax.ShapeDtypeStruct((rows, 128), F32),
            scratch_shapes=scratch,
            compiler_params=params,
        )(x)

    x = jnp.arange(count * rows * 128, dtype=F32).reshape(count * rows, 128)
    return lambda: run(x)


def enter(count):
    """A barrier that lets no device go on before all have entered."""
    barrier = pltpu.get_barrier_semaphore()
    for device in range(count):
        pl.semaphore_signal(barrier, 1, device_id=device)
    pl.semaphore_wait(barrier, count)


# One device.


def double_buffered(x, o, buffers, sems):
    """Copies x to o by 8 rows through two buffers."""

    def load(i):
        slot = lax.rem(i, 2)
        return pltpu.make_async_copy(x.at[pl.ds(i * 8, 8)], buffers.at[slot], sems.at[0, slot])

    def store(i):
        slot = lax.rem(i, 2)
        return pltpu.make_async_copy(buffers.at[slot], o.at[pl.ds(i * 8, 8)], sems.at[1, slot])

    load(0).start()

    def step(i, _):
        pl.when(i > 0)(lambda: store(i - 1).wait())
        pl.when(i < 3)(lambda: load(i + 1).start())
        load(i).wait()
        store(i).start()

    lax.fori_loop(0, 4, step, None)
    store(3).wait()


def good_local():
    return local(double_buffered, pltpu.VMEM((2, *TILE), F32), DMA((2, 2)), rows=32)


def unwritten_scratch():
    def body(x, o, buffer):
        o[...] = x[...] + buffer[...]

    spec = pl.BlockSpec(TILE, lambda i: (0, 0))
    return checked(local(body, pltpu.VMEM(TILE, F32), in_spec=spec, out_spec=spec))


def unwritten_output():
    def body(x, o):
        o[0:4] = x[0:4]

    spec = pl.BlockSpec(TILE, lambda i: (0, 0))
    return checked(local(body, in_spec=spec, out_spec=spec))


def checked(run):
    return lambda: interpret.assert_initialised("out", run())


def index_past_the_end(kind):
    spec = pl.BlockSpec(TILE, lambda i: (0, 0))

    def body(x, o, scalars, sem):
        row = pl.program_id(0) + 4
        o[...] = x[...]
        if kind == "read":
            o[...] = x[pl.ds(row, 8)]
        elif kind == "write":
            o[pl.ds(row, 8)] = x[...]
        elif kind == "scalar":
            scalars[row] = 1
        elif kind == "negative":
            o[...] = x[pl.ds(row - 5, 8)]

    return local(body, pltpu.SMEM((4,), jnp.int32), DMA, in_spec=spec, out_spec=spec)


def dma_past_the_end():
    def body(x, o, sem):
        copy = pltpu.make_async_copy(x.at[pl.ds(pl.program_id(0) + 4, 8)], o, sem)
        copy.start()
        copy.wait()

    return local(body, DMA)


def block_past_the_end():
    def body(x, o):
        o[...] = x[...]

    spec = pl.BlockSpec(TILE, lambda i: (0, 0))
    return local(body, in_spec=pl.BlockSpec(TILE, lambda i: (i + 3, 0)), out_spec=spec)


def read_before_wait():
    def body(x, o, buffer, sem):
        copy = pltpu.make_async_copy(x, buffer, sem)
        copy.start()
        o[...] = buffer[...]
        copy.wait()

    return local(body, pltpu.VMEM(TILE, F32), DMA, out_spec=pl.BlockSpec(TILE, lambda i: (0, 0)))


def forgotten_dma():
    def body(x, o, buffer, sem):
        pltpu.make_async_copy(x, buffer, sem).start()
        o[...] = jnp.zeros(TILE, F32)

    return local(body, pltpu.VMEM(TILE, F32), DMA, out_spec=pl.BlockSpec(TILE, lambda i: (0, 0)))


def leftover_semaphore():
    def body(x, o, sem):
        pl.semaphore_signal(sem, 2)
        pl.semaphore_wait(sem, 1)
        o[...] = x[...]

    spec = pl.BlockSpec(TILE, lambda i: (0, 0))
    return local(body, REGULAR, in_spec=spec, out_spec=spec)


def waits_twice():
    def body(x, o, sem):
        copy = pltpu.make_async_copy(x, o, sem)
        copy.start()
        copy.wait()
        copy.wait()

    return local(body, DMA)


# Several devices.


def ring(count, *, barrier=True, send_wait=True, receive_wait=True):
    """Each device copies its rows to the next one."""

    def body(x, o, send, receive):
        me = lax.axis_index("d")
        if barrier:
            enter(count)
        copy = pltpu.make_async_remote_copy(x, o, send, receive, device_id=lax.rem(me + 1, count))
        copy.start()
        if send_wait:
            copy.wait_send()
        if receive_wait:
            copy.wait_recv()

    return on_devices(body, count, DMA, DMA)


def all_to_all(count):
    """Device i sends its row block j to block i of device j."""

    def body(x, o, send, receive):
        me = lax.axis_index("d")
        enter(count)

        def copy(peer):
            return pltpu.make_async_remote_copy(
                x.at[pl.ds(peer * 8, 8)], o.at[pl.ds(me * 8, 8)], send, receive, device_id=peer
            )

        lax.fori_loop(0, count, lambda peer, _: copy(peer).start(), None)
        lax.fori_loop(0, count, lambda peer, _: copy(peer).wait(), None)

    return on_devices(body, count, DMA, DMA, rows=8 * count)


def leftover_barrier():
    def body(x, o, sem):
        pl.semaphore_signal(pltpu.get_barrier_semaphore(), 1)
        copy = pltpu.make_async_copy(x, o, sem)
        copy.start()
        copy.wait()

    return on_devices(body, 2, DMA)


def wait_for_each_other():
    def body(x, o, sem, copy_sem):
        enter(2)
        me = lax.axis_index("d")
        pl.semaphore_wait(sem, 1)
        pl.semaphore_signal(sem, 1, device_id=1 - me)
        copy = pltpu.make_async_copy(x, o, copy_sem)
        copy.start()
        copy.wait()

    return on_devices(body, 2, REGULAR, DMA)


def one_device_waits():
    def body(x, o, sem, copy_sem):
        enter(2)

        @pl.when(lax.axis_index("d") == 0)
        def _():
            pl.semaphore_wait(sem, 1)

        copy = pltpu.make_async_copy(x, o, copy_sem)
        copy.start()
        copy.wait()

    return on_devices(body, 2, REGULAR, DMA)


LATE, EAGER = interpret.MODES
BOTH = (LATE, EAGER)

GOOD = {
    "double buffer": good_local,
    "ring of 4": functools.partial(ring, 4),
    "all to all of 8": functools.partial(all_to_all, 8),
}

OUT = interpret.OutOfBounds
FAULTS = {
    "unwritten scratch": (unwritten_scratch, BOTH, interpret.Uninitialised),
    "unwritten output": (unwritten_output, BOTH, interpret.Uninitialised),
    "read past the end": (
        lambda: index_past_the_end("read"),
        BOTH,
        interpret.OutOfBounds,
    ),
    "write past the end": (
        lambda: index_past_the_end("write"),
        BOTH,
        interpret.OutOfBounds,
    ),
    "scalar past the end": (
        lambda: index_past_the_end("scalar"),
        BOTH,
        interpret.OutOfBounds,
    ),
    "negative index": (
        lambda: index_past_the_end("negative"),
        BOTH,
        interpret.OutOfBounds,
    ),
    "DMA past the end": (dma_past_the_end, BOTH, OUT),
    "block past the end": (block_past_the_end, BOTH, OUT),
    "read before wait": (read_before_wait, (EAGER,), interpret.Race),
    "forgotten DMA, late": (forgotten_dma, (LATE,), interpret.UnawaitedDma),
    "forgotten DMA, eager": (forgotten_dma, (EAGER,), interpret.LeftoverSemaphore),
    "left-over semaphore": (leftover_semaphore, BOTH, interpret.LeftoverSemaphore),
    "left-over barrier": (leftover_barrier, BOTH, interpret.LeftoverSemaphore),
    "waits twice": (waits_twice, BOTH, interpret.Deadlock),
    "wait for each other": (wait_for_each_other, BOTH, interpret.Deadlock),
    "one device waits": (one_device_waits, BOTH, interpret.Deadlock),
    "no send wait": (
        functools.partial(ring, 4, send_wait=False),
        BOTH,
        interpret.LeftoverSemaphore,
    ),
    "no receive wait, late": (
        functools.partial(ring, 4, receive_wait=False),
        (LATE,),
        interpret.UnawaitedDma,
    ),
    "no receive wait, eager": (
        functools.partial(ring, 4, receive_wait=False),
        (EAGER,),
        (interpret.LeftoverSemaphore, interpret.Race),
    ),
    "no entry barrier": (
        functools.partial(ring, 4, barrier=False),
        (EAGER,),
        interpret.RemoteDmaBeforeBarrier,
    ),
}


def expected_ring(count):
    """What `ring` leaves on all devices."""
    x = np.arange(count * 8 * 128, dtype=np.float32).reshape(count, 8, 128)
    return np.roll(x, 1, axis=0).reshape(count * 8, 128)
