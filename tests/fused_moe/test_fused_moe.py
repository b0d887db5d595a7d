"""The kernel, interpreted on up to eight devices: accuracy gates, bit-exact gates, odd batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

import fused_moe
from reference import fused_moe as reference
from tests.fused_moe import oracle
from tpukit import interpret

LATE, EAGER = interpret.MODES
PLAN = fused_moe.Plan(tile=64, inter_slice=128, hidden_slice=256, partials=64)
BULK = dataclasses.replace(PLAN, bulk=1)
# how many devices, and how rows travel
PLACES = {
    "in bulk": (1, BULK),
    "1": (1, PLAN),
    "2": (2, PLAN),
    "4": (4, PLAN),
    "8": (8, PLAN),
}


def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("expert",)) if devices > 1 else None


@functools.cache
def compiled(mode, devices, plan, options):
    """A jitted layer per static choice; the mode only keeps traces apart."""

    @jax.jit
    def layer(*args):
        return fused_moe.fused_moe(
            *args, mesh=mesh_of(devices), implementation="interpret", plan=plan, **dict(options)
        )

    return layer


def run(layer, devices=1, mode=LATE, plan=PLAN):
    """The kernel's output under the strict harness."""
    function = compiled(mode, devices, plan, tuple(sorted(layer.options.items())))
    with interpret.strict(mode):
        return np.asarray(function(*layer.args()))


# Now and then an operand of the second product, or a result on its way back, is rounded to the
# neighbour because float32 and float64 differ in the last bit. What that adds to a row's error:
FLIPS = {"bfloat16": 5e-4, "float8_e4m3fn": 5e-3}
ONE_ROUNDING = {"bfloat16": 1.7e-3, "float8_e4m3fn": 2.6e-2}  # of many values, relative


def check_gates(layer, found, devices, *, bulk=False):
    """Gate A against float64 with the same roundings, Gate B against float64 with none."""
    wanted = oracle.output(layer, devices, bulk=bulk)
    once = oracle.rounded(wanted, ml_dtypes.bfloat16)
    back = "bfloat16" if bulk else layer.options.get("return_dtype", "bfloat16")
    flips = max(FLIPS[back], FLIPS[layer.options.get("activation_dtype", "bfloat16")])
    assert oracle.error(found, wanted) <= 1.1 * oracle.error(once, wanted) + flips / 8
    assert oracle.error(found, wanted, axis=1) <= 1.25 * oracle.error(once, wanted, axis=1) + flips
    exact = oracle.output(layer, devices, exact=True)
    options = {name: x for name, x in layer.options.items() if name != "return_dtype"}
    plain = oracle.error(reference.fused_moe(*layer.args(), **options), exact)
    # the reference does not round between the products, nor on the way back
    more = np.hypot(ONE_ROUNDING["bfloat16"], ONE_ROUNDING[back])
    assert oracle.error(found, exact) <= 1.1 * np.hypot(plain, more)


QUANTISED = {"activation_dtype": "float8_e4m3fn"}


def check(layer, place, mode=LATE):
    """Runs a layer in a place and checks its gates."""
    devices, plan = PLACES[place]
    check_gates(layer, run(layer, devices, mode, plan), devices, bulk=bool(plan.bulk))


@pytest.mark.parametrize("mode", [LATE, EAGER], ids=["late", "eager, races"])
@pytest.mark.parametrize("place", PLACES)
def test_devices(place, mode):
    devices, _ = PLACES[place]
    check(oracle.random_layer(devices, 32, shared=oracle.INTER, **QUANTISED), place, mode)


# Every option, each with different others: of weights, rows, results, activations and biases.
KINDS = {
    "bfloat16, gelu": {"dtype": "bfloat16", "activation": "gelu", "biased": True, "shared": 256},
    "int8, swigluoai, float8 back": {
        "dtype": "int8",
        "activation": "swigluoai",
        "limit": 0.7,
        "biased": True,
        "return_dtype": "float8_e4m3fn",
    },
    "float8 weights in blocks": {"block": 256, "shared": 512},
    "float8 in blocks, clipped, float8 back": {
        "block": 128,
        "limit": 0.5,
        "biased": True,
        "shared": 256,
        "return_dtype": "float8_e4m3fn",
        **QUANTISED,
    },
}
# in every place, and in both modes, without all pairs of the two
PAIRS = [(kind, place) for kind in KINDS for place in PLACES]
MODES = {pair: (LATE, EAGER)[i % 2] for i, pair in enumerate(PAIRS)}


@pytest.mark.parametrize(("kind", "place"), PAIRS)
def test_kinds(kind, place):
    check(oracle.random_layer(20, 24, **KINDS[kind]), place, MODES[kind, place])


def with_ids(ids, **options):
    """A layer with these ids and nothing masked."""
    ids = np.asarray(ids, np.int32)
    made = oracle.random_layer(30, len(ids), top_k=ids.shape[1], **options, **QUANTISED)
    return dataclasses.replace(made, ids=ids)


EDGES = {
    "nobody": np.full((5, 2), -1),
    "one token": [[3, 6]],
    "all to one expert": np.full((70, 1), 5),
    "all to one device": np.tile([0, 1, 2, 3], (40, 1)),
    "an id twice": [[2, 2, 7]] * 9,
    "out of range": [[8, 1000, -7], [0, 2**31 - 1, -(2**31)]] * 5,
    "one slot": [[i % 8] for i in range(50)],
    "all experts": np.tile(np.arange(8), (20, 1)),
    "last device only": [[-1, 7]] * 33,
}


