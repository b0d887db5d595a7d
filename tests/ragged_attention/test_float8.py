"""Products of float8 on chips that have them: as exact as those of bfloat16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import ragged_attention as ra
from ragged_attention import flash, plan
from tests.ragged_attention.oracle import random_batch
from tests.ragged_attention.test_mutations import passes
from tests.ragged_attention.test_ragged_attention import LATE, check_gates, run
from tpukit.chips import chip

E4M3 = ml_dtypes.float8_e4m3fn
LENGTHS = [700, 33, 60, 0, 300, 1], [1, 2, 9, 0, 5, 1]
LATENT = {"key_dim": 192, "value_dim": 128, "latent": True, "page_size": 64}
KINDS = {
    "two heads": {"kv_heads": 2},
    "one query head, dim 64, soft cap": {"q_heads": 1, "key_dim": 64, "soft_cap": 3.0},
    "10 heads of 256, sinks": {
        "q_heads": 10, "key_dim": 256, "sinks": np.linspace(-2, 3, 10).astype(np.float32),
    },
    "latents, windows": {**LATENT, "window": np.array([5, 0, 40, 1, 300, 8], np.int32)},
}  # fmt: skip


def batch_of(kind="two heads", **more):
    return random_batch(60, *LENGTHS, num_pages=90, indices=90, cache=E4M3, **KINDS[kind], **more)


def style(batch, tokens=1, name="tpu7x"):
    problem = ra.explain(*batch.args(), **batch.options, chip="tpu7x").problem
    return plan.style_of(problem, tokens, chip(name))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    batch = batch_of(kind)
    assert style(batch).narrow
    check_gates(batch, run(batch))


def test_who_multiplies_float8():
    batch = batch_of()
    narrow = {name: style(batch, name=name).narrow for name in ("v5e", "v5p", "v6e", "tpu7x")}
    assert narrow == {"v5e": False, "v5p": False, "v6e": False, "tpu7x": True}
    assert style(batch, 4).narrow and not style(batch, 8).narrow  # 16 rows, two heads of 128 lanes
    wide = random_batch(60, *LENGTHS, cache=E4M3, q_heads=16, num_pages=90, indices=90, **LATENT)
    assert not style(wide, 2).narrow
    for other in (ml_dtypes.float8_e5m2, np.int8, ml_dtypes.bfloat16):
        assert not style(random_batch(60, [9], [1], cache=other)).narrow
    assert not style(random_batch(60, [9], [1], cache=E4M3, dtype=np.float32)).narrow
    scales = np.ones((40, 16, 1), np.float32)
    assert not style(random_batch(60, [9], [1], cache=E4M3, k_scale=scales)).narrow


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_queries_of_any_size(size):
    """Those of a head are 2^20 times another's, too, and some lanes far below others."""
    batch = batch_of(sm_scale=0.1 / size)
    q = batch.q.astype(np.float32) * size
    q[:, 1], q[:, :, ::3] = q[:, 1] * 2.0**-20, q[:, :, ::3] * 2.0**-8
    batch = dataclasses.replace(batch, q=q.astype(ml_dtypes.bfloat16))
    check_gates(batch, run(batch))


def long_tail():
    """One key weighs as much as thousands that are 2^-12 of it each."""
    batch = random_batch(61, [4200], [1], num_pages=280, indices=280, cache=E4M3, sm_scale=1.0)
    batch.q[0] = 0
    batch.q[0, :, 0] = 1
    keys = batch.k_pages[batch.pages[: batch.offsets[1]]]
    keys[..., 0] = np.where(np.arange(keys.shape[0] * 16).reshape(-1, 16, 1) == 100, 9.0, 0.75)
    batch.k_pages[batch.pages[: batch.offsets[1]]] = keys
    return batch


def test_a_long_tail_of_small_weights():
    batch = long_tail()
    check_gates(batch, run(batch))


def test_parts_are_as_good_as_bfloat16():
    rng = np.random.default_rng(0)
    y = jnp.asarray(np.eye(64).astype(E4M3))
    x = rng.uniform(-256, 256, (24, 64)) * 2.0 ** rng.integers(-9, 1, (24, 64))
    queries = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    of = functools.partial(flash.narrow_dot, y=y, contract=(1, 0))
    error = np.abs(np.asarray(of(jnp.asarray(queries), parts=2)) - queries)
    assert (error[np.abs(queries) >= 2.0**-6] == 0).all()  # their 8 bits are two parts
    assert error.max() <= 2.0**-14  # of rows within 256
    weights = (256 * 2.0 ** rng.uniform(-30, 0, (24, 64))).astype(np.float32)
    error = np.abs(np.asarray(of(jnp.asarray(weights), parts=3), np.float64) - weights)
    assert (error <= np.maximum(2.0**-12 * weights, 256 * 2.0**-26)).all()


def test_normal_rows():
    """Of zeros and denormal numbers too; what is not finite stays so."""
    size = np.float32([0, 1e-40, 2.0**-126, 1e-20, 1, 255.99, 2.0**127, 3e38])[:, None]
    x = jnp.asarray(size * np.linspace(-1, 0.5, 8, dtype=np.float32))
    rows, unit = jax.jit(flash.normal)(x)
    assert (np.abs(np.asarray(rows)) < 256).all() and (np.log2(np.asarray(unit)) % 1 == 0).all()
    kept = np.abs(np.asarray(x)) >= 2.0**-118  # others count for nothing among normal numbers
    assert (np.asarray(rows * unit)[kept] == np.asarray(x)[kept]).all()
    for bad in (np.nan, np.inf):
        rows, _ = flash.normal(jnp.asarray([[1.0, bad, 2.0]]))
        assert np.isnan(np.asarray(rows.astype(flash.NARROW), np.float32)).any()


normal, narrow_dot = flash.normal, flash.narrow_dot


def fewer(x, y, contract, parts):
    """One part less."""
    return narrow_dot(x, y, contract, parts - 1)


FAULTS = {
    "queries of 4 bits": (flash, "narrow_dot", fewer),
    "weights of 4 bits": (
        flash,
        "narrow_dot",
        lambda x, y, at, n: narrow_dot(x, y, at, n % 3 or 1),
    ),
    "units are forgotten": (flash, "normal", lambda x: (normal(x)[0], 1.0)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_seen(name, monkeypatch):
    batch = batch_of()
    place, attribute, fault = FAULTS[name]
    monkeypatch.setattr(place, attribute, fault)
    assert not passes(LATE, batch)


def test_a_tail_that_is_lost_is_seen(monkeypatch):
    batch = long_tail()
    monkeypatch.setattr(flash, "MOST", -8)  # weights below 2^-8 only
    assert not passes(LATE, batch)
