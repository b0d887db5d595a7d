"""Routing, lists, converters, the grouped layer and the reference, each against a plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

import fused_moe
from fused_moe import dispatch
from fused_moe import grouped as grouped_module
from fused_moe.dispatch import FIRST, LAST, SLOT, TOKEN, TOKEN_BITS
from reference import fused_moe as reference
from tests.fused_moe import oracle
from tpukit.errors import ArgumentError

QUANTISED = {"activation_dtype": "float8_e4m3fn"}


def routed_by_hand(logits, top_k, *, sigmoid, bias, groups, kept, two, renormalise, scale):
    """DeepSeek's router, token by token."""
    ids, weights = [], []
    for row in np.asarray(logits, np.float64):
        scores = 1 / (1 + np.exp(-row)) if sigmoid else np.exp(row) / np.exp(row).sum()
        choice = scores + (0 if bias is None else bias)
        size = len(row) // groups
        parts = [np.sort(choice[g * size : (g + 1) * size])[::-1] for g in range(groups)]
        best = [part[: 2 if two else 1].sum() for part in parts]
        good = sorted(range(groups), key=lambda g: -best[g])[:kept]
        allowed = [e for e in range(len(row)) if e // size in good]
        chosen = sorted(allowed, key=lambda e: -choice[e])[:top_k]
        w = scores[chosen]
        ids.append(chosen)
        weights.append((w / w.sum() if renormalise else w) * scale)
    return np.array(ids), np.array(weights)


ROUTERS = {
    "softmax": {},
    "softmax, not renormalised": {"renormalise": False},
    "DeepSeek-V2": {"num_groups": 4, "top_groups": 2, "group_score": "max", "scale": 16.0},
    "DeepSeek-V3, Ling": {
        "scoring": "sigmoid",
        "bias": np.linspace(-0.2, 0.2, 32),
        "num_groups": 8,
        "top_groups": 4,
        "scale": 2.5,
    },
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_route(router):
    logits = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    bias = router.get("bias")
    options = {**router, "bias": None if bias is None else jnp.asarray(bias, jnp.float32)}
    ids, weights = jax.jit(lambda x: fused_moe.route(x, top_k=4, **options))(logits)
    wanted = routed_by_hand(
        logits,
        4,
        sigmoid=router.get("scoring") == "sigmoid",
        bias=bias,
        groups=router.get("num_groups", 1),
        kept=router.get("top_groups", 1),
        two=router.get("group_score", "top2") == "top2",
        renormalise=router.get("renormalise", True),
        scale=router.get("scale", 1.0),
    )
    np.testing.assert_array_equal(ids, wanted[0])
    np.testing.assert_allclose(weights, wanted[1], rtol=2e-6)
    assert ids.dtype == jnp.int32
    assert weights.dtype == jnp.float32


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 9, "num_groups": 4, "top_groups": 1},
        {"top_k": 2, "num_groups": 5},
        {"top_k": 2, "scoring": "tanh"},
        {"top_k": 2, "bias": jnp.zeros(31)},
        {"top_k": 2, "num_groups": 32, "top_groups": 2},
    ],
)
def test_route_refuses(wrong):
    with pytest.raises(ArgumentError, match="route"):
        fused_moe.route(jnp.zeros((3, 32)), **wrong)


def test_replicas_take_turns():
    replicas = jnp.asarray([[0, 4, -1], [1, -1, -1], [2, 5, 6]], jnp.int32)
    ids = jnp.asarray([[0, 2], [0, 2], [1, -1], [2, 3]], jnp.int32)
    found = fused_moe.to_physical(ids, replicas)
    np.testing.assert_array_equal(found, [[0, 2], [4, 5], [1, -1], [2, -1]])
    moved = fused_moe.to_physical(ids, replicas, first_token=1)
    np.testing.assert_array_equal(moved, [[4, 5], [0, 6], [1, -1], [5, -1]])


