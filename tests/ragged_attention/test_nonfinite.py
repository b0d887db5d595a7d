"""A key or value that is not finite reaches the queries that see it, and no others."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import ragged_attention as ra
from ragged_attention import layout
from tests.ragged_attention import oracle
from tests.ragged_attention.oracle import random_batch
from tests.ragged_attention.test_ragged_attention import PLAN, compiled, run

LENGTHS = [40, 70, 60, 75, 90], [1, 4, 20, 40, 6]  # a decode, drafts, prefill in several blocks
WINDOWS = np.array([21, 33, 30, 0, 50], np.int32)
TREE = np.array([[1 << (i % 32) if i else 1, 0] for i in range(96)], np.uint32)
WIDE = dataclasses.replace(PLAN, queries=64)
LATENT = {"key_dim": 192, "value_dim": 128, "latent": True}
KINDS = {
    "bf16, two heads": {"kv_heads": 2},
    "e4m3, windows": {"cache": ml_dtypes.float8_e4m3fn, "window": WINDOWS},
    "f32, windows, not causal": {
        "cache": np.float32, "dtype": np.float32, "window": WINDOWS, "causal": False,
    },
    "latent, a tree": {**LATENT, "ancestors": TREE},
    "e5m2, dim 80, no update": {
        "cache": ml_dtypes.float8_e5m2, "update": False, "kv_heads": 2, "key_dim": 80,
    },
}  # fmt: skip


def batch_of(kind):
    return random_batch(21, *LENGTHS, tokens=96, indices=40, gap=1, **KINDS[kind])


def spoiled(batch):
    """The batch with values that are not finite: cached ones, and new ones at the end of blocks."""
    bad = dataclasses.replace(batch, v_pages=batch.v_pages.copy(), k_pages=batch.k_pages.copy())
    pages = bad.k_pages if batch.layout.latent else bad.v_pages
    place = np.arange(5) * 7 % batch.layout.value_dim
    for r, back in enumerate((30, 2, 19, 8, 45)):  # so many positions before the end
        page, row = divmod(int(batch.kv_lens[r]) - back, batch.layout.page_size)
        pages[batch.pages[batch.offsets[r] + page], row, -1, place[r]] = np.nan
    if batch.layout.latent:
        bad.v_pages = bad.k_pages[..., : batch.layout.value_dim]
    if batch.k is None:
        return bad
    name = "k" if batch.layout.latent else "v"
    new = getattr(batch, name).copy()
    for r, back, value in ((1, 2, np.nan), (2, 3, -np.inf), (3, 30, np.nan), (4, 1, np.inf)):
        clipped = batch.layout.pack == 4 and np.isinf(value)  # 8-bit types are written in range
        new[batch.cu[r + 1] - back, 0, place[r]] = np.nan if clipped else value
    return dataclasses.replace(bad, **{name: new})


def stays(batch, implementation, plan=None):
    """Whether what is not finite reaches the queries that see it, and changes no bit of others."""

    def outputs(batch):
        if implementation == "interpret":
            return run(batch, plan=WIDE if "ancestors" in batch.options else plan).o
        found = ra.ragged_paged_attention(
            *batch.args(), **batch.options, implementation=implementation
        )
        return np.asarray(found.o)

    bad = spoiled(batch)
    wanted, _, _ = oracle.exact(bad)
    sees = ~np.isfinite(wanted).all(axis=2)
    others = ~sees.any(axis=1)  # heads of a query may share registers
    assert sees.any() and others.sum() > 20
    clean, o = outputs(batch), outputs(bad)
    found = ~np.isfinite(o.astype(np.float32)).all(axis=2)
    return found[sees].all() and oracle.same_bits(o[others], clean[others])


@pytest.mark.parametrize("implementation", ["interpret", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_with_the_queries_that_see_it(kind, implementation):
    assert stays(batch_of(kind), implementation)


def test_values_that_are_not_contained_are_seen(monkeypatch):
    monkeypatch.setattr(layout, "contained", lambda keys, values: (keys, values))
    compiled.cache_clear()
    try:
        assert not stays(batch_of("bf16, two heads"), "interpret")
    finally:
        compiled.cache_clear()


@pytest.mark.parametrize("dims", [(8, 8), (8, 24), (24, 8), (16, 40)])
def test_what_is_not_finite_moves_to_keys(dims):
    """Nothing else changes; and it stays where no lane of a key is free."""
    keys, values = (np.ones((6, 2, dim), np.float32) for dim in dims)
    for token, value in enumerate((np.nan, np.inf, -np.inf)):
        values[token, 1, 7 * token % dims[1]] = value
    found = layout.contained(jnp.asarray(keys), jnp.asarray(values))
    bad = ~np.isfinite(values)
    assert (np.asarray(found[1]) == np.where(bad, 0, values)).all()
    spoiled = np.isnan(found[0])
    assert (spoiled.any(axis=2) == bad.any(axis=2)).all()
    assert (np.asarray(found[0])[~spoiled] == 1).all()
    same = layout.contained(jnp.zeros((6, 2, 0)), jnp.asarray(values))[1]
    assert oracle.same_bits(same, values)
