"""Kernels that the tests compile ahead of time."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc
from jax.sharding import PartitionSpec as P

from tpukit.errors import ArgumentError

F32 = jnp.float32
Spec = jax.ShapeDtypeStruct
TILE = Spec((8, 128), F32)


def _nested_body(n_ref, x_hbm, y_ref, o_ref, buf, acc, sem):
    acc[...] = jnp.zeros_like(acc)

    def step(i, _):
        copy = pltpu.make_async_copy(x_hbm.at[pl.ds(i * 128, 128)], buf, sem)
        copy.start()
        copy.wait()

        def inner(j, _):
            acc[...] += jnp.exp(buf[...]) * j.astype(F32)

            @pl.when(n_ref[j] > 3)
            def _():
                a, b = buf[...].astype(jnp.bfloat16), y_ref[...].astype(jnp.bfloat16)
                acc[...] += jnp.dot(a, b, preferred_element_type=F32)

            return 0

        lax.fori_loop(0, n_ref[0], inner, 0)
        return 0

    lax.fori_loop(0, n_ref[1], step, 0)
    o_ref[...] = acc[...]


def _nested_call(n, x, y):
    return pl.pallas_call(
        _nested_body,
        name="nested",
        out_shape=Spec((128, 128), F32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(4,),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.HBM),
                pl.BlockSpec((128, 128), lambda i, n: (0, i)),
            ],
            out_specs=pl.BlockSpec((128, 128), lambda i, n: (0, 0)),
            scratch_shapes=[
                pltpu.VMEM((128, 128), F32),
                pltpu.VMEM((128, 128), F32),
                pltpu.SemaphoreType.DMA,
            ],
        ),
    )(n, x, y)


def nested(chip, transposed=False):
    """A grid around two nested loops around a conditional matmul."""
    columns = 1 << 16  # Too large for XLA to keep in VMEM around the kernel.
    n, x = Spec((32,), jnp.int32), Spec((1 << 18, 128), F32)
    if transposed:
        return (lambda n, x, y: _nested_call(n, x, y.T)), (n, x, Spec((columns, 128), F32))
    return _nested_call, (n, x, Spec((128, columns), F32))


def scratch(chip, kib, limit_kib=None):
    """A kernel with `kib` KiB of VMEM scratch that the compiler cannot optimise away."""
    rows = kib * 2

    def body(x_ref, o_ref, big):
        def step(i, carry):
            big[pl.ds(i * 8, 8)] = x_ref[...] + carry
            return big[pl.ds((i // 2) * 8, 8)]

        o_ref[...] = lax.fori_loop(0, rows // 8, step, x_ref[...])

    limit = None if limit_kib is None else limit_kib * 1024
    return pl.pallas_call(
        body,
        name="scratch",
        out_shape=TILE,
        scratch_shapes=[pltpu.VMEM((rows, 128), F32)],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=limit),
    ), (TILE,)


def windows(chip, rows):
    """A pipelined copy whose windows have `rows` rows."""

    def body(x_ref, o_ref):
        o_ref[...] = x_ref[...] + 1

    spec = pl.BlockSpec((rows, 128), lambda i: (i, 0))
    whole = Spec((2 * rows, 128), F32)
    call = pl.pallas_call(
        body, name="windows", grid=(2,), in_specs=[spec], out_specs=spec, out_shape=whole
    )
    return call, (whole,)


def smem(chip):
    """A kernel with 8 MiB of SMEM scratch."""

    def body(x_ref, o_ref, table):
        table[0] = 1
        o_ref[...] = x_ref[...] + table[0].astype(F32)

    scratch_shapes = [pltpu.SMEM((1 << 21,), jnp.int32)]
    return pl.pallas_call(body, name="smem", out_shape=TILE, scratch_shapes=scratch_shapes), (TILE,)


def unaligned(chip):
    """A load at a lane offset that is not known to be a multiple of 128."""

    def body(n_ref, x_ref, o_ref):
        o_ref[...] = x_ref[:, pl.ds(n_ref[0], 128)]

    in_specs = [pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec()]
    call = pl.pallas_call(body, name="unaligned", out_shape=TILE, in_specs=in_specs)
    return call, (Spec((1,), jnp.int32), Spec((8, 512), F32))


def sort(chip):
    """A primitive that has no lowering."""

    def body(x_ref, o_ref):
        o_ref[...] = jnp.sort(x_ref[...])

    return pl.pallas_call(body, name="sort", out_shape=TILE), (TILE,)


def mismatched(chip):
    """A transfer between buffers of different shapes."""

    def body(x_hbm, o_hbm, arrived):
        copy = pltpu.make_async_copy(x_hbm, o_hbm, arrived)
        copy.start()
        copy.wait()

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    call = pl.pallas_call(
        body,
        name="mismatched",
        out_shape=TILE,
        in_specs=[hbm],
        out_specs=hbm,
        scratch_shapes=[pltpu.SemaphoreType.DMA],
    )
    return call, (Spec((16, 128), F32),)


def narrow(chip):
    """A block shape that is no multiple of a tile."""

    def body(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    spec = pl.BlockSpec((5, 100), lambda i: (i, 0))
    whole = Spec((10, 200), F32)
    call = pl.pallas_call(
        body, name="narrow", grid=(2,), in_specs=[spec], out_specs=spec, out_shape=whole
    )
    return call, (whole,)


def huge(chip):
    """A program that needs more HBM than any chip has."""
    return jnp.transpose, (Spec((1 << 34, 128), F32),)


def ring(chip):
    """A copy to the next of four devices and a transpose, with `compile_for`'s options."""

    def body(x_hbm, o_hbm, sent, received):
        device = lax.rem(lax.axis_index("x") + 1, lax.axis_size("x"))
        barrier = pltpu.get_barrier_semaphore()
        pl.semaphore_signal(barrier, 1, device_id=(device,))
        pl.semaphore_wait(barrier, 1)
        copy = pltpu.make_async_remote_copy(x_hbm, o_hbm, sent, received, device_id=(device,))
        copy.start()
        copy.wait()

    def shard(x):
        hbm = pl.BlockSpec(memory_space=pltpu.HBM)
        return pl.pallas_call(
            body,
            name="ring",
            out_shape=Spec(x.shape, x.dtype),
            in_specs=[hbm],
            out_specs=hbm,
            scratch_shapes=[pltpu.SemaphoreType.DMA] * 2,
            compiler_params=pltpu.CompilerParams(collective_id=0),
        )(x).T

    def fn(x):
        return jax.shard_map(shard, in_specs=P("x"), out_specs=P("x"), check_vma=False)(x)

    options = {"mesh_axes": {"x": 4}, "in_specs": [P("x")]}
    return fn, (Spec((1 << 18, 1024), F32),), options


