"""Memories, parts of them, and who touched what: the ground on which simulated kernels run."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu_sc as plsc

from tpukit import _private
from tpukit.sparsecore.faults import OutOfBoundsError, UnmodelledError

Box = tuple[tuple[int, int], ...]
_NOBODY, _MANY = -1, -2


class Shadow:
    """Who wrote and read each element of a memory that several cores see, and when by his clock."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.writer = np.full(shape, _NOBODY, np.int32)
        self.written_at = np.zeros(shape, np.int32)
        self.added = np.zeros(shape, bool)
        self.reader = np.full(shape, _NOBODY, np.int32)
        self.read_at = np.zeros(shape, np.int32)

    def unordered(self, index: Any, me: int, clock: np.ndarray, write: bool, add: bool) -> bool:
        """Whether `me`, who knows of others what `clock` says, races if he touches `index`."""

        def unknown(who: np.ndarray, when: np.ndarray) -> np.ndarray:
            return (who >= 0) & (who != me) & (when > clock[who])

        wrong = unknown(self.writer[index], self.written_at[index])
        if add:
            wrong = wrong & ~self.added[index]
        if write:
            wrong = wrong | unknown(self.reader[index], self.read_at[index])
        return bool(np.any(wrong))

    def record(self, index: Any, me: int, now: int, write: bool, add: bool) -> None:
        """Notes the touch."""
        if write:
            self.writer[index], self.written_at[index], self.added[index] = me, now, add
        else:
            self.reader[index], self.read_at[index] = me, now


class Iterations:
    """Which iteration of a parallel loop touched what."""

    def __init__(self) -> None:
        self.current = 0
        self._touched: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def conflict(self, region: Region, write: bool) -> bool:
        """Notes a touch of the current iteration; returns whether another one disturbs it."""
        buffer = region.buffer
        if id(buffer) not in self._touched:
            shape = buffer.data.shape
            fresh = np.full(shape, _NOBODY, np.int32), np.full(shape, _NOBODY, np.int32)
            self._touched[id(buffer)] = fresh
        writer, reader = self._touched[id(buffer)]
        index, me = region.base_index, self.current
        wrote, read = writer[index], reader[index]
        if ((wrote != _NOBODY) & (wrote != me)).any():
            return True
        others = (read != _NOBODY) & (read != me)
        if write:
            writer[index] = me
            return bool(others.any())
        reader[index] = np.where(others, _MANY, me)
        return False


class Buffer:
    """An array in some memory.

    Attributes:
      name, space: for messages; space is "hbm", "shared", "vmem", "smem" or "semaphore".
      data: its contents; of semaphores, an array of objects.
      shadow: where cores share it and some write it.
      written: which elements were written, of outputs only.
      flights: transfers that have not been awaited, as (region, transfer, writes, adds).
    """

    def __init__(self, name: str, space: str, data: np.ndarray, *, shared: bool = False) -> None:
        self.name = name
        self.space = space
        self.data = data
        self.shadow = Shadow(data.shape) if shared else None
        self.written: np.ndarray | None = None
        self.flights: list[tuple[Region, Any, bool, bool]] = []
        self._whole = Region(self, tuple(slice(0, n) for n in data.shape))

    def whole(self) -> Region:
        """All of it."""
        return self._whole


