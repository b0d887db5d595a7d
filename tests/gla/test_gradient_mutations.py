"""Seeded faults in the gradient: its tests have to be red on every one of them."""

# ruff: noqa: E501  (a row of a table is a line)

import jax.numpy as jnp
import numpy as np
import pytest

from gla import gradient, kernel, schedule
from tests.gla import oracle
from tests.gla.test_gradient import check_f32, pullback
from tpukit import interpret

RAGGED = dict(lengths=[3, 35, 1, 6], slots=[1, 0, -1, 0], known=[True] * 4, tokens=48)
BATCHES = {
    per_token: oracle.random_batch(
        50, **RAGGED, qk_heads=1, dims=(64, 64), dtype=np.float32, per_token=per_token
    )
    for per_token in (False, True)
}
BATCHES[True].g[5] = 0.5


def passes(per_token=True):
    pullback.cache_clear()
    try:
        check_f32(BATCHES[per_token])
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
