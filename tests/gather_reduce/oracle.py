"""Inputs, and what the sums are: bit for bit in the documented order, and in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import gather_reduce
from gather_reduce import api
from tpukit import sparsecore

BF16, F32, F8 = (jnp.dtype(t) for t in (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn))
FORMATS = ("float32", "bfloat16", "packed bfloat16", "packed float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A static shape: what a trace depends on."""

    tokens: int = 40
    top_k: int = 8
    rows: int = 96
    hidden_size: int = 256
    format: str = "packed bfloat16"
    weighted: bool = True
    out: str = "bfloat16"
    chip: str = "tpu7x"

    def dtype(self):
        return jnp.dtype(self.format.removeprefix("packed "))


@dataclasses.dataclass
class Data:
    """Arrays of a call; x is [rows, hidden_size] in the format's type, not packed."""

    x: np.ndarray
    indices: np.ndarray
    weights: np.ndarray | None
    valid: np.ndarray | None = None


def draw(shape: Shape, seed: int = 0, *, holes: float = 0.0, invalid: float = 0.0) -> Data:
    """Random rows and weights; some indices are -1, some terms are not valid."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((shape.rows, shape.hidden_size)).astype(shape.dtype())
    size = (shape.tokens, shape.top_k)
    indices = rng.integers(0, shape.rows, size).astype(np.int32)
    indices[rng.random(size) < holes] = -1
    weights = rng.standard_normal(size).astype(np.float32) if shape.weighted else None
    valid = rng.random(size) >= invalid if invalid else None
    return Data(x, indices, weights, valid)


def terms(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """[tokens, top_k, hidden] what each term is in float32, and [tokens, top_k] which count."""
    counted = (data.indices >= 0) & (data.indices < len(data.x))
    if data.weights is not None:
        counted &= data.weights != 0
    if data.valid is not None:
        counted &= data.valid
    rows = data.x[np.where(counted, data.indices, 0)].astype(np.float32)
    rows = np.where(counted[..., None], rows, np.float32(0))
    if data.weights is None:
        return rows, counted
    return rows * np.where(counted, data.weights, 0)[..., None].astype(np.float32), counted


def exact(data: Data, out: str) -> np.ndarray:
    """The sums, bit for bit: pairs of neighbours, then pairs of those, the odd one waits."""
    level = list(np.moveaxis(terms(data)[0], 1, 0))
    while len(level) > 1:
        paired = [level[n] + level[n + 1] for n in range(0, len(level) - 1, 2)]
        level = paired + ([level[-1]] if len(level) % 2 else [])
    return level[0].astype(jnp.dtype(out))


def float64(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """The sums in float64, and the sums of the magnitudes."""
    parts = terms(data)[0].astype(np.float64)
    return parts.sum(axis=1), np.abs(parts).sum(axis=1)


def operand(shape: Shape, x: np.ndarray):
    """x in the shape's format."""
    return gather_reduce.pack_columns(jnp.asarray(x)) if "packed" in shape.format else x


def problem(shape: Shape):
    """The static problem of a shape."""
    x = jax.eval_shape(
        lambda: operand(shape, jnp.zeros((shape.rows, shape.hidden_size), shape.dtype()))
    )
    size = (shape.tokens, shape.top_k)
    weights = jax.ShapeDtypeStruct(size, F32) if shape.weighted else None
    indices = jax.ShapeDtypeStruct(size, jnp.int32)
    return api.problem_of("test", x, indices, weights, None, None, jnp.dtype(shape.out))


def simulate(shape: Shape, data: Data, *, timing="lazy", seed=0, plan=None, **options):
    """The public function on simulated SparseCores; returns its result and what was moved."""
    x = operand(shape, data.x)
    leaves, tree = jax.tree.flatten(x)
    optional = [v for v in (data.weights, data.valid) if v is not None]
    call = functools.partial(
        _call, tree, len(leaves), data.weights is not None, shape.out, plan, options
    )
    arrays = [*leaves, data.indices, *optional]
    found = sparsecore.simulate(call, *arrays, chip=shape.chip, timing=timing, seed=seed)
    return np.asarray(found.out), found.kernels


def _call(tree, count, weighted, out, plan, options, *arrays):
    x = jax.tree.unflatten(tree, arrays[:count])
    indices, *rest = arrays[count:]
    weights = rest.pop(0) if weighted else None
    options = {"implementation": "pallas", "plan": plan, "out_dtype": jnp.dtype(out)} | options
    if rest:
        return gather_reduce.ragged_gather_reduce(x, indices, weights, rest[0], **options)
    return gather_reduce.dense_gather_reduce(x, indices, weights, **options)


def check(shape: Shape, data: Data, **options):
    """Bit-exact on the simulator, in one kernel; returns what that moved."""
    out, kernels = simulate(shape, data, **options)
    assert len(kernels) == 1, "the kernel did not run"
    np.testing.assert_array_equal(out.astype(F32), exact(data, shape.out).astype(F32))
    return kernels[0]
