"""Seeded faults in the gradient: its tests have to be red on every one of them."""

# ruff: noqa: E501  (a row of a table is a line)

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gla import gradient, kernel, schedule
from reference import gla as reference
from tests.gla import oracle
from tests.gla.test_gradient import ONE, check_f32, delta_batch, no_forward, pullback
from tpukit import interpret

__all__ = ["no_forward"]
pytestmark = pytest.mark.needs("interpreted faults")

RAGGED = dict(lengths=[3, 35, 1, 6], slots=[1, 0, -1, 0], known=[True] * 4, tokens=48)
BATCHES = {
    per_token: oracle.random_batch(
        50, **RAGGED, qk_heads=1, dims=(64, 64), dtype=np.float32, per_token=per_token
    )
    for per_token in (False, True)
}
BATCHES[True].g[5] = 0.5
DELTA = delta_batch(58, [3, 35, 1], "token", known=[True] * 3)


def passes(per_token=True):
    return green(BATCHES[per_token])


def green(batch, *plan):
    pullback.cache_clear()
    try:
        check_f32(batch, *plan)
    except (AssertionError, interpret.InterpretError):
        return False
    finally:
        pullback.cache_clear()
    return True


@pytest.mark.parametrize("per_token", [False, True])
def test_the_gradient_passes(per_token):
    assert passes(per_token)


def with_argument(function, index, change):
    """`function` with one positional argument changed."""

    def changed(*args):
        return function(*args[:index], change(args[index]), *args[index + 1 :])

    return changed


FAULTS = {
    "cotangents decay early": (schedule.Form, "adjoint", property(lambda f: schedule.Form(True))),
    "own decay in every sum": (schedule.Form, "adjoint", property(lambda f: schedule.Form(False, True))),
    "list not turned around": (schedule, "turn_around", lambda listed: None),
    "groups not joined": (kernel.Walk, "join", lambda *args: None),
    "no states": (gradient, "kept", with_argument(gradient.kept, 1, jnp.zeros_like)),
    "states of null requests": (gradient, "kept", with_argument(gradient.kept, 0, jnp.ones_like)),
    "final state not in the decay": (gradient, "token_decay_gradient", with_argument(gradient.token_decay_gradient, 2, jnp.zeros_like)),
    "sums beyond a request": (gradient, "sum_to_end", with_argument(gradient.sum_to_end, 1, lambda n: n + 99)),
    "sums from the beginning": (gradient, "sum_to_end", with_argument(gradient.sum_to_end, 2, lambda r: not r)),
    "clipped decays": (gradient, "token_decay_gradient", with_argument(gradient.token_decay_gradient, 0, lambda g: jnp.minimum(g, -1e-3))),
    "only the first of a group": (gradient, "over_group", lambda dx, x: dx[:, :1].astype(x.dtype)),
    "written slots keep theirs": (gradient, "pool_gradient", lambda d, *args: good_pool(d, *args) + d),
}  # fmt: skip
good_pool = gradient.pool_gradient


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_caught(name, monkeypatch):
    owner, attribute, fault = FAULTS[name]
    assert hasattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, fault)
    assert not passes()


good_inverse, good_read, good_chunked = reference.delta_inverse, reference.read, reference.chunked
DELTA_FAULTS = {
    "beta not differentiated": (reference, "chunked", lambda *args, beta, **kwargs: good_chunked(*args, beta=lax.stop_gradient(beta), **kwargs)),
    "not the delta rule": (reference, "chunked", lambda *args, beta, **kwargs: good_chunked(*args, **kwargs)),
    "inverse as constant": (reference, "delta_inverse", lambda *args: lax.stop_gradient(good_inverse(*args))),
    "decays within as constants": (reference, "delta_inverse", with_argument(good_inverse, 1, lax.stop_gradient)),
    "inverse without strengths": (reference, "delta_inverse", with_argument(good_inverse, 2, jnp.ones_like)),
    "state read undecayed": (reference, "read", with_argument(good_read, 1, jnp.zeros_like)),
    "written slots keep theirs": FAULTS["written slots keep theirs"],
    "no states": FAULTS["no states"],
}  # fmt: skip


@pytest.mark.usefixtures("no_forward")
def test_the_gradient_of_the_delta_rule_passes():
    assert green(DELTA, ONE)


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("name", DELTA_FAULTS)
def test_every_fault_of_the_delta_rule_is_caught(name, monkeypatch):
    owner, attribute, fault = DELTA_FAULTS[name]
    assert hasattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, fault)
    assert not green(DELTA, ONE)
