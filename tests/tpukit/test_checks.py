"""Argument checks: every refusal names the argument, what it got and what it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import checkify

from tpukit import checks
from tpukit.errors import ArgumentError

Spec = jax.ShapeDtypeStruct


def refusal(fn, *args, **kwargs):
    with pytest.raises(ArgumentError) as caught:
        fn(*args, **kwargs)
    return str(caught.value)


def bound():
    dims = checks.Dims("gla")
    dims.bind("q", Spec((16, 4, 128), jnp.bfloat16), "tokens qk_heads key_dim")
    return dims


def test_names_bind_once_and_must_agree():
    dims = bound()
    dims.bind("v", np.zeros((16, 8, 64)), "tokens heads _")
    dims.bind("cu_seqlens", jnp.zeros(6, jnp.int32), "requests+1")
    dims.bind("slots", jnp.zeros(5, jnp.int32), "requests")
    assert [dims[name] for name in ("tokens", "qk_heads", "heads", "requests")] == [16, 4, 8, 5]
    with pytest.raises(KeyError):
        dims["_"]


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((15, 4), "tokens _", "needs 16 in dimension 0 (tokens; tokens is 16 by q)."),
        ((16,), "tokens+1", "needs 17 in dimension 0 (tokens+1; tokens is 16 by q)."),
        ((16, 4), "tokens", "needs 1 dimension (tokens)."),
        ((16, 4), "a b c", "needs 3 dimensions (a, b, c)."),
        ((16, 4), "_ 3", "needs 3 in dimension 1."),
        ((0,), "requests+1", "needs at least 1 in dimension 0 (requests+1)."),
    ],
)
def test_shape_refusals(shape, names, message):
    text = refusal(bound().bind, "k", Spec(shape, jnp.float32), names)
    assert text == f"gla: k has shape {shape}; {message}"


def test_misspelt_names_are_the_callers_fault():
    with pytest.raises(ValueError, match="cannot be called 'Tokens'"):
        bound().bind("k", Spec((1,), jnp.float32), "Tokens")


def test_works_while_tracing():
    def fn(q):
        dims = checks.Dims("fn")
        dims.bind("q", q, "tokens 4")
        checks.check_dtype("fn", "q", q, [jnp.float32])
        return q * dims["tokens"]

    assert jax.jit(fn)(jnp.ones((3, 4)))[0, 0] == 3
    assert "needs 4 in dimension 1" in refusal(jax.jit(fn), jnp.ones((3, 5)))


def test_dtype_refusal():
    text = refusal(checks.check_dtype, "gla", "q", Spec((1,), jnp.float16), ["bfloat16", "float32"])
    assert text == (
        "gla: q has dtype float16; needs bfloat16 or float32. Cast it with q.astype(jnp.bfloat16)."
    )


@pytest.mark.parametrize(
    ("check", "args", "message"),
    [
        (checks.check_choice, ("f", "a", "x", ("y",)), "f: a is 'x'; needs 'y'."),
        (checks.check_choice, ("f", "a", 4, (1, 2, 3)), "f: a is 4; needs 1, 2 or 3."),
        (checks.check_multiple, ("f", "a", 12, 8), "f: a is 12; needs a multiple of 8."),
        (checks.check_array, ("f", "a", None), "f: a is None; needs an array."),
        (checks.check_dtype, ("f", "a", [1], ["int32"]), "f: a is a list; needs an array."),
        (
            checks.check_type,
            ("f", "a", {}, str, "Write it."),
            "f: a is a dict; needs a str. Write it.",
        ),
        (checks.check_type, ("f", "a", True, int), "f: a is a bool; needs an int."),
        (checks.check_type, ("f", "a", None, int), "f: a is None; needs an int."),
        (checks.check_range, ("f", "a", 0, 1, 8), "f: a is 0; needs 1 to 8."),
        (checks.check_range, ("f", "a", 9, 1, 8), "f: a is 9; needs 1 to 8."),
        (checks.check_range, ("f", "a", 0, 1), "f: a is 0; needs at least 1."),
        (checks.check_range, ("f", "a", 2, None, 1), "f: a is 2; needs at most 1."),
        (checks.check_range, ("f", "a", float("nan"), 0.0, 1.0), "f: a is nan; needs 0.0 to 1.0."),
    ],
)
def test_value_refusals(check, args, message):
    assert refusal(check, *args) == message


def test_good_values_pass():
    checks.check_dtype("f", "a", jnp.ones(1, jnp.bfloat16), [jnp.float32, jnp.bfloat16])
    checks.check_choice("f", "a", "x", ("y", "x"))
    checks.check_multiple("f", "a", 16, 8)
    checks.check_type("f", "a", True, bool)
    checks.check_type("f", "a", 3, int)
    checks.check_range("f", "a", 1, 1, 8)
    checks.check_range("f", "a", 8, 1, 8)


@given(st.lists(st.lists(st.integers(-3, 12), min_size=3, max_size=3), max_size=5))
def test_both_forms_of_a_rule_agree(rows):
    ids = np.array(rows, np.int32).reshape(-1, 3)
    wrong = [(i, j) for i, row in enumerate(rows) for j, x in enumerate(row) if not 0 <= x < 8]
    condition = checks.in_range("ids", ids, 0, 8)
    assert checks.first_bad(condition.bad) == (wrong[0] if wrong else None)

    def functional(ids):
        checks.checkify_if_bad("f", [checks.in_range("ids", ids, 0, 8)])

    error, _ = checkify.checkify(functional)(jnp.asarray(ids))
    if not wrong:
        checks.raise_if_bad("f", [condition])
        assert error.get() is None
        return
    (i, j), value = wrong[0], ids[wrong[0]]
    message = refusal(checks.raise_if_bad, "f", [condition])
    assert message == f"f: ids has {value} at index [{i}, {j}]; needs 0 to 7."
    assert f"f: ids has {value} at flat index {3 * i + j}; needs 0 to 7." in error.get()


def test_later_conditions_are_looked_at():
    good, bad = np.array([1.0]), np.array([1.0, np.inf])
    conditions = [
        checks.Condition("a", good, ~np.isfinite(good), "finite values"),
        checks.Condition("b", bad, ~np.isfinite(bad), "finite values"),
    ]
    assert (
        refusal(checks.raise_if_bad, "f", conditions)
        == "f: b has inf at index [1]; needs finite values."
    )


def test_values_of_a_traced_call_are_refused():
    def fn(ids):
        checks.raise_if_bad("f", [checks.in_range("ids", ids, 0, 8)])
        return ids

    assert "use the checkify form" in refusal(jax.jit(fn), jnp.arange(3))


def test_checkify_form_works_under_jit():
    def fn(ids):
        checks.checkify_if_bad("f", [checks.in_range("ids", ids, 0, 2)])
        return ids + 1

    error, result = jax.jit(checkify.checkify(fn))(jnp.arange(3))
    assert "ids has 2 at flat index 2" in error.get()
    assert result.tolist() == [1, 2, 3]