def test_replicas_refuse():
    with pytest.raises(ArgumentError, match="replicas"):
        fused_moe.to_physical(jnp.zeros((2, 2), jnp.int32), jnp.zeros((0, 2), jnp.int32))


@pytest.mark.parametrize("devices", [1, 4])
def test_received_tokens(devices):
    rng = np.random.default_rng(1)
    ids = rng.integers(-2, 10, (32, 3)).astype(np.int32)
    wanted = [(ids == e).any(axis=1).sum() for e in range(8)]
    if devices == 1:
        np.testing.assert_array_equal(fused_moe.received_tokens(jnp.asarray(ids), 8), wanted)
        return
    mesh = Mesh(np.array(jax.devices()[:devices]), ("x",))
    count = jax.shard_map(
        lambda ids: fused_moe.received_tokens(ids, 8, axis_name="x"),
        mesh=mesh,
        in_specs=jax.P("x"),
        out_specs=jax.P("x"),
    )
    np.testing.assert_array_equal(count(ids), wanted)


@given(seed=st.integers(0, 2**32 - 1), devices=st.sampled_from([1, 2, 4]))
def test_lists_say_who_goes_where(seed, devices):
    rng = np.random.default_rng(seed)
    tokens, top_k, experts, me = 32, 4, 8, int(rng.integers(devices))
    ids = rng.integers(-2, 10, (tokens, top_k)).astype(np.int32)
    layout = dispatch.Layout(devices, experts, tokens, top_k)
    lists, tails = described(ids, devices, me)
    here = experts // devices
    entries, own = np.asarray(lists.entries).ravel(), np.asarray(lists.own)
    assert own[layout.ME] == me
    sends = []
    for device in range(devices):
        head = np.asarray(lists.heads).reshape(devices, -1)[device]
        for e in range(here):
            begin, several, end = head[2 * e : 2 * e + 3]
            expert = device * here + e
            found = entries[begin:end]
            assert sorted(found & TOKEN) == sorted(np.flatnonzero((ids == expert).any(axis=1)))
            firsts = 0
            for place, code in enumerate(found):
                token, slot = code & TOKEN, code >> TOKEN_BITS & SLOT
                on_device = sorted({i for i in ids[token] if i // here == device and 0 <= i < 8})
                assert ids[token, slot] == expert
                assert bool(code & FIRST) == (on_device[0] == expert)
                assert bool(code & LAST) == (on_device[-1] == expert)
                assert (len(on_device) == 1) == (begin + place < several)
                firsts += bool(code & FIRST)
                if code & FIRST and device != me:
                    sends.append((e, (device - me - 1) % devices, token))
            assert head[layout.firsts + e] == firsts
        assert own[layout.SEGMENTS + device] == head[0]
    assert own[layout.SENDS] == own[layout.RETURNS] == len(sends)
    keys = own[layout.send_keys : layout.send_keys + len(sends)]
    chosen = own[layout.send_tokens : layout.send_tokens + len(sends)]
    by_key = sorted((e * devices + way, token) for e, way, token in sends)
    assert sorted(zip(keys, chosen, strict=True)) == by_key
    assert list(keys) == sorted(keys)
    np.testing.assert_array_equal(tails[:, :top_k], ids)


def described(ids, devices, me):
    function = jax.jit(dispatch.describe, static_argnums=(2, 3))
    return function(jnp.asarray(ids), jnp.ones(ids.shape, jnp.float32), 8, devices, me)


def test_padding_changes_nothing():
    rng = np.random.default_rng(2)
    layer = oracle.random_layer(3, 12, dtype="bfloat16", biased=True, shared=128)

    def cut(weights):
        """hidden 500, intermediate 100"""
        lead = (slice(None),) * (weights.gate.ndim - 2)
        return dataclasses.replace(
            weights,
            gate=weights.gate[(*lead, slice(500), slice(100))],
            up=weights.up[(*lead, slice(500), slice(100))],
            down=weights.down[(*lead, slice(100), slice(500))],
            gate_bias=weights.gate_bias[..., :100],
            up_bias=weights.up_bias[..., :100],
            down_bias=weights.down_bias[..., :500],
            shared=None if weights.shared is None else cut(weights.shared),
        )

    small = cut(layer.weights)
    tokens = jnp.asarray(rng.standard_normal((12, 500)), jnp.bfloat16)
    args = (tokens, jnp.asarray(layer.ids), jnp.asarray(layer.expert_weights))
    wanted = reference.fused_moe(args[0], small, *args[1:])
    padded = fused_moe.pad(small)
    assert padded.gate.shape == (8, 512, 256)
    found = fused_moe.fused_moe(args[0], padded, *args[1:], implementation="reference")
    np.testing.assert_allclose(oracle.wide(found), oracle.wide(wanted), rtol=1e-2, atol=1e-3)


def test_padding_refuses_to_cut_blocks():
    weights = fused_moe.quantise(oracle.random_weights(np.random.default_rng(0), (2,)), "int8")
    narrow = dataclasses.replace(
        weights, gate=weights.gate[:, :256], gate_scale=jnp.ones((2, 2, 256), jnp.float32)
    )
    with pytest.raises(ArgumentError, match="gate_scale"):
        fused_moe.pad(narrow)


def test_block_scales_expand():
    scale = jnp.arange(12, dtype=jnp.float32).reshape(1, 4, 3)
    found = fused_moe.expand_block_scales(scale, 6)
    np.testing.assert_array_equal(found[0, 1], [3, 3, 4, 4, 5, 5])
    with pytest.raises(ArgumentError, match="outputs"):
        fused_moe.expand_block_scales(scale, 7)


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.009), ("float8_e4m3fn", 0.03)])
@pytest.mark.parametrize("block", [None, 128])
def test_quantised_weights_are_near(dtype, most, block):
    weights = oracle.random_weights(np.random.default_rng(0), (2,), shared := 256)
    narrow = fused_moe.quantise(weights, dtype, block=block)
    assert narrow.gate_scale.shape == (2, oracle.HIDDEN // block if block else 1, shared)
    for name in ("gate", "up", "down"):
        wide = np.stack([oracle.dequantised(narrow, name, e) for e in range(2)])
        assert oracle.error(wide, getattr(weights, name)) < most


KINDS = {
    "bfloat16": {"dtype": "bfloat16", "shared": 128, "biased": True},
    "float8": QUANTISED,
    "blocks": {"block": 128, **QUANTISED},
    "swigluoai": {"activation": "swigluoai", "limit": 0.7, "dtype": "int8"},
    "gelu": {"activation": "gelu", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_reference_is_what_it_says(kind):
    layer = oracle.random_layer(4, 70, **kind)
    layer = dataclasses.replace(layer, ids=np.where(layer.ids == 5, 4, layer.ids))  # some twice
    found = reference.fused_moe(*layer.args(), **layer.options)
    wanted = oracle.output(layer, exact="activation_dtype" not in kind)
    assert oracle.error(found, wanted, axis=1) < 6e-3


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("parallel", [None, "expert", "tensor"])
def test_grouped_is_the_reference(kind, parallel):
    layer = oracle.random_layer(5, 48, **kind)
    wanted = reference.fused_moe(*layer.args(), **layer.options)
    found = grouped(layer, parallel)(*layer.args())
    assert oracle.error(found, wanted) < 8e-3


def grouped(layer, parallel):
    """The grouped layer on one device, or on two."""
    if parallel is None:
        return jax.jit(lambda *args: fused_moe.grouped_moe(*args, **layer.options))
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))

    def device(tokens, weights, ids, expert_weights):
        return fused_moe.grouped_moe(
            tokens, weights, ids, expert_weights, axis_name="x", parallel=parallel, **layer.options
        )

    specs = expert_specs if parallel == "expert" else tensor_specs
    rows = jax.P("x") if parallel == "expert" else jax.P()
    return jax.jit(
        jax.shard_map(
            device,
            mesh=mesh,
            in_specs=(rows, specs(layer.weights), rows, rows),
            out_specs=rows,
            check_vma=parallel == "expert",
        )
    )


def expert_specs(weights):
    shared = None if weights.shared is None else jax.tree.map(lambda _: jax.P(), weights.shared)
    routed = dataclasses.replace(weights, shared=None)
    return dataclasses.replace(jax.tree.map(lambda _: jax.P("x"), routed), shared=shared)


def tensor_specs(weights):
    """The intermediate dimension is the last of gate and up, the one before the last of down."""

    def spec(name, array):
        lead = [None] * (array.ndim - 2)
        if name.startswith(("gate", "up")):
            return jax.P(*[None] * (array.ndim - 1), "x")
        split = name == "down" or (name == "down_scale" and array.shape[-2] > 1)
        return jax.P(*lead, "x", None) if split else jax.P()

    fields = {
        field.name: spec(field.name, value)
        for field in dataclasses.fields(weights)
        if field.name != "shared" and (value := getattr(weights, field.name)) is not None
    }
    shared = None if weights.shared is None else tensor_specs(weights.shared)
    return dataclasses.replace(weights, **fields, shared=shared)


def test_grouped_has_the_gradients_of_a_dense_layer():
    rng = np.random.default_rng(6)
    tokens = jnp.asarray(rng.standard_normal((10, 16)), jnp.float32)
    weights = fused_moe.Weights(
        *(jnp.asarray(rng.standard_normal(s) / 4, jnp.float32) for s in [(4, 16, 8)] * 2),
        jnp.asarray(rng.standard_normal((4, 8, 16)) / 4, jnp.float32),
    )
    ids = jnp.asarray(rng.permuted(np.tile(np.arange(4), (10, 1)), axis=1)[:, :2], jnp.int32)
    routing = jnp.asarray(rng.random((10, 2)), jnp.float32)

    def dense(tokens, weights, routing):
        share = jnp.sum((ids[..., None] == jnp.arange(4)) * routing[..., None], axis=1)
        gate, up = (jnp.einsum("th,ehi->tei", tokens, w) for w in (weights.gate, weights.up))
        y = jnp.einsum("tei,eih->teh", jax.nn.silu(gate) * up, weights.down)
        return jnp.sum(jnp.sin(jnp.einsum("te,teh->th", share, y)))

    def ours(tokens, weights, routing):
        return jnp.sum(jnp.sin(fused_moe.grouped_moe(tokens, weights, ids, routing)))

    wanted = jax.grad(dense, argnums=(0, 1, 2))(tokens, weights, routing)
    found = jax.grad(ours, argnums=(0, 1, 2))(tokens, weights, routing)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3)


