"""Operations on values, with numpy: name of the primitive to function of operands and params."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tpukit.sparsecore.faults import UnmodelledError

Rule = Callable[..., Any]


def _convert(x: Any, *, new_dtype: Any, **_: Any) -> np.ndarray:
    return np.asarray(x).astype(np.dtype(new_dtype))


def _broadcast(
    x: Any, *, shape: tuple[int, ...], broadcast_dimensions: tuple[int, ...], **_: Any
) -> np.ndarray:
    x = np.asarray(x)
    spread = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, x.shape, strict=True):
        spread[axis] = size
    out = np.empty(shape, x.dtype)  # quicker than a view, of what is as short as vectors
    out[...] = x.reshape(spread)
    return out


def _iota(*, dtype: Any, shape: tuple[int, ...], dimension: int, **_: Any) -> np.ndarray:
    spread = [1] * len(shape)
    spread[dimension] = shape[dimension]
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(spread), shape)


def _select(which: Any, *cases: Any, **_: Any) -> np.ndarray:
    return np.where(which, cases[1], cases[0]) if len(cases) == 2 else np.choose(which, cases)


def _slice(x: Any, *, start_indices: Any, limit_indices: Any, strides: Any) -> np.ndarray:
    steps = strides or (1,) * len(start_indices)
    return x[tuple(map(slice, start_indices, limit_indices, steps))]


def _dynamic_slice(x: Any, *start: Any, slice_sizes: Any, **_: Any) -> np.ndarray:
    begin = [
        min(max(int(s), 0), n - k) for s, n, k in zip(start, x.shape, slice_sizes, strict=True)
    ]
    return x[tuple(slice(s, s + k) for s, k in zip(begin, slice_sizes, strict=True))]


def _divide(x: Any, y: Any, **_: Any) -> np.ndarray:
    if np.issubdtype(np.asarray(x).dtype, np.integer):
        quotient = np.abs(x) // np.abs(y)
        return np.where((np.asarray(x) < 0) ^ (np.asarray(y) < 0), -quotient, quotient)
    return np.divide(x, y)


def _shift(left: bool, x: Any, by: Any) -> np.ndarray:
    x = np.asarray(x)
    bits = x.dtype.itemsize * 8
    unsigned = x.view(f"u{x.dtype.itemsize}")
    by = np.asarray(by).astype(unsigned.dtype)
    moved = np.left_shift(unsigned, by) if left else np.right_shift(unsigned, by)
    return np.where(by < bits, moved, 0).astype(unsigned.dtype).view(x.dtype)


def _bitcast(x: Any, *, ty: Any, dim: int) -> np.ndarray:
    if x.dtype.itemsize == np.dtype(ty).itemsize:
        return x.view(ty)
    moved = np.ascontiguousarray(np.moveaxis(np.asarray(x), dim, -1)).view(np.dtype(ty))
    return np.moveaxis(moved, -1, dim)


def _bitcast_convert(x: Any, *, new_dtype: Any) -> np.ndarray:
    return np.asarray(x).view(np.dtype(new_dtype))


def _reduce(function: Rule, x: Any, *, axes: Any, **_: Any) -> np.ndarray:
    return np.asarray(function(x, axis=tuple(axes)), dtype=np.asarray(x).dtype)


def _cumulate(function: Rule, x: Any, *, axis: int, reverse: bool) -> np.ndarray:
    x = np.flip(x, axis) if reverse else x
    out = function(x, axis=axis, dtype=x.dtype)
    return np.flip(out, axis) if reverse else out


def _masked_cumulate(function: Rule, neutral: Rule, x: Any, mask: Any) -> np.ndarray:
    return function(np.where(mask, x, neutral(x.dtype)), dtype=x.dtype)


def _lowest(dtype: Any) -> Any:
    return -np.inf if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    return np.inf if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).max


def _pack(a: Any, b: Any, *, format: Any, preferred_element_type: Any) -> np.ndarray:
    narrow = {"float32": "bfloat16", "int32": "int16"}
    kind = np.dtype(preferred_element_type or narrow[np.dtype(a.dtype).name])
    both = np.stack([a, b], axis=-1).astype(kind)
    return both.reshape(-1) if format.name == "INTERLEAVED" else both


def _unpack(ab: Any, *, format: Any, preferred_element_type: Any) -> list[np.ndarray]:
    wide = {"bfloat16": "float32", "int16": "int32"}
    kind = np.dtype(preferred_element_type or wide[np.dtype(ab.dtype).name])
    del format  # the elements of a pair are neighbours in either
    pairs = ab.reshape(-1, 2).astype(kind)
    return [pairs[:, 0], pairs[:, 1]]


def _sort(*operands: Any, dimension: int, is_stable: bool, num_keys: int) -> list[np.ndarray]:
    del is_stable
    order = np.lexsort([np.moveaxis(k, dimension, -1) for k in reversed(operands[:num_keys])])
    return [np.take_along_axis(x, np.moveaxis(order, -1, dimension), dimension) for x in operands]


def _masked_sort(keys: Any, values: Any, *masks: Any, descending: bool) -> list[np.ndarray]:
    mask = masks[0] if masks else np.ones(keys.shape, bool)
    ranks = np.argsort(np.argsort(keys, kind="stable"), kind="stable")
    order = np.lexsort([-ranks if descending else ranks, ~mask])
    return [x[order] for x in (keys, values, *masks)]


def _scan_count(x: Any, mask: Any) -> list[np.ndarray]:
    same = (x[:, None] == x[None, :]) & mask[:, None] & mask[None, :]
    return [np.tril(same).sum(1).astype(np.int32), mask & ~np.triu(same, 1).any(1)]


def _concatenate(*parts: Any, dimension: int) -> np.ndarray:
    return np.concatenate(parts, axis=dimension)


def _clamp(low: Any, x: Any, high: Any) -> np.ndarray:
    return np.minimum(np.maximum(x, low), high)


def _power(x: Any, *, y: int) -> np.ndarray:
    return np.asarray(x) ** np.asarray(x).dtype.type(y)


def _plain(function: Rule) -> Rule:
    return lambda *operands, **_: function(*operands)


_DIRECT = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative,
    "max": np.maximum, "min": np.minimum, "rem": np.fmod, "abs": np.abs, "sign": np.sign,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "tanh": np.tanh,
    "floor": np.floor, "ceil": np.ceil, "is_finite": np.isfinite,
    "shift_right_arithmetic": np.right_shift,
    "population_count": lambda x: np.bitwise_count(x.view(f"u{x.dtype.itemsize}")).astype(x.dtype),
    "stop_gradient": lambda x: x, "copy": lambda x: x, "reshard": lambda x: x,
    "optimization_barrier": lambda *x: list(x),
}  # fmt: skip

RULES: Mapping[str, Rule] = {name: _plain(function) for name, function in _DIRECT.items()} | {
    "convert_element_type": _convert,
    "broadcast_in_dim": _broadcast,
    "broadcast_to": lambda x, *, shape, **_: np.broadcast_to(x, shape),
    "reshape": lambda x, *, new_sizes, **_: np.reshape(x, new_sizes),
    "squeeze": lambda x, *, dimensions: np.squeeze(x, axis=tuple(dimensions)),
    "expand_dims": lambda x, *, dimensions: np.expand_dims(x, tuple(dimensions)),
    "transpose": lambda x, *, permutation: np.transpose(x, permutation),
    "rev": lambda x, *, dimensions: np.flip(x, tuple(dimensions)),
    "concatenate": _concatenate,
    "iota": _iota,
    "select_n": _select,
    "clamp": _plain(_clamp),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "div": _divide,
    "integer_pow": _power,
    "shift_left": lambda x, by: _shift(True, x, by),
    "shift_right_logical": lambda x, by: _shift(False, x, by),
    "bitcast": _bitcast,
    "bitcast_convert_type": _bitcast_convert,
    "reduce_sum": lambda x, **params: _reduce(np.sum, x, **params),
    "reduce_max": lambda x, **params: _reduce(np.max, x, **params),
    "reduce_min": lambda x, **params: _reduce(np.min, x, **params),
    "reduce_and": lambda x, **params: _reduce(np.all, x, **params),
    "reduce_or": lambda x, **params: _reduce(np.any, x, **params),
    "cumsum": lambda x, **params: _cumulate(np.cumsum, x, **params),
    "masked_cumsum": lambda x, mask: _masked_cumulate(np.cumsum, lambda _: 0, x, mask),
    "masked_cummax": lambda x, mask: _masked_cumulate(np.maximum.accumulate, _lowest, x, mask),
    "masked_cummin": lambda x, mask: _masked_cumulate(np.minimum.accumulate, _highest, x, mask),
    "all_reduce_population_count": lambda x, *, reduce: (
        x.reshape(-1, reduce).sum(1).astype(np.int32)
    ),
    "all_reduce_ffs": lambda x, *, reduce: np.where(
        x.reshape(-1, reduce).any(1), x.reshape(-1, reduce).argmax(1), reduce
    ).astype(np.int32),
    "pack": _pack,
    "unpack": _unpack,
    "sort": _sort,
    "masked_sort": _masked_sort,
    "scan_count": _scan_count,
    "multiple_of": lambda x, **_: x,
    "pvary": lambda *x, **_: list(x),
    "square": lambda x: x * x,
    "rsqrt": lambda x, **_: 1 / np.sqrt(x),
}


def rule_of(name: str, params: Mapping[str, Any]) -> Rule | None:
    """What computes a primitive with these parameters from its operands, or None."""
    if name in _DIRECT:
        return _DIRECT[name]
    return functools.partial(RULES[name], **params) if name in RULES else None


def evaluate(
    name: str, operands: list[Any], params: Mapping[str, Any], avals: list[Any]
) -> list[Any]:
    """The results of a primitive, with the shapes and types that JAX gave them.

    Raises:
      UnmodelledError: there is no rule for it.
    """
    rule = rule_of(name, params)
    if rule is None:
        raise UnmodelledError(f"the primitive {name!r} has no rule")
    return fitted(name, rule(*operands), [(aval.shape, aval.dtype) for aval in avals])


def fitted(name: str, results: Any, wanted: Sequence[tuple[tuple[int, ...], Any]]) -> list[Any]:
    """Results of a rule with these shapes and types.

    Raises:
      UnmodelledError: they are of another size.
    """
    out = []
    for result, (shape, dtype) in zip(
        results if isinstance(results, list) else [results], wanted, strict=True
    ):
        if type(result) is np.ndarray and result.shape == shape and result.dtype == dtype:
            out.append(result)
            continue
        if math.prod(np.shape(result)) != math.prod(shape):
            raise UnmodelledError(f"{name!r} gave shape {np.shape(result)}, not {shape}")
        out.append(np.asarray(result, dtype=dtype).reshape(shape))
    return out
