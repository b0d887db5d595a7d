"""The specification against an independent float64 recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gla
from reference import gla as reference
from tests.gla import oracle

CASES = {
    "one": dict(lengths=[40]),
    "ragged": dict(lengths=[1, 0, 17, 1, 1, 64, 3], tokens=100, gap=5),
    "null and repeated slots": dict(lengths=[3, 9, 2, 8], slots=[2, -1, 99, 2]),
    "grouped heads": dict(lengths=[5, 20], qk_heads=2, heads=6, dims=(64, 128)),
}


def call(function, batch, **options):
    return function(*batch.args(), decay=batch.decay, **options)


@pytest.mark.parametrize("per_token,reverse", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", CASES)
def test_recurrent_is_the_definition(name, per_token, reverse):
    batch = oracle.random_batch(1, **CASES[name], dtype=np.float32, per_token=per_token)
    o, pool = oracle.exact(batch, reverse=reverse)
    with jax.enable_x64(True):
        wide = oracle.Batch(
            *(
                x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x
                for x in vars(batch).values()
            )
        )
        found = call(reference.recurrent, wide, dtype=jnp.float64, reverse=reverse)
    assert oracle.error(found[0], o) < 1e-13
    assert oracle.error(found[1], pool) < 1e-13


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("per_token,reverse", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", CASES)
def test_chunked_is_the_definition(name, per_token, reverse, chunk):
    batch = oracle.random_batch(2, **CASES[name], dtype=np.float32, per_token=per_token)
    o, pool = oracle.exact(batch, reverse=reverse)
    options = {"decay": batch.decay, "chunk": chunk, "reverse": reverse}
    found = jax.jit(lambda *args: reference.chunked(*args, **options))(*batch.args())
    assert oracle.error(found[0], o) < 2e-6
    assert oracle.error(found[1], pool) < 2e-6


@pytest.mark.parametrize("chunk", [64, 128])
def test_gradients_are_right_and_finite_at_the_strongest_slope(chunk):
    batch = oracle.random_batch(3, [150], dtype=np.float32, known=[True])
    decay = gla.HeadDecay(-jnp.asarray([0.93, 5e-5], jnp.float32))

    def loss(function, **options):
        def value(q, k, v, pool):
            o, new = function(q, k, v, pool, *batch.args()[4:], decay=decay, **options)
            return jnp.sum(o * jnp.cos(o)) + jnp.sum(new**2)

        return jax.jit(jax.grad(value, argnums=(0, 1, 2, 3)))(*batch.args()[:4])

    for found, wanted in zip(
        loss(reference.chunked, chunk=chunk), loss(reference.recurrent), strict=True
    ):
        assert np.isfinite(found).all()
        assert oracle.error(found, wanted) < 2e-5


@pytest.mark.parametrize("strongest", [0.01, 29.9])
@pytest.mark.parametrize("delta", [False, True])
def test_gradients_of_decays_keep_their_digits(strongest, delta):
    """Those of strong decays are tiny, of terms that would be far from it."""
    batch = oracle.random_batch(5, [150], dtype=np.float32, known=[True], delta=delta, heads=2)
    g = -np.float32([strongest, strongest / 2])

    def gradient(function, g, **options):
        def value(g):
            gates = {"decay": gla.HeadDecay(g), "beta": batch.strength}
            return jnp.sum(function(*batch.args(), **gates, **options)[0])

        return jax.grad(value)(g)

    with jax.enable_x64(True):
        wanted = gradient(reference.recurrent, g.astype(np.float64), dtype=jnp.float64)
    found = gradient(reference.chunked, g)
    assert oracle.error(found, wanted, axis=()) < 1e-4


def test_operands_are_rounded_where_asked():
    batch = oracle.random_batch(4, [100])
    wanted = oracle.exact(batch)[0]
    plain = oracle.error(call(reference.chunked, batch)[0], wanted)
    rounded = oracle.error(call(reference.chunked, batch, operands=jnp.bfloat16)[0], wanted)
    assert 1.1 * plain < rounded < 3.5e-3


def test_operands_are_rounded_under_jit_too():
    batch = oracle.random_batch(6, [100], dtype=np.float32, per_channel=True)

    def rounded(*args):
        options = {"decay": batch.decay, "operands": jnp.bfloat16}
        return reference.chunked(*args, **options)[0]

    assert oracle.error(jax.jit(rounded)(*batch.args()), rounded(*batch.args())) < 2e-4


def test_slopes():
    ling = np.asarray(gla.ling_decay(64, layer=1, num_layers=80).g)
    np.testing.assert_allclose(ling[0], -(2 ** (-1 / 8)) * (1 + 1e-5), rtol=1e-6)
    assert (np.diff(ling) > 0).all() and ling[-1] == pytest.approx(-(2.0**-8), rel=1e-4)
    assert gla.ling_decay(12, layer=0, num_layers=80).g.shape == (12,)  # not a power of two
    fla = np.asarray(gla.fla_decay(16, layer=4, num_layers=8).g)
    np.testing.assert_allclose(fla, -0.25 * np.arange(16), rtol=1e-6)