def test_packed_sums_have_the_gradients_of_plain_ones_and_let_nothing_leak(monkeypatch):
    """Of rows with scales, which the pass that multiplies them weights and packs as well."""
    layer = oracle.random_layer(7, 24, dtype="int8", biased=True)
    layer.expert_weights[3] = 0
    layer.tokens[3] = np.nan
    tokens, weights, ids, routing = layer.args()
    factor = np.random.default_rng(8).standard_normal(tokens.shape)

    def loss(tokens, bias, routing):
        given = dataclasses.replace(weights, down_bias=bias)
        out = fused_moe.grouped_moe(tokens, given, ids, routing).astype(jnp.float32)
        return jnp.sum(out * factor), out

    def run():
        call = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (_, out), gradients = jax.jit(call)(tokens, weights.down_bias, routing)
        return out, gradients

    out, gradients = run()
    monkeypatch.setattr(grouped_module.Product, "finished", True)
    plain, right = run()
    assert not out[3].any() and not plain[3].any()
    assert 0 < oracle.error(out, plain) < 4e-3
    rest = np.arange(24) != 3
    for a, b in zip(gradients, right, strict=True):
        a, b = (x[rest] if len(x) == 24 else x for x in (a, b))
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        assert np.isfinite(np.asarray(a, np.float32)).all()
