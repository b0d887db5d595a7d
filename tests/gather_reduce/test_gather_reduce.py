"""The kernel on simulated SparseCores: bit for bit what the documented order gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gather_reduce
from gather_reduce import Plan
from gather_reduce import plan as plan_module
from reference import gather_reduce as reference
from tests.gather_reduce import oracle
from tests.gather_reduce.oracle import FORMATS, Shape, check, draw, problem
from tpukit.chips import chip

pytestmark = pytest.mark.needs("SparseCore simulator")

CHIPS = ("v5p", "v6e", "tpu7x")


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("rows", FORMATS)
def test_formats(rows, weighted, out):
    shape = Shape(tokens=19, top_k=6, hidden_size=512, format=rows, weighted=weighted, out=out)
    check(shape, draw(shape))
    check(shape, draw(shape, 1, holes=0.2), timing="random")


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 7, 8, 10, 16, 17, 32])
def test_any_top_k(top_k):
    shape = Shape(tokens=11, top_k=top_k)
    check(shape, draw(shape, holes=0.1))


@pytest.mark.parametrize("tokens", [1, 2, 3, 63, 64, 65])
def test_any_number_of_tokens(tokens):
    """64 give each subcore a step."""
    for rows, out in (("packed bfloat16", "bfloat16"), ("float32", "float32")):
        shape = Shape(tokens=tokens, format=rows, out=out, hidden_size=128)
        check(shape, draw(shape, holes=0.1))


@pytest.mark.parametrize("hidden_size", [1, 128, 200, 384, 640])
@pytest.mark.parametrize("rows", FORMATS)
def test_any_hidden_size(rows, hidden_size):
    shape = Shape(tokens=4, top_k=2, hidden_size=hidden_size, format=rows)
    check(shape, draw(shape))


@pytest.mark.parametrize("rows", [1, 7])
def test_an_odd_number_of_rows(rows):
    shape = Shape(tokens=5, top_k=3, rows=rows, format="bfloat16")
    check(shape, draw(shape))


@pytest.mark.parametrize("rows", FORMATS)
@pytest.mark.parametrize("chip", CHIPS)
def test_chips(chip, rows):
    shape = Shape(tokens=9, hidden_size=512, format=rows, chip=chip)
    check(shape, draw(shape, holes=0.1))


@pytest.mark.parametrize("timing", ["eager", "lazy", "random"])
@pytest.mark.parametrize("parts", [1, 2])
def test_windows_and_plans_do_not_change_a_bit(parts, timing, monkeypatch):
    """50 steps, of which a subcore holds the indices of one or two at a time, in 2 or 1 chunks."""
    monkeypatch.setattr(plan_module, "WINDOW_ENTRIES", 16 * parts)
    shape = Shape(tokens=199, top_k=4, format="float32")
    plan = Plan("sparsecore", parts, 128)
    work = plan_module.work_of(problem(shape), plan, chip("tpu7x").sparse)
    assert work.windows > 1 and work.chunks == 2 // parts
    check(shape, draw(shape, holes=0.02), plan=plan, timing=timing, seed=3)


@pytest.mark.parametrize(
    ("chip", "rows"),
    [*(("tpu7x", rows) for rows in FORMATS), ("v6e", "bfloat16"), ("v5p", "packed bfloat16")],
)
def test_tokens_with_few_valid_rows(chip, rows):
    """None, one or two of them take a way of their own: 6 of 10 steps, then all of them."""
    shape = Shape(tokens=20, top_k=6, format=rows, chip=chip, weighted=rows != "float32")
    data = draw(shape, invalid=0.75)
    few = (data.valid.reshape(10, 2, 6).sum(axis=-1) <= 2).all(axis=-1)
    assert few.sum() == 6
    check(shape, data)
    shape = dataclasses.replace(shape, tokens=12)
    ones = draw(shape)
    ones.valid = np.tile(np.eye(6, dtype=bool), (2, 1))
    check(shape, ones)


SMALL = Shape(tokens=21, top_k=5, rows=33)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    holes=st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]),
    invalid=st.sampled_from([0.0, 0.05, 0.5, 0.94, 1.0]),
    timing=st.sampled_from(["eager", "lazy", "random"]),
)
def test_any_data_in_any_order(seed, holes, invalid, timing):
    data = draw(SMALL, seed, holes=holes, invalid=invalid)
    check(SMALL, data, timing=timing, seed=seed)


# The semantics, one by one.


@pytest.mark.parametrize("rows", FORMATS)
def test_what_is_not_chosen_does_not_leak(rows):
    """NaN and infinities in rows of -1, of invalid terms, and of weights of 0."""
    shape = Shape(tokens=8, top_k=4, rows=64, hidden_size=512, format=rows)
    data = draw(shape, invalid=0.3)
    bad = np.array([np.nan] if rows.endswith("fn") else [np.nan, np.inf, -np.inf])
    chosen = np.random.default_rng(1).permutation(64)[:20]
    data.x[chosen] = np.resize(bad, (20, 512)).astype(data.x.dtype)
    hit = np.isin(data.indices, chosen)
    data.weights[hit & (np.arange(4) == 0)] = 0.0
    data.indices[hit & (np.arange(4) == 1)] = -1
    data.valid &= ~(hit & (np.arange(4) > 1))
    assert hit[:, 0].any() and hit[:, 1].any() and hit[:, 2:].any()
    check(shape, data)
    out, _ = oracle.simulate(shape, data)
    assert np.isfinite(out.astype(np.float32)).all()


def test_nan_that_is_chosen_stays_in_its_token():
    shape = Shape(tokens=8, top_k=4)
    data = draw(shape)
    data.x[data.indices[3, 2], 7] = np.nan
    data.indices[:3][data.indices[:3] == data.indices[3, 2]] = -1
    data.indices[4:][data.indices[4:] == data.indices[3, 2]] = -1
    out, _ = oracle.simulate(shape, data)
    assert np.argwhere(np.isnan(out.astype(np.float32))).tolist() == [[3, 7]]


def test_nan_weights_reach_the_result_unless_invalid():
    shape = Shape(tokens=4, top_k=2)
    data = draw(shape)
    data.weights[1, 0] = data.weights[2, 0] = np.nan
    data.indices[2, 0] = -1
    out, _ = oracle.simulate(shape, data)
    assert np.isnan(out.astype(np.float32)).all(axis=1).tolist() == [False, True, False, False]


def test_hostile_indices_choose_no_row():
    shape = Shape(tokens=6, top_k=3)
    data = draw(shape)
    data.indices[0] = [96, 2**31 - 1, -(2**31)]
    data.indices[1, 1] = -2
    kernel = check(shape, data)
    assert kernel.total("hbm_read") < 6 * 3 * 512 + 4096


@pytest.mark.parametrize("weighted", [True, False])
def test_a_token_without_rows_is_exactly_zero(weighted):
    shape = Shape(tokens=7, top_k=4, weighted=weighted, out="float32")
    data = draw(shape)
    data.indices[[0, 3]] = -1
    data.x[0] = np.nan
    data.indices[data.indices == 0] = 1
    out, _ = oracle.simulate(shape, data)
    assert not out[[0, 3]].any() and out[[1, 2, 4, 5, 6]].any(axis=1).all()
    check(shape, data)


def test_nothing_valid_reads_no_row_at_all():
    shape = Shape(tokens=16)
    data = draw(shape, invalid=1.0)
    kernel = check(shape, data)
    assert kernel.total("hbm_read") <= 64 * 16 * 8  # indices and weights of 64 steps


@pytest.mark.parametrize("share", [1.0, 0.5, 0.06])
def test_bytes_are_those_of_valid_rows_and_of_one_write(share):
    shape = Shape(tokens=64)
    data = draw(shape, invalid=1 - share)
    kernel = check(shape, data)
    count = 512 if data.valid is None else int(data.valid.sum())
    entries = 2 * 4 * 512
    assert kernel.total("hbm_read") == count * 256 * 2 + entries
    assert kernel.total("hbm_written") == 64 * 256 * 2


def test_weights_of_bfloat16_are_what_they_are_in_float32():
    shape = Shape(tokens=6, top_k=3, format="float32", out="float32")
    data = draw(shape)
    data.weights = data.weights.astype(oracle.BF16)
    out, _ = oracle.simulate(shape, data)
    data.weights = data.weights.astype(np.float32)
    np.testing.assert_array_equal(out, oracle.exact(data, "float32"))


def test_row_scales_multiply_weights():
    shape = Shape(tokens=9, top_k=3, rows=40, hidden_size=512, format="packed float8_e4m3fn")
    data = draw(shape, holes=0.2)
    scales = np.random.default_rng(1).random(40).astype(np.float32)
    out, _ = oracle.simulate(shape, data, row_scales=jnp.asarray(scales))
    chosen = np.where(data.indices < 0, 0, data.indices)
    scaled = dataclasses.replace(data, weights=data.weights * scales[chosen])
    np.testing.assert_array_equal(out, oracle.exact(scaled, shape.out))
    unweighted = dataclasses.replace(data, weights=None)
    out, _ = oracle.simulate(shape, unweighted, row_scales=jnp.asarray(scales))
    only = dataclasses.replace(data, weights=scales[chosen])
    np.testing.assert_array_equal(out, oracle.exact(only, shape.out))


def test_scales_of_rows_that_do_not_count_do_not_leak():
    """Nobody wrote them, nor those rows; row 0 has none either."""
    shape = Shape(tokens=8, top_k=4, rows=40, format="packed float8_e4m3fn")
    data = draw(shape, holes=0.1, invalid=0.3)
    data.weights[2] = 0
    data.indices[data.indices == 0] = 1
    scales = np.random.default_rng(1).random(40).astype(np.float32)
    used = np.isin(np.arange(40), data.indices[oracle.terms(data)[1]])
    assert not used[0] and not used.all()
    hidden = dataclasses.replace(data, x=np.where(used[:, None], data.x, oracle.F8.type("nan")))
    hostile = np.where(used, scales, np.nan).astype(np.float32)
    out, _ = oracle.simulate(shape, hidden, row_scales=jnp.asarray(hostile))
    weights = data.weights * scales[np.maximum(data.indices, 0)]
    right = oracle.exact(dataclasses.replace(data, weights=weights), shape.out)
    np.testing.assert_array_equal(out, right)
    args = (oracle.operand(shape, hidden.x), data.indices, data.weights, data.valid)
    spec = reference.gather_reduce(*args, row_scales=jnp.asarray(hostile))
    np.testing.assert_array_equal(np.asarray(spec), right)


def test_every_float8_code_but_nan_is_exact():
    codes = np.arange(256, dtype=np.uint8).view(oracle.F8)
    finite = np.isfinite(codes.astype(np.float32))
    shape = Shape(tokens=1, top_k=1, rows=1, format="packed float8_e4m3fn", weighted=False)
    shape = dataclasses.replace(shape, out="float32")
    data = oracle.Data(codes[None], np.zeros((1, 1), np.int32), None)
    out, _ = oracle.simulate(shape, data)
    np.testing.assert_array_equal(out[0, finite], codes.astype(np.float32)[finite])
    assert sorted(out[0, ~finite]) == [-480.0, 480.0]


@pytest.mark.parametrize("rows", ["float32", "packed bfloat16"])
def test_no_bit_depends_on_the_batch(rows):
    """Few tokens are spread over more subcores, which changes no bit either."""
    shape = Shape(tokens=67, top_k=6, hidden_size=512, format=rows)
    some = [30, 2, 17]
    small = dataclasses.replace(shape, tokens=len(some))
    plans = [
        plan_module.plan_for(problem(s), chip("tpu7x"), sparse_only=True) for s in (shape, small)
    ]
    assert plans[0].plan.parts < plans[1].plan.parts
    data = draw(shape, holes=0.1)
    whole, _ = oracle.simulate(shape, data)
    part = oracle.Data(data.x, data.indices[some], data.weights[some])
    out, _ = oracle.simulate(small, part)
    np.testing.assert_array_equal(out, whole[some])


@pytest.mark.parametrize("rows", FORMATS)
def test_errors_are_those_of_rounding(rows):
    """Against float64: three roundings per level of the tree in float32, then one of bfloat16."""
    shape = Shape(tokens=3, top_k=12, hidden_size=512, format=rows)
    data = draw(shape, holes=0.1)
    right, size = oracle.float64(data)
    wide, _ = oracle.simulate(dataclasses.replace(shape, out="float32"), data)
    assert (np.abs(wide - right) <= 5 * 2.0**-24 * size).all()
    narrow, _ = oracle.simulate(shape, data)
    allowed = 5 * 2.0**-24 * size + 2.0**-8 * np.abs(right)
    assert (np.abs(narrow.astype(np.float64) - right) <= allowed).all()


def test_interpret_runs_the_kernel_under_jit():
    shape = Shape(tokens=5, top_k=3)
    data = draw(shape, holes=0.2)
    x = oracle.operand(shape, data.x)

    @jax.jit
    def run(x, indices, weights):
        return gather_reduce.dense_gather_reduce(x, indices, weights, implementation="interpret")

    out = run(x, data.indices, data.weights)
    np.testing.assert_array_equal(np.asarray(out), oracle.exact(data, "bfloat16"))


@pytest.mark.parametrize("tokens, rows", [(0, 8), (3, 0)])
@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_nothing_to_do(implementation, tokens, rows):
    x, scales = jnp.ones((rows, 128), jnp.bfloat16), jnp.ones(rows)
    size = (tokens, 2)
    indices, weights, valid = jnp.zeros(size, jnp.int32), jnp.ones(size), jnp.ones(size, bool)
    options = {"implementation": implementation}
    dense = gather_reduce.dense_gather_reduce(x, indices, **options)
    packed = gather_reduce.pack_columns(x)
    options["row_scales"] = scales
    ragged = gather_reduce.ragged_gather_reduce(packed, indices, weights, valid, **options)
    for out in (dense, ragged):
        assert out.shape == (tokens, 128) and not out.any()


def test_inside_shard_map_with_its_checks():
    """Each device has its own rows; values and gradients are those of the reference."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 128)), jnp.float32)
    indices = jnp.asarray(rng.integers(-1, 32, (6, 3)), jnp.int32)
    weights = jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows = jax.sharding.PartitionSpec("d")

    def loss(x, weights, implementation):
        def local(x, indices, weights):
            return gather_reduce.dense_gather_reduce(
                x, indices, weights, implementation=implementation
            )

        out = jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)
        return jnp.sum(out(x, indices, weights) ** 2)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    found, right = (run(x, weights, way) for way in ("interpret", "reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, right)


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, None), (0, None, 0)])
def test_vmap_is_one_call_of_all(axes):
    """Rows of one call are out of reach of the others; an odd number of them is padded."""
    rng = np.random.default_rng(0)
    given = [
        jnp.asarray(rng.standard_normal((2, 33, 128)), jnp.bfloat16),
        jnp.asarray(rng.integers(-1, 40, (2, 6, 3)), jnp.int32),
        jnp.asarray(rng.standard_normal((2, 6, 3)), jnp.float32),
    ]
    given = [x if axis == 0 else x[0] for x, axis in zip(given, axes, strict=True)]

    def call(implementation):
        def one(x, indices, weights):
            options = {"out_dtype": jnp.float32, "implementation": implementation}
            return gather_reduce.dense_gather_reduce(x, indices, weights, **options)

        def loss(x, indices, weights):
            out = jax.vmap(one, in_axes=axes)(x, indices, weights)
            return jnp.sum(out**2), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True))

    found, right = (call(way)(*given) for way in ("interpret", "reference"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=1e-2 if a.shape[-1:] == (128,) else 1e-4, atol=1e-4)
