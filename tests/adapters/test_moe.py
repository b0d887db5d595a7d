"""SGLang-JAX's fused mixture of experts: arguments and weights mean here what they mean there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import fused_moe
from adapters import sglang_jax
from tests.adapters import oracle
from tests.adapters.batches import once
from tpukit.errors import ArgumentError

TOKENS, TOP_K, EXPERTS, HIDDEN, INTER, BLOCK = 5, 2, 4, 512, 256, 128
F8, BF16 = jnp.float8_e4m3fn, jnp.bfloat16


@functools.cache
def mesh(data=1, tensor=2):
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@functools.cache
def operands(dtype=BF16, block=None):
    """Tokens, w1, w2, w3, routing, a shared expert, and the scales of both; a slot is empty."""
    rng = np.random.default_rng(4)

    def matrix(*shape, block=None):
        inputs, outputs = shape[-2:]
        x = rng.normal(size=shape) / inputs**0.5
        if dtype == BF16:
            return jnp.asarray(x, BF16), None
        shape = (*shape[:-2], inputs // (block or inputs), 1, outputs)
        scale = jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32)
        return jnp.asarray(x, dtype), scale if len(shape) == 4 else scale[0]

    sizes = ((HIDDEN, INTER), (INTER, HIDDEN), (HIDDEN, INTER))
    weights, scales = zip(*(matrix(EXPERTS, *s, block=block) for s in sizes), strict=True)
    shared, shared_scales = zip(*(matrix(*s) for s in sizes), strict=True)
    tokens = jnp.asarray(4 * rng.normal(size=(TOKENS, HIDDEN)), BF16)  # some reach a limit of 7
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).astype(np.int32)
    ids[3, 0] = -1
    routing = jnp.asarray(rng.uniform(0.2, 1, ids.shape), jnp.float32)
    if dtype == BF16:
        scales = shared_scales = None
    return tokens, weights, scales, routing, jnp.asarray(ids), shared, shared_scales


CASES = {  # type of the weights, inputs of a scale, options of the stack
    "bfloat16, shared expert": (BF16, None, {"shared": True}),
    "channels": (F8, None, {"act_fn": "gelu", "direct_scaled_dot": True}),
    "blocks": (F8, BLOCK, {"act_fn": "swigluoai", "swiglu_limit": 3.0}),
    "float8 tokens": (
        F8,
        None,
        {"enable_act_quant": True, "direct_scaled_dot": True, "shared": True},
    ),
}


def check(name, data=1, jit=False):
    dtype, block, options = CASES[name]
    options = dict(options)
    tokens, weights, scales, routing, ids, shared, shared_scales = operands(dtype, block)
    given = {}
    if scales is not None:
        given |= dict(zip(("w1_scale", "w2_scale", "w3_scale"), scales, strict=True))
    with_shared = options.pop("shared", False)
    if with_shared:
        given |= dict(zip(("w1_shared", "w2_shared", "w3_shared"), shared, strict=True))
        if shared_scales is not None:
            names = ("w1_shared_scale", "w2_shared_scale", "w3_shared_scale")
            given |= dict(zip(names, shared_scales, strict=True))

    def fn(tokens, weights, routing, ids, given):
        return sglang_jax.fused_ep_moe_v2(
            mesh(data), tokens, *weights, routing, ids, TOP_K, quant_block_k=block, **options,
            **given,
        )  # fmt: skip

    fn = once(fn) if jit else fn
    got = fn(tokens, weights, routing, ids, given)
    want = oracle.moe(
        tokens,
        *weights,
        scales,
        routing,
        np.asarray(ids),
        options.get("act_fn", "silu"),
        block,
        (*shared, shared_scales) if with_shared else None,
    )
    assert got.dtype == BF16 and got.shape == want.shape
    error = np.asarray(got, np.float64) - want
    worst = np.sqrt((error**2).mean(1) / (want**2).mean(1)).max()
    assert worst <= (0.06 if options.get("enable_act_quant") else 0.006), worst


@pytest.mark.parametrize("name", CASES)
def test_results(name):
    check(name, jit=True)


def test_both_axes_of_the_mesh_hold_experts():
    check("channels", data=2, jit=True)


def wrong_call(**change):
    tokens, weights, scales, routing, ids, *_ = operands(F8, BLOCK)
    call = {"mesh": mesh(), "tokens": tokens, "topk_weights": routing, "topk_ids": ids}
    call |= dict(zip(("w1", "w2", "w3"), weights, strict=True))
    call |= dict(zip(("w1_scale", "w2_scale", "w3_scale"), scales, strict=True))
    call |= {"top_k": TOP_K, "quant_block_k": BLOCK}
    return sglang_jax.fused_ep_moe_v2(**(call | change))


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"top_k": 3}, "top_k"),
        ({"quant_block_k": None}, "w1_scale"),
        ({"kernel_ablation_mode": "no_shared"}, "kernel_ablation_mode"),
        ({"swiglu_limit": 7.0}, "swiglu_limit"),
        ({"act_fn": "relu"}, "activation"),
        ({"w1_shared": jnp.zeros((HIDDEN, INTER), F8)}, "w3_shared"),
        ({"dp_axis_name": "expert"}, "axis_name"),
        ({"w1_scale": None}, "weights.gate_scale"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change, argument):
    with pytest.raises(ArgumentError) as error:
        wrong_call(**change)
    assert error.value.argument == argument


def test_a_limit_of_a_shared_expert_is_refused_where_there_is_one():
    tokens, weights, _, routing, ids, shared, _ = operands()
    arguments = mesh(), tokens, *weights, routing, ids, TOP_K
    names = ("w1_shared", "w2_shared", "w3_shared")
    with pytest.raises(ArgumentError, match="shared_swiglu_limit"):
        sglang_jax.fused_ep_moe_v2(
            *arguments, shared_swiglu_limit=7.0, **dict(zip(names, shared, strict=True))
        )


# Seeded faults; each is one that an adapter could have.


def replaced(**fields):
    """Weights with some of their fields changed; a name with a dot is of the shared expert."""

    def change(args, options):
        weights = args[1]
        new = {name: make(weights) for name, make in fields.items()}
        args[1] = fused_moe.Weights(**(vars(weights) | new))
        return args, options

    return change


def option(**wrong):
    return lambda args, options: (args, options | wrong)


def routed_to_others(args, options):
    args[2] = jnp.where(args[2] >= 0, (args[2] + 1) % EXPERTS, -1)
    return args, options


def unweighted(args, options):
    args[3] = jnp.ones_like(args[3])
    return args, options


FAULTS = {
    "gate and up swapped": (
        "bfloat16, shared expert",
        replaced(gate=lambda w: w.up, up=lambda w: w.gate),
    ),
    "no shared expert": ("bfloat16, shared expert", replaced(shared=lambda w: None)),
    "weights forgotten": ("bfloat16, shared expert", unweighted),
    "experts off by one": ("bfloat16, shared expert", routed_to_others),
    "another activation": ("channels", option(activation="silu")),
    "scales of gate and up swapped": (
        "channels",
        replaced(gate_scale=lambda w: w.up_scale, up_scale=lambda w: w.gate_scale),
    ),
    "blocks in reverse": ("blocks", replaced(gate_scale=lambda w: w.gate_scale[:, ::-1])),
    "no limit": ("blocks", option(limit=None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, monkeypatch):
    name, change = FAULTS[fault]
    right = fused_moe.fused_moe

    def wrong(*args, **options):
        args, options = change(list(args), options)
        return right(*args, **options)

    monkeypatch.setattr(fused_moe, "fused_moe", wrong)
    with pytest.raises(AssertionError):
        check(name, jit=True)