def garbage(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Fresh memory: NaN, -1, True."""
    kind = np.dtype(dtype)
    return np.full(math.prod(shape) * kind.itemsize, 255, np.uint8).view(kind).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Indirect:
    """Rows chosen by indices in memory.

    Attributes:
      values: an array, or the region that holds the indices.
      ignored: the index that means "no row", or None.
    """

    values: Any
    ignored: int | None

    @property
    def region(self) -> Region | None:
        """Where the indices are, if in memory."""
        return self.values if isinstance(self.values, Region) else None

    def rows(self) -> np.ndarray:
        """The indices now."""
        return np.asarray(self.values.read() if isinstance(self.values, Region) else self.values)


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a buffer.

    Attributes:
      buffer: of it.
      index: for each dimension an integer, a slice with bounds, or (first dimension) `Indirect`.
      dtype: what the buffer is seen as, None for what it is; rows are then packed into words or
        taken from them.
    """

    buffer: Buffer
    index: tuple[Any, ...]
    dtype: np.dtype | None = None

    @property
    def indirect(self) -> Indirect | None:
        """How its rows are chosen, if by indices."""
        first = self.index[0] if self.index else None
        return first if isinstance(first, Indirect) else None

    @property
    def _seen(self) -> np.ndarray:
        return self.buffer.data if self.dtype is None else as_words(self.buffer.data, self.dtype)

    @property
    def seen_shape(self) -> tuple[int, ...]:
        """The shape of the whole buffer, seen as `dtype`."""
        shape = list(self.buffer.data.shape)
        if self.dtype is not None:
            shape[-2] = shape[-2] * self.buffer.data.dtype.itemsize // self.dtype.itemsize
        return tuple(shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element as seen."""
        return (self.dtype or self.buffer.data.dtype).itemsize

    def read(self, rows: np.ndarray | None = None) -> np.ndarray:
        """A copy of the contents, of these rows where it is indirect."""
        index = self.index if rows is None else self._of_rows(rows)
        return np.array(self._seen[index])

    def write(
        self, value: np.ndarray, *, add: bool = False, rows: np.ndarray | None = None
    ) -> None:
        """Replaces the contents, or adds to them."""
        index = self.index if rows is None else self._of_rows(rows)
        target = self._seen
        if add and rows is not None:
            np.add.at(target, index, value)
        elif add:
            target[index] = target[index] + value
        else:
            target[index] = value
        if self.dtype is not None and not np.shares_memory(target, self.buffer.data):
            self.buffer.data[...] = as_words(target, self.buffer.data.dtype)

    def _of_rows(self, rows: np.ndarray) -> tuple[Any, ...]:
        """The index with its first dimension that is left replaced by rows."""
        axis = next(n for n, part in enumerate(self.index) if isinstance(part, slice | Indirect))
        return (*self.index[:axis], rows, *self.index[axis + 1 :])

    @property
    def base_index(self) -> tuple[Any, ...]:
        """The index in terms of the buffer itself; rows by indices as they are now."""
        index = list(self.index)
        if self.indirect is not None:
            rows = self.indirect.rows()
            index[0] = (
                rows if self.indirect.ignored is None else rows[rows != self.indirect.ignored]
            )
        if self.dtype is None or self.dtype.itemsize == self.buffer.data.dtype.itemsize:
            return tuple(index)
        ratio = self.dtype.itemsize / self.buffer.data.dtype.itemsize
        at = len(index) - 2
        if isinstance(index[at], slice):
            index[at] = slice(int(index[at].start * ratio), math.ceil(index[at].stop * ratio))
        elif isinstance(index[at], np.ndarray) and ratio > 1:
            index[at] = (index[at][:, None] * int(ratio) + np.arange(int(ratio))).ravel()
        else:
            first = int(index[at] * ratio)
            index[at] = slice(first, first + max(1, int(ratio)))
        return tuple(index)

    @property
    def box(self) -> Box:
        """Bounds in each dimension of the buffer."""
        return self._box if self.indirect is None else tuple(map(_bounds, self.base_index))

    @functools.cached_property
    def _box(self) -> Box:
        """`box` where no memory decides it, so that it stays the same."""
        return tuple(map(_bounds, self.base_index))

    def overlaps(self, other: Region) -> bool:
        """Whether some element is in both."""
        mine, yours = self.box, other.box
        if not all(a < d and c < b for (a, b), (c, d) in zip(mine, yours, strict=True)):
            return False
        first, second = (r.base_index[0] if r.index else 0 for r in (self, other))
        if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
            return bool(set(_elements(first)) & set(_elements(second)))
        return True

    def check_bounds(self, shape: tuple[int, ...]) -> None:
        """Raises unless all of it is inside `shape`; indices in memory are checked when used."""
        for axis, (part, size) in enumerate(zip(self.index, shape, strict=True)):
            if isinstance(part, Indirect):
                continue
            low, high = _bounds(part)
            if low < high and (low < 0 or high > size):
                what = f"{self.buffer.name} [{low}:{high}] in dimension {axis} of size {size}"
                raise OutOfBoundsError(what)

    def then(self, indexer: Any, core: Any) -> Region:
        """The part of this part that an indexer of JAX means; `core` resolves refs in it."""
        wanted = iter(indexer.indices)
        index: list[Any] = []
        for part in self.index:
            if isinstance(part, slice):
                index.append(_within(part, next(wanted), core))
            elif isinstance(part, Indirect):
                if not _is_all(next(wanted), indexer.shape[0]):
                    raise UnmodelledError("a ref is indexed again after rows were chosen")
                index.append(part)
            else:
                index.append(part)
        if any(isinstance(part, Indirect) for part in index[1:]):
            raise UnmodelledError("indices choose something other than rows")
        region = Region(self.buffer, tuple(index), self.dtype)
        region.check_bounds(self.seen_shape)
        return region


def as_words(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Consecutive rows packed into wider words, the first lowest, or taken from them."""
    old, new = data.dtype.itemsize, dtype.itemsize
    if old == new:
        return data.view(dtype)
    *lead, rows, columns = data.shape
    if old < new:
        grouped = data.reshape(*lead, rows * old // new, new // old, columns)
        return np.ascontiguousarray(np.swapaxes(grouped, -1, -2)).view(dtype)[..., 0]
    parts = np.ascontiguousarray(data)[..., None].view(dtype)
    return np.swapaxes(parts, -1, -2).reshape(*lead, rows * old // new, columns)


def _within(part: slice, wanted: Any, core: Any) -> Any:
    if isinstance(wanted, pl.Slice):
        start, step = part.start + int(wanted.start), wanted.stride
        return slice(start, start + (int(wanted.size) - 1) * step + 1, step)
    if isinstance(wanted, plsc.Indices):
        return Indirect(_in_memory(wanted.values, core), wanted.ignored_value)
    if isinstance(wanted, Buffer | _private.TransformedRef) or np.ndim(wanted):
        return Indirect(_in_memory(wanted, core), None)
    return part.start + int(wanted)


def _in_memory(values: Any, core: Any) -> Any:
    if isinstance(values, Buffer | _private.TransformedRef):
        return core.region(values)
    return np.asarray(values)


def _is_all(wanted: Any, size: int) -> bool:
    return isinstance(wanted, pl.Slice) and (wanted.start, wanted.size) == (0, size)


def _bounds(part: Any) -> tuple[int, int]:
    if isinstance(part, slice):
        return part.start, part.stop
    if isinstance(part, np.ndarray):
        return (int(part.min()), int(part.max()) + 1) if part.size else (0, 0)
    return int(part), int(part) + 1


def _elements(part: Any) -> Any:
    if isinstance(part, np.ndarray):
        return part.tolist()
    return range(*_bounds(part))
