"""Bad input: every row has one defined outcome, and every message says what to do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import fused_moe
from fused_moe import api
from fused_moe.plan import PLANS as PLANNER
from tests.fused_moe import oracle
from tests.fused_moe.test_fused_moe import PLAN
from tpukit import tuning
from tpukit.chips import chip as chip_named
from tpukit.errors import ArgumentError, UnsupportedError

LAYER = oracle.random_layer(0, 8, **{"activation_dtype": "float8_e4m3fn"})


def call(layer=LAYER, **options):
    return fused_moe.fused_moe(*layer.args(), **{**layer.options, **options})


def changed(**fields):
    return dataclasses.replace(LAYER, **fields)


def with_weights(**fields):
    return changed(weights=dataclasses.replace(LAYER.weights, **fields))


W = LAYER.weights
SHAPES = {
    "tokens of three dimensions": (changed(tokens=LAYER.tokens[None]), "tokens"),
    "fewer ids than tokens": (changed(ids=LAYER.ids[:-1]), "expert_ids"),
    "weights of other slots": (changed(expert_weights=LAYER.expert_weights[:, 1:]), "expert_w"),
    "float32 tokens": (changed(tokens=LAYER.tokens.astype(np.float32)), "tokens"),
    "ids of 8 bits": (changed(ids=LAYER.ids.astype(np.int8)), "expert_ids"),
    "more slots than experts": (
        changed(ids=np.tile(LAYER.ids, 4), expert_weights=np.tile(LAYER.expert_weights, 4)),
        "top_k",
    ),
    "no slot": (changed(ids=LAYER.ids[:, :0], expert_weights=LAYER.expert_weights[:, :0]), "top_k"),
    "another hidden width": (changed(tokens=LAYER.tokens[:, :100]), None),
    "a hidden width that needs padding": (
        changed(tokens=np.zeros((8, 600), LAYER.tokens.dtype)),
        "weights.gate",
    ),
    "up of another width": (with_weights(up=W.up[:, :, :128]), "weights.up"),
    "down of another width": (with_weights(down=W.down[:, :128]), "weights.down"),
    "down of another type": (with_weights(down=W.down.astype(jnp.bfloat16)), "weights.down"),
    "float32 weights": (
        with_weights(**{n: getattr(W, n).astype(jnp.float32) for n in ("gate", "up", "down")}),
        "weights.gate",
    ),
    "no scale": (
        with_weights(gate_scale=None, up_scale=None, down_scale=None),
        "weights.gate_scale",
    ),
    "one scale missing": (with_weights(up_scale=None), "weights.up_scale"),
    "a scale of another type": (
        with_weights(gate_scale=W.gate_scale.astype(jnp.bfloat16)),
        "weights.gate_scale",
    ),
    "blocks that do not divide": (
        with_weights(
            gate_scale=jnp.ones((8, 3, 256), jnp.float32),
            up_scale=jnp.ones((8, 3, 256), jnp.float32),
        ),
        "weights.gate_scale",
    ),
    "one bias": (with_weights(up_bias=jnp.zeros((8, 256))), "weights.gate_bias"),
    "a shared expert of another width": (
        with_weights(shared=jax.tree.map(lambda w: w[0, :256], W)),
        "weights.shared",
    ),
    "an intermediate width of 96": (
        with_weights(
            gate=W.gate[:, :, :96],
            up=W.up[:, :, :96],
            down=W.down[:, :96],
            gate_scale=W.gate_scale[:, :, :96],
            up_scale=W.up_scale[:, :, :96],
        ),
        "weights intermediate",
    ),
}


@pytest.mark.parametrize(("layer", "argument"), SHAPES.values(), ids=SHAPES)
def test_wrong_arrays(layer, argument):
    if argument is None:  # 100 is padded to 512, which the weights have
        assert call(layer).shape == (8, 100)
        return
    with pytest.raises(ArgumentError, match="needs") as caught:
        call(layer)
    assert caught.value.argument.startswith(argument)


OPTIONS = {
    "activation": "relu",
    "limit": -1.0,
    "activation_dtype": "float8_e5m2",
    "return_dtype": "float32",
    "implementation": "fast",
    "axis_name": "nowhere",
}


@pytest.mark.parametrize(("name", "value"), OPTIONS.items(), ids=OPTIONS)
def test_wrong_options(name, value):
    with pytest.raises(ArgumentError) as caught:
        call(**{name: value})
    assert caught.value.argument == name
    assert str(value) in str(caught.value)


PLANS = {
    "tile": {"tile": 48},
    "inter_slice": {"inter_slice": 192},
    "hidden_slice": {"hidden_slice": 384},
    "depth": {"depth": 3},
    "partials": {"partials": 0},
}


@pytest.mark.parametrize(("field", "change"), PLANS.items(), ids=PLANS)
def test_wrong_plans(field, change):
    with pytest.raises(ArgumentError, match=rf"plan\.{field}"):
        call(plan=dataclasses.replace(PLAN, **change), implementation="interpret")


def test_float8_tokens_need_float8_weights():
    layer = oracle.random_layer(1, 8, dtype="bfloat16", activation_dtype="float8_e4m3fn")
    with pytest.raises(ArgumentError, match=r"weights\.gate has dtype bfloat16"):
        call(layer)


def test_a_plan_too_large_says_what_it_needs():
    huge = fused_moe.Plan(tile=65536, inter_slice=256, hidden_slice=512)
    with pytest.raises(UnsupportedError, match="MiB of VMEM"):
        call(plan=huge, implementation="interpret")


def test_experts_that_devices_cannot_share():
    mesh = Mesh(np.array(jax.devices()[:3]), ("x",))
    with pytest.raises(ArgumentError, match="num_experts is 8; needs a multiple of 3"):
        call(mesh=mesh)


def test_an_axis_that_the_mesh_does_not_have():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    with pytest.raises(ArgumentError, match="axis_name"):
        call(mesh=mesh, axis_name="y")


def test_the_kernel_is_not_for_a_cpu():
    with pytest.raises(UnsupportedError, match="implementation='grouped'"):
        call(implementation="pallas")


def test_the_reference_is_for_one_device():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    with pytest.raises(UnsupportedError, match="one device"):
        call(mesh=mesh, implementation="reference")


VALUES = {
    "an id too high": (changed(ids=np.where(LAYER.ids == 3, 8, LAYER.ids)), "expert_ids has 8"),
    "an id below -1": (changed(ids=np.where(LAYER.ids == 3, -2, LAYER.ids)), "expert_ids has -2"),
    "a weight that is no number": (
        changed(expert_weights=np.full_like(LAYER.expert_weights, np.nan)),
        "expert_weights has nan",
    ),
}


@pytest.mark.parametrize(("layer", "message"), VALUES.values(), ids=VALUES)
def test_values_are_checked_on_request(layer, message):
    with pytest.raises(ArgumentError, match=message):
        call(layer, validate=True)
    call(layer)


def test_values_cannot_be_checked_in_a_trace():
    with pytest.raises(ArgumentError, match="traced"):
        jax.jit(lambda *args: fused_moe.fused_moe(*args, validate=True))(*LAYER.args())


def test_good_values_pass_the_check():
    call(validate=True)


@pytest.mark.parametrize(("chip", "there"), [("tpu7x", True), ("v6e", True), ("v5e", False)])
def test_supports_answers_for_absent_chips(chip, there):
    assert fused_moe.supports(*LAYER.args(), chip=chip, **LAYER.options) is there


def test_explain_says_which_plan_and_why():
    found = fused_moe.explain(*LAYER.args(), chip="tpu7x", axes=[("x", 4)], **LAYER.options)
    assert found.source == "model"
    assert "MiB VMEM" in str(found)
    assert found.vmem_bytes < found.vmem_limit


def test_a_tuned_plan_is_for_its_number_of_tokens(monkeypatch):
    """Partials are a number of tokens: a plan for fewer makes more passes over the experts."""

    def explained(tokens):
        args, options = shapes(2048, 768, 128, tokens, 8, "float8_e4m3fn")
        return fused_moe.explain(*args, chip="tpu7x", **options)

    model = explained(128)
    tuned = dataclasses.asdict(dataclasses.replace(model.plan, tile=128))
    found = tuning.Found("static", "2026-01-01", "", {"jax": jax.__version__})
    entry = tuning.Entry("tpu7x", PLANNER.key(model.problem), tuned, found)
    table = tuning.Table(PLANNER.table.schema, (entry,))
    monkeypatch.setitem(vars(PLANNER), "table", table)
    assert explained(128).source == "exact" and explained(128).plan.tile == 128
    assert {explained(tokens).source for tokens in (96, 160, 256)} == {"model"}
    assert "within a factor" not in explained(256).why


CHOICES = {  # hidden, intermediate, experts, tokens, top_k; devices; and what costs less there
    "narrow weights, few tokens": ((2048, 768, 16, 256, 8, "float8_e4m3fn"), 1, "pallas"),
    "many rows of few experts": ((2048, 768, 16, 2048, 8, "float8_e4m3fn"), 1, "pallas"),
    "the same of many experts": ((2048, 768, 128, 2048, 8, "float8_e4m3fn"), 1, "pallas"),
    "bfloat16": ((2048, 768, 16, 2048, 8, "bfloat16"), 1, "pallas"),
    "bfloat16, wide": ((8192, 2048, 8, 2048, 1, "bfloat16"), 1, "pallas"),
    "bfloat16 on two devices": ((2048, 768, 32, 4096, 8, "bfloat16"), 2, "grouped"),
    "float8 on two devices": ((2048, 768, 32, 256, 8, "float8_e4m3fn"), 2, "pallas"),
}


def shapes(hidden, inter, experts, tokens, top_k, dtype):
    """Shapes of a layer's arguments, and its options."""
    scaled = dtype != "bfloat16"

    def matrix(rows, columns):
        return jax.ShapeDtypeStruct((experts, rows, columns), jnp.dtype(dtype))

    def scale(columns):
        return jax.ShapeDtypeStruct((experts, 1, columns), jnp.float32) if scaled else None

    weights = fused_moe.Weights(
        matrix(hidden, inter),
        matrix(hidden, inter),
        matrix(inter, hidden),
        *(scale(width) for width in (inter, inter, hidden)),
    )
    args = (
        jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16),
        weights,
        jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
    )
    return args, {"activation_dtype": dtype if scaled else None}


