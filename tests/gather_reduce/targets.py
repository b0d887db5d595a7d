"""Programs for `tpukit.aot`, which compiles them in processes of their own."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import fused_moe
import gather_reduce
from fused_moe import grouped
from gather_reduce import PackedRows
from tests.gather_reduce.oracle import FORMATS

Spec, BF16 = jax.ShapeDtypeStruct, jnp.bfloat16
SHAPES = (  # top_k, hidden size, output, whether weighted: every value of each with some of others
    (1, 128, "float32", True),
    (5, 7168, "bfloat16", True),
    (10, 2880, "bfloat16", False),
    (32, 1024, "bfloat16", True),
)


def call(rows, tokens, top_k, num_rows, hidden_size, *, out, weighted, ragged=False, plan=None):
    """A function of arrays and their shapes."""
    dtype = jnp.dtype(rows.removeprefix("packed "))
    x = Spec((num_rows, hidden_size), dtype)
    if rows.startswith("packed"):
        words = jax.eval_shape(gather_reduce.pack_columns, x).words
        x = PackedRows(words, hidden_size, dtype.name)
    size = (tokens, top_k)
    weights = [Spec(size, jnp.float32)] if weighted else []
    valid = [Spec(size, jnp.bool_)] if ragged else []

    def fn(x, indices, *rest):
        rest = list(rest)
        weights = rest.pop(0) if weighted else None
        options = {"out_dtype": jnp.dtype(out), "implementation": "pallas"}
        if plan is not None:
            options["plan"] = gather_reduce.Plan(*plan)
        if ragged:
            return gather_reduce.ragged_gather_reduce(x, indices, weights, *rest, **options)
        return gather_reduce.dense_gather_reduce(x, indices, weights, **options)

    return fn, (x, Spec(size, jnp.int32), *weights, *valid)


def matrix(chip):
    """All of SHAPES in all formats, in one program."""
    calls = [
        call(rows, 50, top_k, 512, hidden_size, out=out, weighted=weighted)
        for rows in FORMATS
        for top_k, hidden_size, out, weighted in SHAPES
    ]

    def fn(*groups):
        return [one(*args) for (one, _), args in zip(calls, groups, strict=True)]

    return fn, tuple(args for _, args in calls)


def one(chip, rows="packed bfloat16", tokens=2048, top_k=8, hidden_size=7168, **options):
    """One call, bfloat16 out; a row for every term."""
    options = {"out": "bfloat16", "weighted": True} | options
    return call(rows, tokens, top_k, tokens * top_k, hidden_size, **options)


def on_devices(chip):
    """Three calls as one by `jax.vmap`, per device of a mesh in `jax.shard_map` with its checks."""
    local, args = call("bfloat16", 256, 8, 512, 512, out="bfloat16", weighted=True)
    args = tuple(Spec((3, *x.shape), x.dtype) for x in args)
    rows = PartitionSpec(None, "device")

    def fn(*args):
        mesh = jax.sharding.get_abstract_mesh()
        many = jax.vmap(local)
        return jax.shard_map(many, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)(*args)

    return fn, args, {"mesh_axes": {"device": 4}, "in_specs": [rows] * 3}


def anywhere(chip):
    """A call that says nothing of where to run."""
    x, indices = Spec((4096, 1024), BF16), Spec((512, 8), jnp.int32)
    return gather_reduce.dense_gather_reduce, (x, indices)


def layer_sums(chip, scaled):
    """The end of `layer`, whose rows have scales or not."""
    rows, hidden = 3072, 1024
    experts, scale = Spec((rows,), jnp.int32), Spec((8, hidden), jnp.float32)
    y = Spec((rows, hidden), jnp.float32)
    product = grouped.Product(y, experts, None, scale if scaled else None, None)
    size = (512, 6)
    slots = Spec(size, jnp.float32), Spec(size, jnp.int32), Spec(size, jnp.bool_)
    run = functools.partial(grouped.cheapest_sums, exact=False)
    return run, (product, *slots, experts)


def few_on_xla(chip):
    """8 rows of 16,384 packed ones, by what XLA makes of the specification, with its gradient."""
    x = PackedRows(Spec((16384, 3584), jnp.int32), 7168, "bfloat16")

    def loss(weights, x, indices):
        options = {"implementation": "reference", "out_dtype": jnp.float32}
        return jnp.sum(gather_reduce.dense_gather_reduce(x, indices, weights, **options) ** 2)

    return jax.value_and_grad(loss), (Spec((1, 8), jnp.float32), x, Spec((1, 8), jnp.int32))


def packing(chip):
    """Packing rows of 7,168 in two types, and computing them packed."""
    rows, hidden = 2048 * 8, 7168

    def fn(wide, narrow, y, scales):
        parts = gather_reduce.column_parts(y, BF16)
        parts = [(part * scales[:, None]).astype(BF16) for part in parts]
        computed = gather_reduce.pack_parts(parts, hidden)
        return *map(gather_reduce.pack_columns, (wide, narrow)), computed

    kinds = (BF16, jnp.float8_e4m3fn, jnp.float32)
    return fn, (*(Spec((rows, hidden), kind) for kind in kinds), Spec((rows,), jnp.float32))


def layer(chip):
    """A mixture-of-experts layer in its grouped form, which sums up with what is tested here."""
    tokens, hidden, inter, experts, top_k = 512, 1024, 512, 8, 6
    into, back = Spec((experts, hidden, inter), BF16), Spec((experts, inter, hidden), BF16)
    weights = fused_moe.Weights(into, into, back)
    routing = Spec((tokens, top_k), jnp.int32), Spec((tokens, top_k), jnp.float32)
    return fused_moe.grouped_moe, (Spec((tokens, hidden), BF16), weights, *routing)
