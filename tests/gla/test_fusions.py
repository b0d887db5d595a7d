"""Norm, rope and gate inside the kernel: as accurate as around it, and as well defined."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gla
from reference import gla as reference
from tests.gla import around, oracle
from tests.gla.test_gla import FLIPS, STATE_A
from tpukit import interpret
from tpukit.errors import ArgumentError, UnsupportedError

PLAN = gla.Plan(heads=2, interleave=2, window=32, inputs=2, states=2, lookahead=1)


@functools.cache
def compiled(implementation, plan, mode=interpret.MODES[0]):
    """A jitted call per static choice; the mode only keeps traces apart."""
    options = {"implementation": implementation, "plan": plan}
    return jax.jit(lambda args, named: gla.gla(*args, **named, **options))


def run(batch, prologue=None, epilogue=None, implementation="interpret", plan=PLAN):
    """Output and pool under the strict harness, as numpy arrays."""
    named = {"decay": batch.decay, "prologue": prologue, "epilogue": epilogue}
    with interpret.strict():
        o, pool = compiled(implementation, plan)(batch.args(), named)
        return np.asarray(o), np.asarray(pool)


@jax.jit
def unfused(args, decay, prologue, epilogue):
    """The reference's layers around the reference with the kernel's roundings."""
    q, k, *rest = args
    if prologue is not None:
        q, k = gla.norm_rope(q, k, prologue)
    options = {"operands": jnp.bfloat16, "chunk": PLAN.window}
    o, pool = reference.chunked(q, k, *rest, decay=decay, **options)
    return (o if epilogue is None else gla.norm_gate(o, epilogue)), pool


def check_gates(batch, prologue, epilogue, o, pool):
    """Gates A and B for bf16, as in test_gla; q and k are rounded once more, which may flip."""
    wanted, states = around.rounded(batch, prologue, epilogue, window=PLAN.window)
    rounding = oracle.error(oracle.bf16(wanted), wanted)
    assert oracle.error(o, wanted) <= 1.25 * rounding + 2 * FLIPS
    rows = np.abs(wanted).max(axis=(1, 2)) > 0
    per_row = oracle.error(o[rows], wanted[rows], axis=(1, 2))
    assert per_row <= 2 * oracle.error(oracle.bf16(wanted[rows]), wanted[rows], axis=(1, 2)) + (
        10 * FLIPS
    )
    assert not o[~rows].any()
    assert oracle.error(pool, states) <= 2 * STATE_A
    exact, exact_states = around.exact(batch, prologue, epilogue)
    plain, plain_states = unfused(batch.args(), batch.decay, prologue, epilogue)
    assert oracle.error(o, exact) <= 1.1 * oracle.error(plain, exact) + FLIPS
    assert oracle.error(pool, exact_states) <= 1.1 * oracle.error(plain_states, exact_states)


def mixed(seed, heads=2, **options):
    """Runs, chunks, a null request of one token and one of several, and rows of nobody."""
    slots = [1, 2, -1, 3, 4, -1, 5, 6]
    lengths = [1, 1, 1, 40, 5, 3, 20, 1]
    options = {"slots": slots, "tokens": 90, "gap": 2, "heads": heads, **options}
    return oracle.random_batch(seed, lengths, qk_heads=2, strongest=0.5, **options)


@pytest.mark.parametrize("parts", ["both", "prologue", "epilogue"])
def test_bf16(parts):
    batch = mixed(30)
    prologue = around.random_prologue(31, batch) if parts != "epilogue" else None
    epilogue = around.random_epilogue(32, batch) if parts != "prologue" else None
    check_gates(batch, prologue, epilogue, *run(batch, prologue, epilogue))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("implementation", ["interpret", "reference"])
def test_f32(implementation, per_token):
    batch = mixed(33, dtype=np.float32, per_token=per_token)
    named = around.random_prologue(34, batch, 128), around.random_epilogue(35, batch, 1)
    o, pool = run(batch, *named, implementation)
    wanted, states = around.exact(batch, *named)
    assert oracle.error(o, wanted) < 3e-6
    assert oracle.error(o, wanted, axis=(1, 2)) < 1e-5
    assert oracle.error(pool, states) < 3e-6


def test_grouped_heads_over_grid_steps_and_an_odd_rotary_dim():
    batch = mixed(36, heads=8)
    named = around.random_prologue(37, batch, 42), around.random_epilogue(38, batch, 2)
    plan = dataclasses.replace(PLAN, heads=4)
    check_gates(batch, *named, *run(batch, *named, plan=plan))


def test_fused_is_unfused():
    """The same function as the reference's layers around the kernel, but for f32's rounding."""
    batch = mixed(39, dtype=np.float32)
    prologue, epilogue = around.random_prologue(40, batch), around.random_epilogue(41, batch)
    o, pool = run(batch, prologue, epilogue)
    q, k = gla.norm_rope(jnp.asarray(batch.q), jnp.asarray(batch.k), prologue)
    inner, states = run(dataclasses.replace(batch, q=q, k=k))
    assert oracle.error(o, gla.norm_gate(jnp.asarray(inner), epilogue)) < 1e-6
    assert oracle.error(pool, states) < 1e-6


def test_nan_stays_in_its_request_and_its_row():
    clean = mixed(42)
    prologue, epilogue = around.random_prologue(43, clean), around.random_epilogue(44, clean)
    wanted = run(clean, prologue, epilogue)
    begin, end = clean.cu[4:6]  # of the request of 5
    bad = dataclasses.replace(prologue, cos=prologue.cos.at[begin + 1].set(jnp.nan))
    o, pool = run(clean, bad, epilogue)
    assert np.isnan(o[begin:end].astype(np.float32)).any()
    others = np.r_[0:begin, end : len(o)]
    assert oracle.same_bits(o[others], wanted[0][others])
    keep = np.arange(len(pool)) != clean.slots[4]
    assert oracle.same_bits(pool[keep], wanted[1][keep])
    nobody = np.r_[0 : clean.cu[0], clean.cu[2], clean.cu[5] : clean.cu[6], clean.cu[8] : len(o)]
    rows = np.r_[nobody, begin + 1]
    bad = dataclasses.replace(epilogue, gate=epilogue.gate.at[rows].set(jnp.nan))
    o, pool = run(clean, prologue, bad)
    assert np.isnan(o[begin + 1].astype(np.float32)).all()
    others = np.delete(np.arange(len(o)), begin + 1)
    assert oracle.same_bits(o[others], wanted[0][others]) and not o[nobody].any()
    assert oracle.same_bits(pool, wanted[1])


GOOD = mixed(45, heads=4)
PROLOGUE, EPILOGUE = around.random_prologue(46, GOOD), around.random_epilogue(47, GOOD)


def prologue(**changes):
    return {"prologue": dataclasses.replace(PROLOGUE, **changes)}


def epilogue(**changes):
    return {"epilogue": dataclasses.replace(EPILOGUE, **changes)}


BAD = {
    "kind of prologue": ({"prologue": EPILOGUE}, "prologue is a NormGate; needs a NormRope"),
    "kind of epilogue": ({"epilogue": True}, "epilogue is a bool; needs a NormGate"),
    "q weight": (prologue(q_weight=jnp.ones(64)), r"prologue.q_weight has shape \(64,\)"),
    "k weight": (prologue(k_weight=jnp.ones(128, jnp.bfloat16)), "prologue.k_weight has dtype"),
    "rows of cos": (prologue(cos=PROLOGUE.cos[:3]), r"prologue.cos has shape \(3, 32\); needs 90"),
    "half of sin": (prologue(sin=PROLOGUE.sin[:, :3]), r"prologue.sin has shape \(90, 3\); needs"),
    "nothing turns": (
        prologue(cos=PROLOGUE.cos[:, :0], sin=PROLOGUE.sin[:, :0]),
        "rotary_dim is 0; needs",
    ),
    "eps": (prologue(eps=0.0), "prologue.eps is 0.0; needs a Python number between 0 and 1"),
    "eps of the gate": (epilogue(eps=jnp.ones(())), "epilogue.eps is"),
    "weight": (epilogue(weight=jnp.ones(4 * 128)), "epilogue.weight has shape"),
    "gate": (epilogue(gate=EPILOGUE.gate[:9]), r"epilogue.gate has shape \(9, 4, 128\); needs 90"),
    "type of the gate": (
        epilogue(gate=EPILOGUE.gate.astype(jnp.float32)),
        "epilogue.gate has dtype float32; needs bfloat16",
    ),
    "heads of a group": (epilogue(heads_per_group=3), "heads_per_group is 3; needs a divisor of"),
    "a group in two steps": (
        epilogue(heads_per_group=4) | {"plan": PLAN},
        "plan.heads is 2; needs a multiple of epilogue.heads_per_group",
    ),
    "weights that are not finite": (
        prologue(q_weight=PROLOGUE.q_weight.at[5].set(jnp.inf)) | {"validate": True},
        r"prologue.q_weight has inf at index \[5\]; needs finite",
    ),
    "weights of the gate": (
        epilogue(weight=EPILOGUE.weight.at[1, 2].set(jnp.nan)) | {"validate": True},
        r"epilogue.weight has nan at index \[1, 2\]; needs finite",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, message = BAD[name]
    with pytest.raises(ArgumentError, match=message):
        gla.gla(*GOOD.args(), decay=GOOD.decay, **{"implementation": "interpret", **changes})


def test_supports_says_which_heads_the_kernel_can_turn():
    named = {"decay": GOOD.decay, "prologue": PROLOGUE, "epilogue": EPILOGUE, "chip": "tpu7x"}
    found = gla.explain(*GOOD.args(), **named)
    assert found.plan.heads == 4
    plain = gla.explain(*GOOD.args(), decay=GOOD.decay, chip="tpu7x")
    assert found.vmem_bytes > plain.vmem_bytes
    wide = oracle.random_batch(48, [3], dims=(256, 128))
    named = {"decay": wide.decay, "prologue": around.random_prologue(49, wide), "chip": "tpu7x"}
    assert not gla.supports(*wide.args(), **named)
    with pytest.raises(UnsupportedError, match=r"key_dim 256.*norm_rope before"):
        gla.explain(*wide.args(), **named)