def ran(monkeypatch, chip, args, **options):
    """Which implementation "auto" runs on a chip."""
    found = []

    def runs(name):
        def run(tokens, *_, **__):
            found.append(name)
            return tokens

        return run

    monkeypatch.setattr(api, "current_chip", lambda: chip_named(chip))
    monkeypatch.setattr(api, "launch", runs("pallas"))
    monkeypatch.setattr(api.grouped, "expert_parallel", runs("grouped"))
    jax.eval_shape(lambda *a: fused_moe.fused_moe(*a, **options), *args)
    return found[0]


@pytest.mark.parametrize(("shape", "devices", "cheaper"), CHOICES.values(), ids=CHOICES)
def test_auto_runs_what_costs_less(shape, devices, cheaper, monkeypatch):
    hidden, inter, experts, tokens, *more = shape
    args, options = shapes(hidden, inter, experts // devices, tokens // devices, *more)
    where = {"chip": "tpu7x", "axes": [("x", devices)] if devices > 1 else []}
    found = fused_moe.explain(*args, **where, **options)
    assert found.implementation == cheaper
    assert (found.costs.fused <= found.costs.grouped) is (cheaper == "pallas")
    assert f"{cheaper}, cost model: {found.costs}" in str(found)
    assert fused_moe.supports(*args, **where, **options)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("x",)) if devices > 1 else None
    whole, _ = shapes(*shape)
    assert ran(monkeypatch, "tpu7x", whole, mesh=mesh, **options) == cheaper


def test_a_plan_asks_for_the_kernel(monkeypatch):
    args, options = shapes(*CHOICES["bfloat16"][0])
    plan = fused_moe.explain(*args, chip="tpu7x", **options).plan
    assert fused_moe.explain(*args, chip="tpu7x", plan=plan, **options).implementation == "pallas"
    assert ran(monkeypatch, "tpu7x", args, plan=plan, **options) == "pallas"


def test_what_is_not_supported_is_grouped(monkeypatch):
    args, options = shapes(*CHOICES["narrow weights, few tokens"][0])
    assert not fused_moe.supports(*args, chip="v5e", **options)
    assert ran(monkeypatch, "v5e", args, **options) == "grouped"


def test_more_devices_favour_the_kernel():
    """Beyond one device the grouped layer moves the rows of all of them."""
    args, options = shapes(*CHOICES["bfloat16"][0])
    costs = [
        fused_moe.explain(*args, chip="tpu7x", axes=[("x", n)], **options).costs for n in (2, 4, 8)
    ]
    ratios = [cost.fused / cost.grouped for cost in costs]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 1 > ratios[-1]
