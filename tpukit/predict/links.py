"""The links between chips: a grid or torus of chips, and what a message between two devices takes.

A message goes along x, then y, then z, the shorter way round where there is one. Each directed link
carries its messages one after another at its rate, in the order in which they reach it; the head of
a message moves on while its tail is still coming. The two devices of a chip share its links and
have a path of their own to each other.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from types import MappingProxyType

from tpukit.errors import UnsupportedError
from tpukit.predict.rates import Constant

Place = tuple[int, ...]  # x, y, z of a chip


@dataclasses.dataclass(frozen=True)
class LinkRates:
    """The constants of the links of one chip.

    Attributes:
      link: GB/s of one link, one way.
      hop: us that the head of a message takes over one link.
      beside: GB/s between the devices of one chip, one way.
    """

    link: Constant
    hop: Constant
    beside: Constant


_ROWS = "all-gather rows P1147 to P1151: two links reach 179 GB/s, what is left over is 2.2 us"
_HOP = Constant(0.3, "us", "derived", f"{_ROWS}, for two steps and their transfers")
_BESIDE = Constant(540.0, "GB/s", "vendor", "six times a link (MaxText documentation)")
LINK_RATES = MappingProxyType(
    {
        "tpu7x": LinkRates(Constant(90.0, "GB/s", "fitted", _ROWS), _HOP, _BESIDE),
        "v6e": LinkRates(Constant(90.0, "GB/s", "vendor", "data sheet"), _HOP, _BESIDE),
        "v5e": LinkRates(Constant(45.0, "GB/s", "vendor", "data sheet"), _HOP, _BESIDE),
    }
)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where devices are.

    Attributes:
      places: of the chip of each device, in the order of the mesh.
      wraps: for each dimension whether its ends are linked.
    """

    places: tuple[Place, ...]
    wraps: tuple[bool, ...]

    @property
    def sizes(self) -> Place:
        """Chips along each dimension."""
        return tuple(max(axis) + 1 for axis in zip(*self.places, strict=True))

    def route(self, source: int, target: int) -> Iterator[tuple[Place, int, int]]:
        """The links (chip, dimension, direction) that a message takes."""
        here, there = list(self.places[source]), self.places[target]
        for dimension, size in enumerate(self.sizes):
            ahead = (there[dimension] - here[dimension]) % size
            direction = 1 if there[dimension] > here[dimension] else -1
            if self.wraps[dimension] and size > 2:
                direction = 1 if 2 * ahead < size else -1
                if 2 * ahead == size:  # both ways are as short: half of the pairs take each
                    direction = 1 if sum(here) % 2 == 0 else -1
            while here[dimension] != there[dimension]:
                yield tuple(here), dimension, direction
                here[dimension] = (here[dimension] + direction) % size


class Links:
    """The links while messages are on them; times are in cycles."""

    def __init__(self, grid: Grid, rates: LinkRates, clock_ghz: float, speed: float = 1.0) -> None:
        self.grid = grid
        self.per_byte = clock_ghz / (rates.link.value * speed)
        self.beside_per_byte = clock_ghz / (rates.beside.value * speed)
        self.hop = rates.hop.value * 1e3 * clock_ghz / speed
        self.free: collections.defaultdict[object, float] = collections.defaultdict(float)
        self.busy: collections.defaultdict[object, float] = collections.defaultdict(float)
        self.routes: dict[tuple[int, int], tuple[tuple[Place, int, int], ...]] = {}

    def send(self, source: int, target: int, size: int, now: float) -> tuple[float, float]:
        """A message's way; returns when its tail has left, and when it has arrived."""
        pair = (source, target)
        if pair not in self.routes:
            self.routes[pair] = tuple(self.grid.route(source, target))
        if not self.routes[pair]:
            done = self._over(("beside", pair), now, size * self.beside_per_byte)
            return done, done
        head, left = now, 0.0
        for i, link in enumerate(self.routes[pair]):
            done = self._over(link, head, size * self.per_byte)
            left = done if i == 0 else left
            head = done - size * self.per_byte + self.hop
        return left, head + size * self.per_byte

    def _over(self, link: object, head: float, cycles: float) -> float:
        """One link; returns when the tail has gone over it."""
        done = max(head, self.free[link]) + cycles
        self.free[link] = done
        self.busy[link] += cycles
        return done


def link_rates(chip: str) -> LinkRates:
    """The constants of a chip.

    Raises:
      UnsupportedError: they are not known.
    """
    if chip not in LINK_RATES:
        raise UnsupportedError(
            where="predict_mesh",
            what="links between devices",
            place=chip,
            why="their constants are not known",
            advice=f"Use one of {', '.join(LINK_RATES)}.",
        )
    return LINK_RATES[chip]


def grid_of(devices: Sequence[object], wraps: bool) -> Grid:
    """Where the devices of a topology are; `wraps` links the ends of dimensions longer than two."""
    places = tuple(tuple(device.coords) for device in devices)  # type: ignore[attr-defined]
    return Grid(places, (wraps,) * len(places[0]))