@pytest.mark.parametrize("place", ["in bulk", "1", "2"])
@pytest.mark.parametrize("ids", EDGES.values(), ids=EDGES)
def test_edges(ids, place):
    ids = np.asarray(ids)
    if ids.shape[1] > 1 and len(ids) > 1:  # one shape for most: traces take the time
        ids = np.pad(ids, ((0, 45 - len(ids)), (0, 8 - ids.shape[1])), constant_values=-1)
    check(with_ids(ids), place)


def test_no_token_no_kernel():
    layer = with_ids([[0, 1]])
    none = dataclasses.replace(
        layer, **{name: getattr(layer, name)[:0] for name in ("tokens", "ids", "expert_weights")}
    )
    assert run(none).shape == (0, oracle.HIDDEN)


@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1), hostile=st.booleans())
def test_drawn_ids(seed, hostile):
    rng = np.random.default_rng(seed)
    ids = rng.integers(-3, 11, (32, 3)) if hostile else rng.integers(0, 8, (32, 3))
    check(with_ids(ids), "2")


def test_tiles_passes_and_buffers_change_no_bit():
    """Too few partials take more passes over the experts, and give the same."""
    layer = oracle.random_layer(40, 72, 4, 3, masked=0, **QUANTISED)
    wanted = run(layer)
    few = dataclasses.replace(PLAN, partials=32)
    deep = dataclasses.replace(PLAN, depth=4)
    for plan in (few, deep):
        np.testing.assert_array_equal(run(layer, plan=plan), wanted)
    check_gates(layer, wanted, 1)


@pytest.mark.parametrize("place", ["in bulk", "1", "4"])
def test_other_tokens_change_no_bit(place):
    """The rows of a token's experts are whole numbers, so that no sum depends on its order."""
    devices, plan = PLACES[place]
    layer = exact_layer(50)
    wanted = run(layer, devices, plan=plan)
    kept = np.arange(len(layer.ids)) % 5 == 2
    alone = dataclasses.replace(layer, ids=np.where(kept[:, None], layer.ids, -1))
    found = run(alone, devices, plan=plan)
    np.testing.assert_array_equal(found[kept], wanted[kept])
    assert np.all(found[~kept] == 0)


def exact_layer(seed):
    """A layer of small whole numbers: every product is exact in float32, whatever its order."""
    rng = np.random.default_rng(seed)
    layer = oracle.random_layer(seed, 56, dtype="bfloat16")

    def whole(x):
        return jnp.asarray(rng.integers(-1, 2, x.shape), x.dtype)

    weights = jax.tree.map(whole, layer.weights)
    tokens = rng.integers(-2, 3, layer.tokens.shape).astype(ml_dtypes.bfloat16)
    return dataclasses.replace(layer, weights=weights, tokens=tokens)


@pytest.mark.parametrize("place", ["in bulk", "2"])
def test_modes_of_transfer_agree_to_the_bit(place):
    devices, plan = PLACES[place]
    layer = oracle.random_layer(60, 32, shared=256, **QUANTISED)
    late, eager = (run(layer, devices, mode, plan) for mode in (LATE, EAGER))
    np.testing.assert_array_equal(late, eager)


@pytest.mark.parametrize("place", ["in bulk", "1", "2"])
def test_bad_numbers_stay_in_their_row(place):
    devices, plan = PLACES[place]
    layer = oracle.random_layer(70, 48, shared=256, **QUANTISED)
    wanted = run(layer, devices, plan=plan)
    tokens = layer.tokens.copy()
    tokens[3, 17], tokens[30, 400] = np.nan, np.inf
    found = run(dataclasses.replace(layer, tokens=tokens), devices, plan=plan)
    bad = np.isin(np.arange(48), [3, 30])
    assert np.isnan(found[bad].astype(np.float32)).any(axis=1).all()
    np.testing.assert_array_equal(found[~bad], wanted[~bad])


def test_two_axes_of_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("outer", "inner"))
    layer = oracle.random_layer(81, 48, 6, **QUANTISED)
    with interpret.strict(LATE):
        found = np.asarray(
            jax.jit(
                lambda *args: fused_moe.fused_moe(
                    *args, mesh=mesh, implementation="interpret", plan=PLAN, **layer.options
                )
            )(*layer.args())
        )
    check_gates(layer, found, 6)


def test_one_axis_of_a_mesh_inside_shard_map():
    """Two replicas of two devices each, with default checks of shard_map."""
    layer = oracle.random_layer(82, 64, **QUANTISED)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "expert"))
    split, experts = jax.P(("data", "expert")), jax.P("expert")

    def device(*args):
        options = {"implementation": "interpret", "plan": PLAN, **layer.options}
        return fused_moe.fused_moe(*args, axis_name="expert", **options)

    function = jax.shard_map(
        device, mesh=mesh, in_specs=(split, experts, split, split), out_specs=split
    )
    with interpret.strict(LATE):
        found = np.asarray(jax.jit(function)(*layer.args()))
    check_gates(layer, found, 2)


def test_many_tokens_take_several_calls(monkeypatch):
    """Where tables do not fit SMEM the tokens are split."""
    layer = oracle.random_layer(90, 64, **QUANTISED)
    wanted = run(layer)
    monkeypatch.setattr("fused_moe.plan.SMEM_WORDS", 1900)
    compiled.cache_clear()
    found = run(layer)
    compiled.cache_clear()
    check_gates(layer, found, 1)
    assert found.shape == wanted.shape
