"""Programs for `tpukit.aot`, which compiles them in processes of their own."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import fused_moe
import gather_reduce
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
    """A call per device of a mesh, inside `jax.shard_map` with its checks."""
    local, args = call("bfloat16", 256, 8, 512, 512, out="bfloat16", weighted=True)
    rows = PartitionSpec("device")

    def fn(*args):
        mesh = jax.sharding.get_abstract_mesh()
        return jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)(*args)

    return fn, args, {"mesh_axes": {"device": 4}, "in_specs": [rows] * 3}


def many(chip):
    """Three calls, batched by `jax.vmap`."""
    local, args = call("bfloat16", 64, 8, 512, 512, out="bfloat16", weighted=True)
    return jax.vmap(local), tuple(Spec((3, *x.shape), x.dtype) for x in args)


def few_on_xla(chip):
    """8 rows of 16,384 packed ones, by what XLA makes of the specification, with its gradient."""
    x = PackedRows(Spec((16384, 3584), jnp.int32), 7168, "bfloat16")

    def loss(weights, x, indices):
        options = {"implementation": "reference", "out_dtype": jnp.float32}
        return jnp.sum(gather_reduce.dense_gather_reduce(x, indices, weights, **options) ** 2)

    return jax.value_and_grad(loss), (Spec((1, 8), jnp.float32), x, Spec((1, 8), jnp.int32))


def packing(chip, form):
    """What it takes to pack 2,048 x 8 rows of 7,168, or to compute them packed."""
    rows, hidden = 2048 * 8, 7168
    kind = jnp.float8_e4m3fn if form == "float8" else BF16

    def producer(y, scales):
        parts = gather_reduce.column_parts(y, BF16)
        parts = [(part * scales[:, None]).astype(BF16) for part in parts]
        return gather_reduce.pack_parts(parts, hidden)

    if form == "producer":
        return producer, (Spec((rows, hidden), jnp.float32), Spec((rows,), jnp.float32))
    return gather_reduce.pack_columns, (Spec((rows, hidden), kind),)


def layer(chip, tokens=512, weights="bfloat16"):
    """A mixture-of-experts layer in its grouped form, which sums up with what is tested here."""
    hidden, inter, experts, top_k = 1024, 512, 8, 6
    into, back = Spec((experts, hidden, inter), BF16), Spec((experts, inter, hidden), BF16)
    given = fused_moe.Weights(into, into, back)
    if weights != "bfloat16":
        given = jax.eval_shape(lambda w: fused_moe.quantise(w, weights), given)
    routing = Spec((tokens, top_k), jnp.int32), Spec((tokens, top_k), jnp.float32)
    return fused_moe.grouped_moe, (Spec((tokens, hidden), BF16), given, *routing)
