"""tpu-inference's gather-reduce: its arguments mean here what they mean there."""

import jax.numpy as jnp
import numpy as np
import pytest

import gather_reduce
from adapters import tpu_inference
from tests.adapters import oracle
from tpukit.errors import ArgumentError

TOKENS, GROUP, ROWS, HIDDEN = 5, 3, 12, 40


def operands(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(ROWS, HIDDEN)), dtype)
    indices = jnp.asarray(rng.integers(0, ROWS, TOKENS * GROUP), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.1, 1, (TOKENS, GROUP)), jnp.float32)
    return x, indices, weights


def check_dense(**options):
    x, indices, weights = operands()
    got = tpu_inference.dense_gather_reduce(x, indices, weights, GROUP, **options)
    want = oracle.gather_reduce(x, indices, weights, GROUP)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def check_ragged():
    """Rows of other devices hold NaN, a token has none of its own."""
    x, indices, weights = operands()
    valid = np.random.default_rng(5).uniform(size=TOKENS * GROUP) < 0.5
    valid[GROUP : 2 * GROUP] = False
    others = np.setdiff1d(np.arange(ROWS), np.asarray(indices)[valid])
    x = x.at[others].set(jnp.nan)
    got = tpu_inference.ragged_gather_reduce(
        x, indices, weights.reshape(-1), jnp.asarray(valid), GROUP
    )
    want = oracle.gather_reduce(x, indices, weights, GROUP, valid)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    assert not got[1].any()


def test_dense():
    check_dense()
    check_dense(topk_wgt_zero_nan=True)


def test_ragged():
    check_ragged()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_results_have_the_dtype_of_the_rows(dtype):
    x, indices, weights = operands(dtype)
    flat, mask = weights.reshape(-1), jnp.ones(TOKENS * GROUP, bool)
    assert tpu_inference.dense_gather_reduce(x, indices, weights, GROUP).dtype == dtype
    assert tpu_inference.ragged_gather_reduce(x, indices, flat, mask, GROUP).dtype == dtype


@pytest.mark.parametrize("zero_nan", [False, True])
def test_a_weight_of_zero_never_reads_its_row(zero_nan):
    x, indices, weights = operands()
    got = tpu_inference.dense_gather_reduce(
        x.at[indices[4]].set(jnp.nan),
        jnp.where(indices == indices[4], (indices[4] + 1) % ROWS, indices).at[4].set(indices[4]),
        weights.at[1, 1].set(0),
        GROUP,
        topk_wgt_zero_nan=zero_nan,
    )
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"reduce_group_size": 4}, "indices"),
        ({"reduce_group_size": 0}, "reduce_group_size"),
        ({"reduce_group_size": None}, "reduce_group_size"),
        ({"topk_weights": jnp.ones((TOKENS, 2))}, "topk_weights"),
        ({"x": jnp.ones((ROWS, HIDDEN), jnp.int32)}, "x"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change, argument):
    x, indices, weights = operands()
    call = {"x": x, "indices": indices, "topk_weights": weights, "reduce_group_size": GROUP}
    with pytest.raises(ArgumentError) as error:
        tpu_inference.dense_gather_reduce(**(call | change))
    assert error.value.argument == argument


# Seeded faults; each is one that an adapter could have.


def test_rows_of_a_token_that_are_strided_are_caught(monkeypatch):
    right = gather_reduce.dense_gather_reduce

    def wrong(x, indices, weights):
        return right(x, indices.reshape(GROUP, TOKENS).T, weights)

    monkeypatch.setattr(gather_reduce, "dense_gather_reduce", wrong)
    with pytest.raises(AssertionError):
        check_dense()


def test_weights_of_another_order_are_caught(monkeypatch):
    right = gather_reduce.dense_gather_reduce
    monkeypatch.setattr(gather_reduce, "dense_gather_reduce", lambda x, i, w: right(x, i, w[::-1]))
    with pytest.raises(AssertionError):
        check_dense()


@pytest.mark.parametrize(
    "mask", [lambda valid: ~valid, lambda valid: valid | True, lambda valid: valid[:, ::-1]]
)
def test_a_wrong_mask_is_caught(mask, monkeypatch):
    right = gather_reduce.ragged_gather_reduce
    monkeypatch.setattr(
        gather_reduce, "ragged_gather_reduce", lambda x, i, w, valid: right(x, i, w, mask(valid))
    )
    with pytest.raises(AssertionError):
        check_ragged()
