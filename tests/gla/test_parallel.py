"""Sequences spread over devices give what one device gives."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import gla
from tests.gla import oracle
from tpukit import interpret
from tpukit.errors import ArgumentError

PLAN = gla.Plan(heads=2, interleave=2, window=32, inputs=2, states=2, lookahead=1)
BATCH, TIME = 2, 80  # divides by 1, 2, 5 and 8
WHOLE, SPREAD = jax.P(), jax.P(None, "time")


def arrays(dtype=np.float32, per_token=True, qk_heads=2, strongest=1.0):
    """q, k, v, g, initial state and a cotangent of the output."""
    rng = np.random.default_rng(60)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype(dtype))

    qk = (BATCH, TIME, qk_heads, 64)
    vo = (BATCH, TIME, 2, 64)
    size = vo[:3] if per_token else (2,)
    g = jnp.asarray(-rng.uniform(1e-5, strongest, size), jnp.float32)
    state = jnp.asarray(rng.standard_normal((BATCH, 2, 64, 64)), jnp.float32)
    return draw(*qk), draw(*qk), draw(*vo), g, state, draw(*vo)


def decay_of(g):
    return gla.TokenDecay(g) if g.ndim == 3 else gla.HeadDecay(g)


def sharded(function, devices, per_token, out_specs):
    """`function` over a mesh axis `time`, under shard_map's own checks."""
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("time",), kind, devices=jax.devices()[:devices])
    by_token = SPREAD if per_token else WHOLE
    specs = (SPREAD, SPREAD, SPREAD, by_token, WHOLE, SPREAD)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs))


@functools.cache
def spread(devices, per_token=True, with_state=True, implementation="reference"):
    def call(q, k, v, g, state, _):
        options = {"decay": decay_of(g), "implementation": implementation, "plan": PLAN}
        state = state if with_state else None
        return gla.context_parallel_gla(q, k, v, axis_name="time", initial_state=state, **options)

    return sharded(call, devices, per_token, (SPREAD, WHOLE))


def alone(q, k, v, g, state):
    """The definition, float64: output and final state."""
    wide = [oracle.wide(x) for x in (q, k, v)]
    g = np.broadcast_to(np.clip(oracle.wide(g), -30, 0), (BATCH, TIME, 2))
    o, final = [], []
    for n in range(BATCH):
        group = 2 // q.shape[2]
        q_n, k_n, v_n = (x[n] for x in wide)
        q_n, k_n = (np.repeat(x, group, axis=1) for x in (q_n, k_n))
        start = np.zeros((2, 64, 64)) if state is None else oracle.wide(state)[n]
        one = oracle.recurrence(q_n, k_n, v_n, g[n][..., None], start, 0, 64**-0.5)
        o.append(one[0])
        final.append(one[1])
    return np.stack(o), np.stack(final)


@pytest.mark.parametrize("devices", [1, 2, 5, 8])
@pytest.mark.parametrize("per_token,with_state", [(False, True), (True, True), (True, False)])
def test_any_number_of_devices(devices, per_token, with_state):
    q, k, v, g, state, d_o = arrays(per_token=per_token, strongest=0.1)
    o, final = spread(devices, per_token, with_state)(q, k, v, g, state, d_o)
    wanted, wanted_final = alone(q, k, v, g, state if with_state else None)
    assert oracle.error(o, wanted) < 3e-6 and oracle.error(o, wanted, axis=(2, 3)) < 1e-5
    assert oracle.error(final, wanted_final) < 3e-6


@pytest.mark.parametrize("per_token", [False, True])
def test_strongest_and_weakest_decays(per_token):
    q, k, v, g, state, d_o = arrays(per_token=per_token, qk_heads=1)
    g = jnp.broadcast_to(jnp.asarray([-40.0, -1e-6]), g.shape)
    o, final = spread(5, per_token)(q, k, v, g, state, d_o)
    wanted, wanted_final = alone(q, k, v, g, state)
    assert oracle.error(o, wanted, axis=(1, 3)) < 1e-5
    assert oracle.error(final, wanted_final, axis=(2, 3)) < 1e-5


def test_the_kernel_in_bf16():
    q, k, v, g, state, d_o = arrays(ml_dtypes.bfloat16)
    with interpret.strict():
        found = spread(2, implementation="interpret")(q, k, v, g, state, d_o)
        o, final = jax.block_until_ready(found)
    wanted, wanted_final = alone(q, k, v, g, state)
    assert o.dtype == jnp.bfloat16 and oracle.error(o, wanted) < 3.5e-3
    assert oracle.error(final, wanted_final) < 2e-3


@pytest.mark.parametrize("per_token", [False, True])
def test_gradients_are_those_of_one_device(per_token):
    *inputs, d_o = arrays(per_token=per_token, strongest=0.1)

    def pull(function):
        def both(q, k, v, g, state, d_o):
            return jax.vjp(functools.partial(function), q, k, v, g, state)[1]((d_o, state))

        return both

    def whole(q, k, v, g, state):
        options = {"initial_state": state, "implementation": "reference"}
        return gla.gla_batch(q, k, v, decay=decay_of(g), **options)

    def piece(q, k, v, g, state):
        options = {"initial_state": state, "implementation": "reference", "axis_name": "time"}
        return gla.context_parallel_gla(q, k, v, decay=decay_of(g), **options)

    by_token = SPREAD if per_token else WHOLE
    specs = (SPREAD, SPREAD, SPREAD, by_token, WHOLE)
    found = sharded(pull(piece), 4, per_token, specs)(*inputs, d_o)
    for x, y in zip(found, jax.jit(pull(whole))(*inputs, d_o), strict=True):
        assert oracle.error(x, y) < 2e-5


def test_nan_does_not_travel_backwards():
    q, k, v, g, state, d_o = arrays()
    wanted, _ = spread(5)(q, k, v, g, state, d_o)
    bad, final = spread(5)(q, k.at[0, 40].set(jnp.nan), v, g, state, d_o)
    assert oracle.same_bits(bad[:, :32], wanted[:, :32])  # two pieces before it
    assert oracle.same_bits(bad[1], wanted[1]) and np.isfinite(final[1]).all()
    assert np.isnan(bad[0, 48:]).any() and np.isnan(final[0]).any()


BAD = {
    "reverse": (dict(reverse=True), "reverse is True"),
    "decay": (dict(decay=jnp.zeros(2)), "decay is a .*; needs HeadDecay"),
    "short g": (dict(decay=gla.HeadDecay(jnp.zeros(3))), r"decay.g has shape \(3,\)"),
    "heads": (dict(k=jnp.zeros((2, 8, 3, 64))), "heads of v is 2; needs a multiple of 3"),
    "state": (dict(initial_state=jnp.zeros((2, 2, 64, 32))), "initial_state has shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, message = BAD[name]
    x = jnp.zeros((2, 8, 2, 64))
    arguments = {"q": x, "k": x, "v": x, "decay": gla.HeadDecay(jnp.zeros(2)), **changes}
    with pytest.raises(ArgumentError, match=f"context_parallel_gla: {message}"):
        gla.context_parallel_gla(**arguments, axis_name="time")
