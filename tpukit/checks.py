"""Argument checks with one style of message; see `errors.ArgumentError`.

The first half looks at shapes and dtypes only, so it works on arrays, tracers and
`jax.ShapeDtypeStruct` alike and costs nothing at run time. The second half looks at values: a rule
is written once, as `Condition`s, and either raised eagerly or functionalised for `jax.jit`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from tpukit.errors import ArgumentError

_SIZE = re.compile(r"^(?:(\d+)|([a-z_]\w*?)(?:\+(\d+))?)$")


class Dims:
    """The named sizes of a call: the first array that has a name binds it, the others must agree.

    Example:
      >>> dims = Dims("gla")
      >>> dims.bind("q", q, "tokens qk_heads key_dim")
      >>> dims.bind("cu_seqlens", cu_seqlens, "requests+1")
      >>> dims["tokens"]
    """

    def __init__(self, where: str) -> None:
        """Starts with no names; `where` is the public function that checks."""
        self._where = where
        self._sizes: dict[str, int] = {}
        self._sources: dict[str, str] = {}

    def __getitem__(self, name: str) -> int:
        return self._sizes[name]

    def bind(self, argument: str, array: Any, names: str) -> None:
        """Checks the shape of `array` against names separated by spaces.

        Args:
          argument: the name of the argument.
          array: anything with a shape.
          names: for each dimension a name, a name plus a number ("requests+1"), a number, or "_"
            for any size.

        Raises:
          ArgumentError: it is no array, the rank is wrong, or a size is not what another argument
            made it.
        """
        wanted = names.split()
        check_array(self._where, argument, array)
        shape = tuple(array.shape)
        if len(shape) != len(wanted):
            count = f"{len(wanted)} dimension" + ("" if len(wanted) == 1 else "s")
            self._refuse(argument, shape, f"{count} ({', '.join(wanted)})")
        for axis, (size, text) in enumerate(zip(shape, wanted, strict=True)):
            if text != "_":
                self._bind_size(argument, shape, axis, size, text)

    def _bind_size(
        self, argument: str, shape: tuple[int, ...], axis: int, size: int, text: str
    ) -> None:
        match = _SIZE.match(text)
        if match is None:
            raise ValueError(f"a dimension cannot be called {text!r}")
        number, name, more = match[1], match[2], int(match[3] or 0)
        if number is not None:
            if size != int(number):
                self._refuse(argument, shape, f"{number} in dimension {axis}")
            return
        if name not in self._sizes:
            if size < more:
                self._refuse(argument, shape, f"at least {more} in dimension {axis} ({text})")
            self._sizes[name] = size - more
            self._sources[name] = argument
            return
        expected = self._sizes[name] + more
        if size != expected:
            source = f"{name} is {self._sizes[name]} by {self._sources[name]}"
            self._refuse(argument, shape, f"{expected} in dimension {axis} ({text}; {source})")

    def _refuse(self, argument: str, shape: tuple[int, ...], expected: str) -> None:
        raise ArgumentError(
            where=self._where, argument=argument, got=f"has shape {shape}", expected=expected
        )


def check_array(where: str, argument: str, array: Any) -> None:
    """Raises `ArgumentError` unless `array` has a shape and a dtype."""
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        got = "is None" if array is None else f"is a {type(array).__name__}"
        raise ArgumentError(where=where, argument=argument, got=got, expected="an array")


def check_type(where: str, argument: str, value: Any, kind: type, advice: str = "") -> None:
    """Raises `ArgumentError` unless `value` is a `kind`; a bool is no int."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ArgumentError(
            where=where,
            argument=argument,
            got="is None" if value is None else f"is a {type(value).__name__}",
            expected=f"a {kind.__name__}" if kind is not int else "an int",
            advice=advice,
        )


def check_dtype(where: str, argument: str, array: Any, allowed: Collection[Any]) -> None:
    """Raises `ArgumentError` unless the dtype of `array` is among `allowed`."""
    check_array(where, argument, array)
    names = [jnp.dtype(dtype).name for dtype in allowed]
    name = jnp.dtype(array.dtype).name
    if name not in names:
        raise ArgumentError(
            where=where,
            argument=argument,
            got=f"has dtype {name}",
            expected=_alternatives(names),
            advice=f"Cast it with {argument}.astype(jnp.{names[0]}).",
        )


def check_choice(where: str, argument: str, value: Any, choices: Collection[Any]) -> None:
    """Raises `ArgumentError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(
            where=where,
            argument=argument,
            got=f"is {value!r}",
            expected=_alternatives([repr(choice) for choice in choices]),
        )


def check_multiple(where: str, argument: str, value: int, of: int, advice: str = "") -> None:
    """Raises `ArgumentError` unless `value` is a multiple of `of`."""
    if value % of:
        raise ArgumentError(
            where=where,
            argument=argument,
            got=f"is {value}",
            expected=f"a multiple of {of}",
            advice=advice,
        )


def check_range(
    where: str, argument: str, value: float, low: float | None = None, high: float | None = None
) -> None:
    """Raises `ArgumentError` unless `low <= value <= high`; a bound that is None is absent."""
    # Written so that NaN is refused.
    inside = (low is None or value >= low) and (high is None or value <= high)
    if not inside:
        raise ArgumentError(
            where=where, argument=argument, got=f"is {value}", expected=_interval(low, high)
        )


@dataclasses.dataclass(frozen=True)
class Condition:
    """A rule about the values of an argument, applied.

    Attributes:
      argument: its name.
      values: the array.
      bad: bool, same shape: the elements that break the rule.
      expected: what every element needs.
    """

    argument: str
    values: Any
    bad: Any
    expected: str


def in_range(argument: str, values: Any, low: int, high: int) -> Condition:
    """The rule that every element is in `low <= element < high`."""
    bad = (values < low) | (values >= high)
    return Condition(argument, values, bad, f"{low} to {high - 1}")


def first_bad(bad: Any) -> tuple[int, ...] | None:
    """Returns the index of the first True element in row-major order, or None."""
    mask = np.asarray(bad)
    if not mask.any():
        return None
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))


def raise_if_bad(where: str, conditions: Iterable[Condition]) -> None:
    """Raises an `ArgumentError` that names the first bad element; works on concrete values only.

    Raises:
      ArgumentError: an element breaks its rule, or the values are not known because the call is
        being traced.
    """
    for condition in conditions:
        if isinstance(condition.values, Tracer) or isinstance(condition.bad, Tracer):
            raise ArgumentError(
                where=where,
                argument=condition.argument,
                got="is traced, so its values are unknown",
                expected="concrete values to validate",
                advice="Validate outside jax.jit, or use the checkify form inside it.",
            )
        index = first_bad(condition.bad)
        if index is not None:
            raise ArgumentError(
                where=where,
                argument=condition.argument,
                got=f"has {np.asarray(condition.values)[index]} at index {list(index)}",
                expected=condition.expected,
            )


def checkify_if_bad(where: str, conditions: Iterable[Condition]) -> None:
    """The same as `raise_if_bad` under `jax.experimental.checkify.checkify`; also under jit.

    The index it reports is that of the flattened array.
    """
    for condition in conditions:
        bad = jnp.ravel(condition.bad)
        if bad.size == 0:
            continue
        index = jnp.argmax(bad)
        checkify.check(
            ~jnp.any(bad),
            f"{where}: {condition.argument} has {{value}} at flat index {{index}}; "
            f"needs {condition.expected}.",
            value=jnp.ravel(condition.values)[index],
            index=index,
        )


def _alternatives(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _interval(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high}"
    return f"at least {low}" if high is None else f"{low} to {high}"
