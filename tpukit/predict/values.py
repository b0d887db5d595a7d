"""Scalar values of a replay: 32-bit unsigned integers, predicates, and the unknown.

What a kernel computes from vector data is unknown here. It may be carried about, but control, sizes
and addresses must never depend on it: `Unpredictable` is raised where they do.
"""

from __future__ import annotations

from typing import Any

MASK = 0xFFFFFFFF
SIGN = 0x80000000


class Unpredictable(Exception):
    """Control, a size or an address depends on a value that the replay does not have."""


class Unknown:
    """The value that is not known; every operation on it gives itself."""

    def _same(self, *_: Any) -> Unknown:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _same
    __xor__ = __rxor__ = _same
    __lt__ = __le__ = __gt__ = __ge__ = _same

    def __and__(self, other: Any) -> Any:
        return self if other is self or other else other

    def __or__(self, other: Any) -> Any:
        return True if other is True else self

    __rand__, __ror__ = __and__, __or__

    def __eq__(self, other: object) -> Any:
        return self

    def __ne__(self, other: object) -> Any:
        return self

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise Unpredictable("control depends on data that only the vector units have")

    def __repr__(self) -> str:
        return "unknown"


UNKNOWN = Unknown()


def known(value: Any, what: str) -> int:
    """Returns `value`, which must be known.

    Raises:
      Unpredictable: it is not.
    """
    if value is UNKNOWN:
        raise Unpredictable(f"{what} depends on data that only the vector units have")
    return value


def signed(value: int) -> int:
    """The value of 32 bits as a two's complement number."""
    return (value ^ SIGN) - SIGN


def shift_left(value: Any, by: Any) -> Any:
    """Logical shift; all bits are lost from 32 on."""
    if value is UNKNOWN or by is UNKNOWN:
        return UNKNOWN
    return value << by & MASK if by < 32 else 0


def shift_left_ones(value: Any, by: Any) -> Any:
    """The same with ones from the right: of 0, a mask of the lowest `by` bits."""
    if value is UNKNOWN or by is UNKNOWN:
        return UNKNOWN
    return shift_left(value, by) | (1 << min(by, 32)) - 1


def shift_right(value: Any, by: Any, width: int = 32) -> Any:
    """Logical shift; all bits are lost from `width` on."""
    if value is UNKNOWN or by is UNKNOWN:
        return UNKNOWN
    return value >> by if by < width else 0


def shift_signed(value: Any, by: Any) -> Any:
    """Arithmetic shift."""
    if value is UNKNOWN or by is UNKNOWN:
        return UNKNOWN
    return signed(value) >> min(by, 31) & MASK


def select(predicate: Any, yes: Any, no: Any) -> Any:
    """`yes` where the predicate holds, else `no`."""
    if predicate is UNKNOWN:
        return UNKNOWN
    return yes if predicate else no


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two unsigned values."""
    return UNKNOWN if a is UNKNOWN or b is UNKNOWN else min(a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two unsigned values."""
    return UNKNOWN if a is UNKNOWN or b is UNKNOWN else max(a, b)


def signed_minimum(a: Any, b: Any) -> Any:
    """The smaller of two signed values."""
    return UNKNOWN if a is UNKNOWN or b is UNKNOWN else min(a, b, key=signed)


def signed_maximum(a: Any, b: Any) -> Any:
    """The larger of two signed values."""
    return UNKNOWN if a is UNKNOWN or b is UNKNOWN else max(a, b, key=signed)


def leading_zeros(value: Any) -> Any:
    """Zero bits above the highest one of 32."""
    return UNKNOWN if value is UNKNOWN else 32 - value.bit_length()


def divide(a: Any, b: Any, remainder: bool, of_signed: bool) -> Any:
    """Quotient or remainder of two values, rounded toward zero.

    Raises:
      Unpredictable: the divisor is 0.
    """
    if a is UNKNOWN or b is UNKNOWN:
        return UNKNOWN
    if b == 0:
        raise Unpredictable("a division by 0")
    x, y = (signed(a), signed(b)) if of_signed else (a, b)
    quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
    return (x - quotient * y if remainder else quotient) & MASK