def sparse(chip):
    """A gather on the SparseCore."""
    mesh = plsc.VectorSubcoreMesh(core_axis_name="core", subcore_axis_name="subcore")

    @pl.kernel(
        out_type=Spec((1024, 128), F32),
        mesh=mesh,
        scratch_types=[pltpu.VMEM((32, 128), F32), pltpu.VMEM((32,), jnp.int32)],
        name="sparse",
    )
    def gather(x_hbm, ids_hbm, o_hbm, rows, ids):
        first = (lax.axis_index("core") * 16 + lax.axis_index("subcore")) * 32
        pltpu.sync_copy(ids_hbm.at[pl.ds(first, 32)], ids)
        pltpu.sync_copy(x_hbm.at[ids], rows)
        pltpu.sync_copy(rows, o_hbm.at[pl.ds(first, 32)])

    return gather, (Spec((65536, 128), F32), Spec((1024,), jnp.int32))


def refuses(chip):
    """A kernel package that refuses its own arguments."""

    def fn(x):
        raise ArgumentError(where="refuses", argument="x", got="is", expected="not to be")

    return fn, (TILE,)


def breaks(chip):
    """A builder with a bug."""
    raise KeyError("broken builder")


def _ragged_body(n_ref, x_hbm, o_hbm, buf, sems):
    def request(i, _):
        rows = pl.ds(i * 512, n_ref[i] * 8)
        here = pl.ds(0, n_ref[i] * 8)

        @pl.when(n_ref[i] > 0)
        def _():
            copy = pltpu.make_async_copy(x_hbm.at[rows], buf.at[here], sems.at[0])
            copy.start()
            copy.wait()

            def group(j, _):
                some = pl.ds(pl.multiple_of(j * 8, 8), 8)
                buf[some] = jnp.exp(buf[some])

            lax.fori_loop(0, n_ref[i], group, None)
            back = pltpu.make_async_copy(buf.at[here], o_hbm.at[rows], sems.at[1])
            back.start()
            back.wait()

    lax.fori_loop(0, n_ref.shape[0], request, None)


def ragged_call(n, x):
    """Exponentials of the first 8 n[i] rows of each 512; the other rows are not written."""
    x = pltpu.with_memory_space_constraint(x, pltpu.HBM)
    return pl.pallas_call(
        _ragged_body,
        name="ragged",
        out_shape=Spec(x.shape, F32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[pltpu.VMEM((512, 128), F32), pltpu.SemaphoreType.DMA((2,))],
        ),
    )(n, x)


def ragged(chip):
    """Transfers of dynamic size, a loop of dynamic length, a request that is skipped."""
    del chip
    return jax.jit(ragged_call), (Spec((16,), jnp.int32), Spec((16 * 512, 128), F32))
