"""Drawn layers, and what they are worth in float64 with the kernel's own roundings."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import fused_moe

FLOAT8 = ml_dtypes.float8_e4m3fn
LARGEST = {FLOAT8: np.float32(448)}
HIDDEN, INTER = 512, 256


@dataclasses.dataclass(frozen=True)
class Layer:
    """Arguments of a call; options are keyword arguments of `fused_moe`."""

    tokens: np.ndarray
    weights: fused_moe.Weights
    ids: np.ndarray
    expert_weights: np.ndarray
    options: dict

    def args(self):
        """Positional arguments."""
        return (
            jnp.asarray(self.tokens),
            self.weights,
            jnp.asarray(self.ids),
            jnp.asarray(self.expert_weights),
        )


def random_weights(rng, lead, inter=INTER, *, dtype="bfloat16", block=None, biased=False):
    """Weights of experts with this leading shape."""

    def matrix(rows, columns):
        values = rng.standard_normal((*lead, rows, columns)) / np.sqrt(rows)
        return jnp.asarray(values, jnp.bfloat16)

    def bias(width):
        return jnp.asarray(rng.standard_normal((*lead, width)), jnp.float32) if biased else None

    made = fused_moe.Weights(
        matrix(HIDDEN, inter),
        matrix(HIDDEN, inter),
        matrix(inter, HIDDEN),
        gate_bias=bias(inter),
        up_bias=bias(inter),
        down_bias=bias(HIDDEN),
    )
    return made if dtype == "bfloat16" else fused_moe.quantise(made, dtype, block=block)


def random_layer(
    seed,
    tokens=64,
    experts=8,
    top_k=3,
    *,
    dtype="float8_e4m3fn",
    block=None,
    biased=False,
    shared=0,
    masked=0.1,
    **options,
):
    """A layer whose ids are distinct in each token, some of them masked."""
    rng = np.random.default_rng(seed)
    made = {"dtype": dtype, "block": block, "biased": biased}
    weights = random_weights(rng, (experts,), **made)
    if shared:
        weights = dataclasses.replace(weights, shared=random_weights(rng, (), shared, **made))
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    ids = np.where(rng.random(ids.shape) < masked, -1, ids).astype(np.int32)
    return Layer(
        tokens=rng.standard_normal((tokens, HIDDEN)).astype(ml_dtypes.bfloat16),
        weights=weights,
        ids=ids,
        expert_weights=rng.random((tokens, top_k)).astype(np.float32),
        options=options,
    )


def wide(x):
    return np.asarray(x).astype(np.float64)


def rounded(x, dtype):
    """x in a narrow type and back."""
    return x.astype(np.float32).astype(dtype).astype(np.float64)


def quantised(x, dtype=FLOAT8):
    """Rows through a narrow type and back, by the rule of `reference.fused_moe.quantise`."""
    x = x.astype(np.float32)
    amax = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.where(amax == 0, np.float32(1), amax * (np.float32(1) / LARGEST[dtype]))
    q = np.clip(x * (np.float32(1) / scale), -LARGEST[dtype], LARGEST[dtype]).astype(dtype)
    return q.astype(np.float64) * scale.astype(np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gated(gate, up, activation, limit):
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    if activation == "silu":
        return gate * sigmoid(gate) * up
    if activation == "gelu":
        return gate * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    return gate * sigmoid(1.702 * gate) * (up + 1)


def dequantised(weights, name, index):
    w = wide(getattr(weights, name)[index])
    scale = getattr(weights, f"{name}_scale")
    if scale is not None:
        w = w * np.repeat(wide(scale[index]), w.shape[0] // scale[index].shape[0], axis=0)
    return w


def expert(x, weights, index, options, *, exact=False):
    """One expert in float64; exact leaves out the roundings of activations."""

    def narrow(x):
        if exact:
            return x
        return quantised(x) if options.get("activation_dtype") else rounded(x, ml_dtypes.bfloat16)

    def product(x, name):
        y = x @ dequantised(weights, name, index)
        bias = getattr(weights, f"{name}_bias")
        return y if bias is None else y + wide(bias[index])

    x = narrow(x)
    activation, limit = options.get("activation", "silu"), options.get("limit")
    return product(narrow(gated(product(x, "gate"), product(x, "up"), activation, limit)), "down")


def output(layer, devices=1, *, exact=False, bulk=False):
    """The output in float64.

    Unless exact, activations are rounded where the kernel rounds them, and so is what each device
    sends back, or in bulk what each expert gives; the last rounding is left to the caller.
    """
    x, ids = wide(layer.tokens), layer.ids
    experts = layer.weights.gate.shape[0]
    here = experts // devices
    back = "bfloat16" if bulk else layer.options.get("return_dtype", "bfloat16")
    back = np.dtype(jnp.dtype(back)).type
    out = np.zeros_like(x)

    def sent(y):
        if exact:
            return y
        return quantised(y) if back is FLOAT8 else rounded(y, back)

    for device in range(devices):
        sums, any_ = np.zeros_like(x), np.zeros(len(x), bool)
        for e in range(device * here, (device + 1) * here):
            weight = np.where(ids == e, wide(layer.expert_weights), 0).sum(axis=1)
            rows = (ids == e).any(axis=1)
            if rows.any():
                y = expert(x[rows], layer.weights, e, layer.options, exact=exact)
                y *= weight[rows, None]
                sums[rows] += sent(y) if bulk else y
                any_ |= rows
        out[any_] += sums[any_] if bulk else sent(sums[any_])
    if layer.weights.shared is not None:
        out += sent(expert(x, layer.weights.shared, (), layer.options, exact=exact))
    return out


def error(found, wanted, axis=None):
    """Relative Frobenius error; with an axis the worst row's."""
    found, wanted = wide(found), wide(wanted)
    difference = np.sqrt(np.sum((found - wanted) ** 2, axis=axis))
    size = np.sqrt(np.sum(wanted**2, axis=axis))
    return float(np.max(difference / np.maximum(size, 1e-30))) if difference.size else 0.0
