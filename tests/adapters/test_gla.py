"""SGLang-JAX's simple GLA: its arguments mean here what they mean there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gla
from adapters import sglang_jax
from tests.adapters import oracle
from tpukit.errors import ArgumentError

HEADS, DIM = 2, 128
LENGTHS = (3, 0, 1, 0, 1, 0)
BOUNDS = np.concatenate([[0], np.cumsum(LENGTHS)])
TOKENS = BOUNDS[-1] + 1  # and one of no request; as many as requests, so that decode compiles less
DECAYS = jnp.array([-0.1, -0.7])


def operands(*shape, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(size=(*shape, HEADS, DIM)), dtype) for _ in range(3)]


def some_states(count, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), (count, HEADS, DIM, DIM), dtype)


def close(got, want, tolerance=3e-6):
    assert np.abs(np.asarray(got, np.float64) - want).max() <= tolerance * np.abs(want).max()


def check_prefill(per_token=False, resumes=True, scale=None):
    q, k, v = operands(1, TOKENS)
    bounds = jnp.asarray(BOUNDS, jnp.int32)
    states = some_states(len(LENGTHS)) if resumes else None
    per_head = np.broadcast_to(DECAYS, (TOKENS, HEADS))
    each = per_head * np.linspace(0.5, 2, TOKENS)[:, None] if per_token else per_head
    decay = {"g": jnp.asarray(each[None])} if per_token else {"g_gamma": DECAYS}
    o, last = sglang_jax.simple_gla_fwd(
        q, k, v, **decay, h0=states, use_ht=True, cu_seqlens_dev=bounds, scale=scale
    )
    starts = np.zeros((len(LENGTHS), HEADS, DIM, DIM)) if states is None else states
    want, want_last = oracle.simple_gla(q[0], k[0], v[0], each, starts, BOUNDS, scale)
    assert o.shape == q.shape and last.dtype == jnp.float32
    close(o[0], want)
    close(last, want_last)


SLOTS = np.array([3, 0, 1, 0, 4, 0])  # 0: the dummy that padding has
RESUMES = np.array([True, True, False, True, True, False])


def check_decode(dtype=jnp.float32, scale=None):
    q, k, v = operands(len(SLOTS))
    buffer = some_states(6, dtype)
    o, after = sglang_jax.decode_simple_gla_fused(
        q,
        k,
        v,
        buffer,
        jnp.asarray(SLOTS, jnp.int32),
        jnp.asarray(RESUMES),
        g_gamma=DECAYS,
        scale=scale,
    )
    starts = np.where(RESUMES[:, None, None, None], oracle.f64(buffer)[SLOTS], 0)
    decays = np.broadcast_to(DECAYS, (len(SLOTS), HEADS))
    want, last = oracle.simple_gla(q, k, v, decays, starts, np.arange(len(SLOTS) + 1), scale)
    real = SLOTS != 0
    tolerance = 3e-6 if dtype == jnp.float32 else 5e-3  # of the state, rounded as it is written
    close(o[real], want[real])
    close(after[SLOTS[real]], last[real], tolerance)
    for untouched in (0, 2, 5):
        np.testing.assert_array_equal(after[untouched], buffer[untouched])
    assert not np.asarray(o[~real]).any() and after.dtype == dtype


@pytest.mark.parametrize(
    "options", [{}, {"per_token": True}, {"resumes": False}, {"scale": 0.5}], ids=str
)
def test_prefill(options):
    check_prefill(**options)


def test_prefill_without_final_states():
    q, k, v = operands(1, TOKENS)
    bounds = jnp.asarray(BOUNDS, jnp.int32)
    _, last = sglang_jax.simple_gla_fwd(q, k, v, g_gamma=DECAYS, cu_seqlens_dev=bounds)
    assert last is None


@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}, {"scale": 0.5}], ids=str)
def test_decode(options):
    check_decode(**options)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"cu_seqlens_dev": None}, "cu_seqlens_dev"),
        ({"cu_seqlens_cpu": jnp.zeros(2)}, "cu_seqlens_cpu"),
        ({"g_gamma": None}, "g_gamma"),
        ({"g": jnp.zeros((1, TOKENS, HEADS))}, "g_gamma"),
        ({"q": jnp.zeros((2, TOKENS, HEADS, DIM))}, "q"),
        ({"h0": jnp.zeros((1, HEADS, DIM, DIM))}, "h0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change, argument):
    q, k, v = operands(1, TOKENS)
    call = {"q": q, "k": k, "v": v, "g_gamma": DECAYS}
    call["cu_seqlens_dev"] = jnp.asarray(BOUNDS, jnp.int32)
    with pytest.raises(ArgumentError) as error:
        sglang_jax.simple_gla_fwd(**(call | change))
    assert error.value.argument == argument


# Seeded faults; each is one that an adapter could have.


def faulty(**wrong):
    """`gla.gla` with some of its arguments changed."""
    right = gla.gla
    names = ("q", "k", "v", "state_pool", "slot_ids", "cu_seqlens", "has_state")

    def call(*args, **options):
        given = dict(zip(names, args, strict=True)) | options
        return right(**(given | {name: change(given[name]) for name, change in wrong.items()}))

    return call


@pytest.mark.parametrize(
    "fault",
    [
        {"decay": lambda decay: gla.HeadDecay(decay.g * 2)},
        {"decay": lambda decay: gla.HeadDecay(decay.g[::-1])},
        {"state_pool": lambda states: states.swapaxes(2, 3)},
        {"has_state": lambda has: ~has},
        {"slot_ids": lambda slots: slots[::-1]},
        {"scale": lambda scale: 1.0},
    ],
)
@pytest.mark.parametrize("check", [check_prefill, check_decode])
def test_a_wrong_argument_is_caught(check, fault, monkeypatch):
    monkeypatch.setattr(gla, "gla", faulty(**fault))
    with pytest.raises(AssertionError):
        check()


def test_a_dummy_that_is_written_is_caught(monkeypatch):
    monkeypatch.setattr(gla, "gla", faulty(slot_ids=lambda slots: jnp.maximum(slots, 0)))
    with pytest.raises(AssertionError):
        check_decode()
