"""What bad and unusual input leads to: an error that names it, or a defined result."""

# ruff: noqa: E501  (a row of a table is a line)

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gla
from tests.gla import oracle
from tests.gla.test_gla import run
from tpukit.errors import ArgumentError, UnsupportedError

GOOD = oracle.random_batch(1, [3, 20, 1], qk_heads=2, heads=4)


def call(decay=None, **changes):
    """The good call with some arguments replaced."""
    names = ("q", "k", "v", "state_pool", "slot_ids", "cu_seqlens", "has_state")
    args = dict(zip(names, GOOD.args(), strict=True))
    options = {k: changes.pop(k) for k in list(changes) if k not in args}
    args.update(changes)
    decay = GOOD.decay if decay is None else decay
    return gla.gla(*args.values(), decay=decay, **options)


def array(name):
    return jnp.asarray({"q": GOOD.q, "k": GOOD.k, "v": GOOD.v, "state_pool": GOOD.pool}[name])


def plan(**changes):
    return dataclasses.replace(gla.Plan(heads=4), **changes)


BAD_SHAPES = {
    "k of another batch": (dict(k=array("k")[:5]), r"k has shape \(5, 2, 128\); needs 24"),
    "rank of q": (dict(q=array("q")[0]), r"q has shape .* needs 3 dimensions"),
    "heads of k": (dict(k=array("k")[:, :1]), r"k has shape .* qk_heads is 2 by q"),
    "heads not a multiple": (dict(v=array("v")[:, :3], state_pool=array("state_pool")[:, :3], decay=gla.HeadDecay(jnp.zeros(3))), "heads of v is 3; needs a multiple of 2"),
    "heads of the pool": (dict(state_pool=array("state_pool")[:, :2]), r"state_pool has shape .* heads is 4 by v"),
    "dims of the pool": (dict(state_pool=array("state_pool")[..., :64]), r"state_pool has shape .* value_dim"),
    "key dim": (dict(q=array("q")[..., :96], k=array("k")[..., :96], state_pool=array("state_pool")[:, :, :96]), "key_dim is 96; needs 64, 128 or 256"),
    "short g": (dict(decay=gla.HeadDecay(jnp.zeros(2))), r"decay.g has shape \(2,\); needs 4"),
    "short token g": (dict(decay=gla.TokenDecay(jnp.zeros((3, 4)))), r"decay.g has shape \(3, 4\)"),
    "short slots": (dict(slot_ids=jnp.zeros(2, jnp.int32)), r"cu_seqlens has shape \(4,\); needs 3"),
    "short has_state": (dict(has_state=jnp.zeros(2, bool)), r"has_state has shape \(2,\)"),
    "no bounds": (dict(slot_ids=jnp.zeros(0, jnp.int32), cu_seqlens=jnp.zeros(0, jnp.int32)), "cu_seqlens"),
    "f16": (dict(q=array("q").astype(jnp.float16)), "q has dtype float16; needs bfloat16 or float32. Cast"),
    "mixed types": (dict(k=array("k").astype(jnp.float32)), "k has dtype float32; needs bfloat16"),
    "type of v": (dict(v=array("v").astype(jnp.float32)), "v has dtype float32; needs bfloat16"),
    "type of the state": (dict(state_pool=array("state_pool").astype(jnp.float16)), "state_pool has dtype float16"),
    "float bounds": (dict(cu_seqlens=jnp.zeros(4)), "cu_seqlens has dtype float32; needs int32"),
    "short ints": (dict(slot_ids=jnp.zeros(3, jnp.int16)), "slot_ids has dtype int16; needs int32"),
    "integer has_state": (dict(has_state=jnp.zeros(3, jnp.int32)), "has_state has dtype int32; needs bool"),
    "bf16 decay": (dict(decay=gla.HeadDecay(jnp.zeros(4, jnp.bfloat16))), "decay.g has dtype bfloat16"),
    "array as decay": (dict(decay=jnp.ones(4)), "decay is a .*; needs HeadDecay"),
    "array as scale": (dict(scale=jnp.ones(())), "scale is .*; needs a finite Python number"),
    "NaN scale": (dict(scale=float("nan")), "scale is nan"),
    "infinite scale": (dict(scale=float("inf")), "scale is inf"),
    "implementation": (dict(implementation="mosaic"), "implementation is 'mosaic'; needs 'auto'"),
    "plan heads": (dict(implementation="interpret", plan=plan(heads=3)), "plan.heads is 3; needs a divisor of 4"),
    "plan heads below a group": (dict(implementation="interpret", plan=plan(heads=1)), "plan.heads is 1"),
    "plan interleave": (dict(implementation="interpret", plan=plan(interleave=3)), "plan.interleave is 3"),
    "plan window": (dict(implementation="interpret", plan=plan(window=48)), "plan.window is 48"),
    "plan inputs": (dict(implementation="interpret", plan=plan(inputs=3)), "plan.inputs is 3; needs a power"),
    "plan states": (dict(implementation="interpret", plan=plan(states=1)), "plan.states is 1"),
    "plan lookahead": (dict(implementation="interpret", plan=plan(lookahead=8)), "plan.lookahead is 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_bad_arguments_are_named(name):
    changes, message = BAD_SHAPES[name]
    with pytest.raises(ArgumentError, match=message):
        call(**changes)


BAD_VALUES = {
    "slot past the pool": (dict(slot_ids=[0, 99, 1]), r"slot_ids has 99 at index \[1\]; needs -1 to 5"),
    "negative slot": (dict(slot_ids=[0, 1, -7]), r"slot_ids has -7 at index \[2\]"),
    "repeated slot": (dict(slot_ids=[2, 1, 2]), r"slot_ids has 2 at index \[2\]; needs each slot"),
    "descending bounds": (dict(cu_seqlens=[0, 9, 3, 20]), r"cu_seqlens has 3 at index \[2\]; needs asc"),
    "bounds past the end": (dict(cu_seqlens=[0, 3, 9, 25]), r"cu_seqlens has 25 at index \[3\]"),
    "negative bound": (dict(cu_seqlens=[-1, 3, 9, 20]), r"cu_seqlens has -1 at index \[0\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VALUES)
def test_validate_names_the_value_and_its_place(name):
    changes, message = BAD_VALUES[name]
    changes = {key: jnp.asarray(value, jnp.int32) for key, value in changes.items()}
    with pytest.raises(ArgumentError, match=message):
        call(**changes, validate=True)
    call(**changes)  # defined without validation


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_validate_names_a_decay_that_grows(value):
    g = jnp.asarray([-1, value, -1, -1], jnp.float32)
    with pytest.raises(ArgumentError, match=r"decay.g has .* at index \[1\]; needs log decays"):
        call(decay=gla.HeadDecay(g), validate=True)


def test_validate_accepts_good_values_and_null_slots():
    call(validate=True)
    call(slot_ids=jnp.asarray([-1, 0, -1], jnp.int32), validate=True)


def test_validate_under_jit_says_what_to_do():
    with pytest.raises(ArgumentError, match=r"is traced.*outside jax.jit"):
        jax.jit(lambda slots: call(slot_ids=slots, validate=True))(GOOD.args()[4])


def test_pallas_without_a_tpu_says_what_to_do():
    with pytest.raises(UnsupportedError, match=r"cannot run on cpu.*implementation='reference'"):
        call(implementation="pallas")


def test_a_plan_too_big_says_how_big():
    big = gla.Plan(heads=4, window=256, inputs=64, states=128)
    with pytest.raises(UnsupportedError, match=r"MiB of VMEM.*tpu7x.*64 MiB.*fewer"):
        call(implementation="interpret", plan=big)


def test_a_pool_too_big_for_its_schedule_is_refused():
    pool = jax.ShapeDtypeStruct((300_000, 4, 128, 128), jnp.float32)
    with pytest.raises(UnsupportedError, match="scalars"):
        gla.explain(*GOOD.args()[:3], pool, *GOOD.args()[4:], decay=GOOD.decay, chip="tpu7x")


# Unusual values without validation: defined, and never an address.


@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_nothing_to_do(implementation):
    none = jnp.zeros(0, jnp.int32)
    empty = {name: array(name)[:0] for name in ("q", "k", "v")}
    bounds = jnp.zeros(4, jnp.int32)
    o, pool = call(**empty, cu_seqlens=bounds, implementation=implementation)
    assert o.shape == (0, 4, 128) and oracle.same_bits(pool, GOOD.pool)
    o, pool = call(
        slot_ids=none,
        cu_seqlens=bounds[:1],
        has_state=none.astype(bool),
        implementation=implementation,
    )
    assert not np.asarray(o).any() and oracle.same_bits(pool, GOOD.pool)


HOSTILE = {
    "slots anywhere": dict(slots=np.array([99, -(2**31), 2**31 - 1], np.int32)),
    "bounds backwards": dict(cu=np.array([20, 3, 9, -5], np.int32)),
    "bounds beyond": dict(cu=np.array([-9, 7, 2**31 - 1, 3], np.int32)),
    "the same slot": dict(slots=np.array([2, 2, 2], np.int32)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_are_defined(name):
    batch = dataclasses.replace(
        oracle.random_batch(2, [3, 20, 1], dtype=np.float32), **HOSTILE[name]
    )
    o, pool = run(batch)
    wanted, states = oracle.exact(batch)
    assert oracle.error(o, wanted) < 3e-6 and oracle.error(pool, states) < 3e-6
    idle = [s for s in range(len(pool)) if s not in batch.slots]
    assert oracle.same_bits(pool[idle], batch.pool[idle])


@pytest.mark.parametrize("per_token", [False, True])
def test_decays_are_clipped(per_token):
    batch = oracle.random_batch(3, [3, 20, 1], dtype=np.float32, per_token=per_token)
    batch.g.reshape(-1)[:2] = 5.0, -np.inf
    o, pool = run(batch)
    wanted, states = oracle.exact(batch)
    assert np.isfinite(o).all() and np.isfinite(pool).all()
    assert oracle.error(o, wanted) < 1e-5 and oracle.error(pool, states) < 1e-5


def test_explain_and_supports_for_absent_chips():
    arguments = {"decay": GOOD.decay}
    for chip in ("v5e", "v5p", "v6e", "tpu7x"):
        found = gla.explain(*GOOD.args(), **arguments, chip=chip)
        assert found.plan.heads == 4 and found.source == "model" and found.vmem_bytes > 0
        assert "VMEM" in str(found)
        assert gla.supports(*GOOD.args(), **arguments, chip=chip)
    mine = gla.Plan(heads=2, interleave=1)
    assert gla.explain(*GOOD.args(), **arguments, chip="v6e", plan=mine).source == "argument"
    assert not gla.supports(*GOOD.args(), **arguments, chip="v6e", plan=gla.Plan(heads=3))
    with pytest.raises(ArgumentError, match="v5e"):
        gla.explain(*GOOD.args(), **arguments, chip="v99")


def test_batch_form_checks_its_own_shapes():
    x = jnp.zeros((2, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(ArgumentError, match=r"gla_batch: k has shape"):
        gla.gla_batch(x, x[:1], x, decay=gla.HeadDecay(jnp.zeros(2)))
    with pytest.raises(ArgumentError, match=r"gla_batch: decay.g has shape"):
        gla.gla_batch(x, x, x, decay=gla.TokenDecay(jnp.zeros((16, 2))))
    with pytest.raises(ArgumentError, match=r"gla_batch: initial_state has shape"):
        gla.gla_batch(x, x, x, decay=gla.HeadDecay(jnp.zeros(2)), initial_state=x)
