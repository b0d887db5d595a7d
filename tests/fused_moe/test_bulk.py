"""What is done around the kernel where rows travel in bulk, against plain loops."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_moe
from fused_moe import bulk
from fused_moe.dispatch import SCALE
from fused_moe.problem import problem_of
from fused_moe.rows import RowFormat
from fused_moe.spec import ROWS
from reference import fused_moe as reference
from tests.fused_moe import oracle
from tests.fused_moe.test_contract import shapes
from tpukit.errors import ArgumentError

EXPERTS = 8


def problem_for(layer):
    options = {"activation": "silu", "limit": None, "return_dtype": jnp.bfloat16, "axes": ()}
    chosen = {"activation_dtype": None, **layer.options}
    return problem_of(*layer.args(), **options, **chosen)


def sorted_(layer):
    problem = problem_for(layer)
    tokens, _, ids, weights = layer.args()
    function = jax.jit(bulk.sort_rows, static_argnums=3)
    return problem, jax.tree.map(np.asarray, function(tokens, ids, weights, problem))


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), shared=st.sampled_from([0, 256]), one=st.booleans())
def test_every_entry_has_a_row_among_its_experts(seed, shared, one):
    rng = np.random.default_rng(seed)
    made = oracle.random_layer(1, 64, shared=shared)
    ids = rng.integers(-2, 10, (64, 3)).astype(np.int32)
    ids = np.full_like(ids, 5) if one else ids  # all to one expert, all of a token's the same
    layer = dataclasses.replace(made, ids=ids)
    problem, found = sorted_(layer)
    bounds = found.heads.ravel()[: 2 * EXPERTS + 1 : 2]
    own = 64 if shared else 0
    assert bounds[0] == own and not np.any((bounds - own) % ROWS)
    assert bounds[-1] <= problem.bulk_rows == len(found.rows)
    np.testing.assert_array_equal(found.rows[:own, -128:-125].view(np.int32), ids[:own])
    taken = set()
    for token, slot in np.ndindex(64, 3):
        expert, place = ids[token, slot], found.places[slot, token]
        counts = 0 <= expert < EXPERTS and expert not in ids[token, :slot]
        assert found.known[slot, token] == counts
        if counts:
            assert bounds[expert] <= place < bounds[expert + 1]
            np.testing.assert_array_equal(found.rows[place, -128:-125].view(np.int32), ids[token])
            words = found.rows[place, : problem.rows_out.words]
            values = words.view(np.uint16).reshape(-1, 128, 2).swapaxes(1, 2).ravel()
            np.testing.assert_array_equal(values, layer.tokens[token].view(np.uint16))
            taken.add(place)
    assert len(taken) == found.known.sum()
    for expert in range(EXPERTS):
        rows = found.known[(expert == ids.T)].sum()
        assert bounds[expert + 1] - bounds[expert] == -(-rows // ROWS) * ROWS


def test_rows_are_quantised_as_the_reference_does():
    fmt = RowFormat(512, jnp.dtype(jnp.float8_e4m3fn), tailed=True)
    x = np.random.default_rng(0).standard_normal((40, 512)).astype(ml_dtypes.bfloat16)
    x[3], x[5, 7] = 0, np.nan
    words = np.asarray(jax.jit(fmt.packed)(x, jnp.zeros((40, 128), jnp.int32)))
    wanted, scale = jax.jit(reference.quantise, static_argnums=1)(x, jnp.float8_e4m3fn)
    values = words[:, : fmt.words].copy().view(np.uint8).reshape(40, 128, 4).swapaxes(1, 2)
    found = values.reshape(40, 512).view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(found.astype(np.float32), np.asarray(wanted, np.float32))
    np.testing.assert_array_equal(
        words[:, fmt.words + SCALE], np.asarray(scale)[:, 0].view(np.uint32)
    )


SHAPE = (2048, 768, 128, 4096, 8, "float8_e4m3fn")


def test_many_tokens_on_one_device_travel_in_bulk_and_explain_says_so():
    args, options = shapes(*SHAPE)
    found = fused_moe.explain(*args, chip="tpu7x", **options)
    assert found.plan.bulk == 1 and found.implementation == "pallas"
    assert found.costs.bulk and found.costs.fused < found.costs.other
    assert f"{found.costs.fused:.0f} us with rows in bulk (" in str(found)
    single = dataclasses.replace(found.plan, bulk=0, tile=64, hidden_slice=1024)
    given_ = fused_moe.explain(*args, chip="tpu7x", plan=single, **options)
    assert given_.costs.fused > given_.costs.other and "with rows one by one (" in str(given_)


def test_in_bulk_a_call_need_not_be_split():
    args, options = shapes(2048, 768, 128, 65536, 8, "float8_e4m3fn")
    found = fused_moe.explain(*args, chip="tpu7x", **options)
    assert found.plan.bulk and found.problem.num_tokens == 65536


def test_more_rows_than_can_be_numbered_go_one_by_one():
    args, options = shapes(2048, 768, 1024, 2**20, 8, "float8_e4m3fn")
    assert fused_moe.explain(*args, chip="tpu7x", **options).problem.num_tokens < 2**20


@pytest.mark.parametrize("devices", [2, 8])
def test_several_devices_move_rows_one_by_one(devices):
    args, options = shapes(*SHAPE)
    axes = [("x", devices)]
    found = fused_moe.explain(*args, chip="tpu7x", axes=axes, **options)
    assert found.plan.bulk == 0 and found.costs.other is None
    with pytest.raises(ArgumentError, match=r"plan\.bulk is 1; needs 0"):
        plan = dataclasses.replace(found.plan, bulk=1)
        fused_moe.explain(*args, chip="tpu7x", axes=axes, plan=plan, **options)
