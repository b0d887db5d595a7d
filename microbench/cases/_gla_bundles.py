"""Bundles that a batch takes in the gated-linear-attention kernel, counted in its final schedule.

The kernel walks through work items in one loop, whose body has, in this order, code for items that
open a request, that are skipped, for runs of one-token requests (with a loop over them), for chunks
(with a branch per window size), and for groups of rows that two items share. A region of the
schedule carries the guards it runs under, so the path of an item can be added up. The count is
static: it says how many bundles are issued, not how long memory takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gla.plan import Plan
from gla.schedule import ROWS
from tpukit.listing import Kernel, Loop, Region


def through(loop: Loop, region: Region) -> int:
    """Bundles of a pass in which `region` runs, and nothing else that is conditional."""
    paths = [region.guards[:depth] for depth in range(len(region.guards) + 1)]
    return sum(other.bundles for other in loop.regions if other.guards in paths)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk of a request: its rows in its window, and its place in the request."""

    begin: int
    rows: int
    first: bool

    @property
    def end(self) -> int:
        """One past its last row."""
        return self.begin + self.rows


def chunks(row: int, length: int, window: int) -> list[Chunk]:
    """How the kernel cuts a request of `length` tokens that starts at `row`."""
    found: list[Chunk] = []
    while length:
        rows = min(length, window - row % ROWS)
        found.append(Chunk(row % ROWS, rows, not found))
        row, length = row + rows, length - rows
    return found


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The kernel's final schedule, taken apart."""

    plan: Plan
    items: Loop
    tokens: Loop
    token: Region
    windows: dict[int, Region]
    nested: tuple[Loop, ...]

    @classmethod
    def of(cls, kernel: Kernel, plan: Plan) -> Schedule:
        """Finds the parts: chunks have the matrix products, runs the longest loop before them.

        Raises:
          ValueError: they are not what the kernel's source says.
        """
        busy = [(x, r) for x in kernel.loops for r in x.regions if r.ops.matmuls]
        busy.sort(key=lambda pair: pair[1].start)
        if len(busy) != len(plan.windows) or len({loop.path for loop, _ in busy}) != 1:
            raise ValueError(f"expected one branch per window of {plan.windows}, found {len(busy)}")
        items = busy[0][0]
        nested = tuple(x for x in kernel.loops if x.path.startswith(f"{items.path}/"))
        windows = dict(zip(plan.windows, (region for _, region in busy), strict=True))
        tokens = max((x for x in nested if x.end <= busy[0][1].start), key=lambda x: x.bundles)
        token = max(tokens.regions, key=lambda region: region.bundles)
        return cls(plan, items, tokens, token, windows, nested)

    def steady(self) -> int:
        """A whole window in the middle of a long request."""
        return through(self.items, self.windows[self.plan.window])

    def request(self) -> int:
        """A one-token request that resumes."""
        conditional = [r for r in self.tokens.regions if r.guards and r is not self.token]
        return through(self.tokens, self.token) + sum(r.bundles for r in conditional)

    def run(self) -> int:
        """An item of one-token requests, without the requests."""
        before = [r for r in self.items.regions if r.guards and r.start < self.tokens.start]
        return through(self.items, before[-1]) + self.join()

    def join(self) -> int:
        """Taking over the rows of a shared group: the last conditional part of an item."""
        return next(r.bundles for r in reversed(self.items.regions) if r.guards)

    def chunk(self, chunk: Chunk, resumes: bool) -> int:
        """One chunk of a request."""
        size = min(size for size in self.windows if size >= chunk.end)
        total = through(self.items, self.windows[size]) + self.join() * (chunk.begin > 0)
        if chunk.first:
            opening = next(r.guards for r in self.items.regions if r.guards)
            total += sum(r.bundles for r in self.items.regions if r.guards == opening)
            total += 0 if resumes else self.nested[0].bundles * self.plan.heads
        if chunk.begin or chunk.end < size:
            smallest = self.windows[min(self.windows)].start
            guarded = [r for r in self.items.regions if len(r.guards) > 1 and r.start < smallest]
            clear = [x for x in self.nested if x.start < smallest][-1]
            total += guarded[-1].bundles
            total += clear.bundles * (size // ROWS - chunk.end // ROWS)
        return total

    def batch(self, lengths: Sequence[int], resumes: Sequence[bool]) -> int:
        """All items of a batch, of one grid step."""
        total, row, run_at = 0, 0, -1
        for length, known in zip(lengths, resumes, strict=True):
            if length == 1:
                total += self.request() + self.run() * (run_at != row // ROWS)
                run_at = row // ROWS
            else:
                total += sum(self.chunk(c, known) for c in chunks(row, length, self.plan.window))
                run_at = -1
            row += length
        return total
