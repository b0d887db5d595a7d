"""What steers the two kernels that the compiler brings for `lax.ragged_dot`.

One makes of the sizes of the groups a list of visits, a tile of rows with a group that has rows in
it; the other goes through that list. Both are in libtpu, not in the program that was traced, so the
list is made here once more, as the first kernel makes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tpukit.errors import ListingError
from tpukit.predict.hlo import Op
from tpukit.predict.scalars import RAGGED_DOT, KernelCall

_LISTS, _VISITS = f"{RAGGED_DOT}-metadata", f"{RAGGED_DOT}-none"


def is_ragged_dot(op: Op) -> bool:
    """Whether an operation is one of the two."""
    return op.name.startswith((_LISTS, _VISITS))


def steered(op: Op, calls: Sequence[KernelCall]) -> KernelCall:
    """The operands of one of the two kernels.

    Args:
      op: the kernel.
      calls: of the traced program.

    Raises:
      ListingError: the program has ragged dots of as many groups whose sizes differ, and the
        compiler does not say whose this is.
    """
    lists = op.name.startswith(_LISTS)
    groups = op.operands[0].dims[0] if lists else op.operands[1].dims[0] - 1
    sizes = _sizes(op, groups, calls)
    if lists:
        return KernelCall(op.name, (lambda: sizes,))
    if sizes is None:
        return KernelCall(op.name, (lambda: None,) * len(op.operands))
    rows, longest = op.operands[5].dims[0], op.operands[2].dims[0]
    offsets, visited, tiles, count = visits(sizes, rows, longest)
    arrays = (None,) * len(op.operands[5:])
    values = count, offsets, visited, tiles, count, *arrays
    return KernelCall(op.name, tuple((lambda value=value: value) for value in values))


def _sizes(op: Op, groups: int, calls: Sequence[KernelCall]) -> np.ndarray | None:
    values = [call.operands[2]() for call in calls if call.name == RAGGED_DOT]
    known = [np.asarray(value, np.int32) for value in values if value is not None]
    if len(known) < len(values):
        return None
    of = [one for one in known if len(one) == groups]
    if not of or any((one != of[0]).any() for one in of):
        what = (
            f"kernel {op.name}: sizes of {len(of)} ragged dots of {groups} groups, not all the same"
        )
        raise ListingError(file="program", line=0, what=what)
    return of[0]


def visits(sizes: np.ndarray, rows: int, longest: int) -> tuple[np.ndarray, ...]:
    """The list that the kernel goes through.

    Args:
      sizes: [G] rows of each group.
      rows: of all groups, a multiple of the tile's.
      longest: visits that there is room for: one a tile, and one more for each group but one.

    Returns:
      [G + 1] the first row of each group, [longest] the group and [longest] the tile of each visit,
      and [1] their number.
    """
    groups = len(sizes)
    tiles = longest - groups + 1
    tile = rows // tiles
    ends = np.cumsum(sizes)
    first, last = (ends - sizes) // tile, -(-ends // tile)
    count = np.where(sizes > 0, last - first, 0)
    group = np.repeat(np.arange(groups), count)
    place = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count) + first[group]
    room = 0, longest - len(group)
    padded = np.pad(group, room, constant_values=groups - 1)
    placed = np.pad(place, room, constant_values=tiles - 1)
    found = np.append(0, ends), padded, placed, np.array([len(group)])
    return tuple(one.astype(np.int32) for one in found)
