"""Where the kernel's data lies and how it moves. Knows nothing of what is computed.

n devices share the experts, E_l each; this one has T tokens. Rows of tokens and results are packed
words (see `rows`), so that single rows can be moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fused_moe.dispatch import LANES
from fused_moe.plan import buffers
from fused_moe.spec import ROWS, Plan, Problem
from reference.fused_moe import Weights
from tpukit.buffers import repeat

Ref = Any
LANE_BITS = LANES.bit_length() - 1
UNROLL = 4  # rows whose transfers are started together
IO_DEPTH = 4  # blocks of ROWS tokens or outputs on their way


class Operands(NamedTuple):
    """Arrays in HBM. Those that may be None are not there if rows travel in bulk (plan.bulk)."""

    own: Ref  # [own words] i32, see dispatch.Lists
    own_heads: Ref  # [n * head rows, 128] i32
    own_entries: Ref  # [entry rows, 128] i32
    tails: Ref  # [T, 128] i32
    tokens: Ref  # [T, hidden]
    weights: Weights  # [E_l, ...]; scales and biases [E_l, B, width]
    output: Ref  # [T, hidden]
    heads: Ref  # [n * head rows, 128] i32, from each device the head for this one
    entries: Ref  # [n * entry rows, 128] i32, from each device the rows for this one
    received: Ref  # [n * T, row words] u32; row s * T + t is token t of device s; in bulk [R, ...]
    returned: Ref  # [slots * T, row words] u32; row j * T + t is what slot j brought token t; in
    # bulk [R, hidden], the results of the rows in `received`
    partials: Ref  # [partials, hidden] f32, of tokens between two experts of this device


class Slices(NamedTuple):
    """A ring of slices of one projection; D = plan.depth."""

    weight: Ref  # [D, inputs, slice]
    scale: Ref | None  # [D, B, slice] f32
    bias: Ref | None  # [D, 1, slice] f32


class Books(NamedTuple):
    """Scalars; M = plan.tile. In bulk there are heads, visits and counts."""

    own: Ref  # [own words]
    heads: Ref  # [n * head rows, 128]
    windows: Ref  # [2, n * window rows, 128] the rows with the entries of a tile's expert
    visit_expert: Ref  # [visits]
    visit_row: Ref  # [visits] which of the expert's rows comes first
    partial_of: Ref  # [n * T] number of the token among those with several experts here
    codes: Ref  # [2, M] entries of a tile's rows
    places: Ref  # [2, M] where their partials are
    spans: Ref  # [2, 2 * n + 1] where a tile's rows of each device begin: alone; one of several
    counts: Ref  # [8], see below


# What Books.counts holds: rows that are leaving [2], visits in a pass, tokens with several experts
# here, rows on their way from and to the partials, and to the windows [2].
LEAVING, VISITS, REPEATED, LOADING, STORING, WINDOW = 0, 2, 3, 4, 5, 6


class Sems(NamedTuple):
    """DMA semaphores."""

    lists: Ref  # [4] own; sent; heads; entries
    load: Ref  # [IO_DEPTH] blocks of tokens, or of tails
    store: Ref  # [IO_DEPTH] blocks of packed tokens, or of outputs
    sent: Ref  # [1] rows sent away
    arrived: Ref  # [E_l] rows from other devices whose first expert here this is
    window: Ref  # [2] entries of a tile's expert
    gathered: Ref  # [2] rows of a tile
    gate_up: Ref  # [D]
    down: Ref  # [D]
    leaving: Ref  # [2] results on their way
    partial: Ref  # [2] partials stored; loaded
    home: Ref  # [1] results from other devices
    brought: Ref  # [pieces] blocks of results


class Scratch(NamedTuple):
    """On-chip memory. In bulk there are no io and tails."""

    io: Ref  # [IO_DEPTH, ROWS, hidden] tokens, outputs
    tails: Ref  # [IO_DEPTH, ROWS, 128] i32
    words: Ref  # [2, M, row words] u32, tokens of a tile as they travel
    x: Ref  # [M, hidden] and as they are multiplied
    factors: Ref  # [3, M, 128] f32: each row's scale, weight, and whether it has a partial
    gate: Slices
    up: Slices
    down: Slices
    h: Ref  # [M, inter] f32
    hq: Ref  # [M, inter] as it is multiplied
    h_scale: Ref  # [M, 128] f32
    y: Ref  # [M, hidden] f32
    out: Ref  # [2, M, returned words] u32, results as they travel; in bulk [2, M, hidden]
    books: Books
    sems: Sems

    @staticmethod
    def shapes(problem: Problem, plan: Plan) -> Scratch:
        """Shapes of the fields."""
        vmem = {name: pltpu.VMEM(*buffer) for name, buffer in buffers(problem, plan).items()}
        rows = problem.num_devices * problem.num_tokens
        layout, n = problem.layout, problem.num_devices

        def slices(name: str) -> Slices:
            found = [vmem.pop(name + part, None) for part in ("", "_scale", "_bias")]
            return Slices(*found)

        def words(*shape: int) -> Any:
            return pltpu.SMEM(shape, jnp.int32)

        def singly(*shape: int) -> Any:
            return None if plan.bulk else words(*shape)

        def sems(count: int) -> Any:
            return pltpu.SemaphoreType.DMA((count,))

        visits = plan.visits(problem)
        return Scratch(
            gate=slices("gate"),
            up=slices("up"),
            down=slices("down"),
            **{"io": None, "tails": None, **vmem},
            books=Books(
                own=singly(layout.own_words),
                heads=words(n * layout.head_rows, LANES),
                windows=singly(2, n * layout.window_rows, LANES),
                visit_expert=words(visits),
                visit_row=words(visits),
                partial_of=singly(rows),
                codes=singly(2, plan.tile),
                places=singly(2, plan.tile),
                spans=singly(2, 2 * problem.num_devices + 1),
                counts=words(8),
            ),
            sems=Sems(
                lists=sems(4),
                load=sems(IO_DEPTH),
                store=sems(IO_DEPTH),
                sent=sems(1),
                arrived=sems(problem.experts_here),
                window=sems(2),
                gathered=sems(2),
                gate_up=sems(plan.depth),
                down=sems(plan.depth),
                leaving=sems(2),
                partial=sems(2),
                home=sems(1),
                brought=sems(plan.pieces),
            ),
        )


@dataclasses.dataclass(frozen=True)
class Plumbing:
    """One device's part of the layer; `me` is its number among the devices."""

    problem: Problem
    plan: Plan
    me: Any
    hbm: Operands
    vmem: Scratch

    def peer(self, device: jax.Array) -> dict[str, jax.Array]:
        """The mesh coordinates of a device."""
        coordinates = {}
        for name, size in reversed(self.problem.axes):
            device, coordinates[name] = divide(device, size)
        return coordinates

    def send(self, source: Ref, target: Ref, sent: Ref, received: Ref, device: jax.Array) -> None:
        """Starts a copy into the memory of another device."""
        pltpu.make_async_remote_copy(
            source, target, sent, received, device_id=self.peer(device)
        ).start()

    def head(self, device: jax.Array, place: Any) -> jax.Array:
        """A word of the head that a device has sent."""
        first = device * self.problem.layout.head_rows
        return self.vmem.books.heads[first + (place >> LANE_BITS), place & (LANES - 1)]

    @staticmethod
    def span(first: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The rows of 128 words [begin, end) that hold words [first, end)."""
        begin = first >> LANE_BITS
        return begin, jnp.where(end > first, (end + LANES - 1) >> LANE_BITS, begin)

    def enter(self) -> None:
        """Waits until every device is in this kernel, so that its memory may be written."""
        barrier = pltpu.get_barrier_semaphore()
        others = self.problem.num_devices - 1

        def signal(i: jax.Array) -> None:
            pl.semaphore_signal(barrier, device_id=self.peer(self.other(i)))

        repeat(others, signal)
        pl.semaphore_wait(barrier, others)

    def other(self, i: jax.Array) -> jax.Array:
        """The i-th of the other devices, counted from this one on."""
        device = self.me + 1 + i
        n = self.problem.num_devices
        return jnp.where(device >= n, device - n, device)


def divide(value: Any, by: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of a number that is not negative."""
    if by & (by - 1):
        quotient = lax.div(jnp.int32(value), jnp.int32(by))
    else:
        quotient = jnp.int32(value) >> (by.bit_length() - 1)
    return quotient, value - quotient * by


def total(times: Any, of: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """of(0) + ... + of(times - 1), as a loop of the kernel."""
    unroll = 4 if isinstance(times, int) else 1
    return lax.fori_loop(0, times, lambda i, found: found + of(i), jnp.int32(0), unroll=unroll)


def each(begin: jax.Array, end: jax.Array, action: Callable[[jax.Array], None]) -> None:
    """action(begin), ..., action(end - 1), UNROLL at a time: the scalar core has long latencies."""
    whole = jnp.maximum(end - begin, 0) >> (UNROLL.bit_length() - 1)

    def several(i: jax.Array) -> None:
        for j in range(UNROLL):
            action(begin + i * UNROLL + j)

    repeat(whole, several)
    lax.fori_loop(begin + whole * UNROLL, end, lambda i, _: action(i), None)


def row(ref: Ref, index: Any) -> Ref:
    """One row of an array of rows."""
    return ref.at[pl.ds(index, 1)]


def rows(ref: Ref, start: Any, count: Any) -> Ref:
    """Rows of an array; start and count are multiples of ROWS."""
    return ref.at[pl.ds(pl.multiple_of(start, ROWS), count)]


def groups(count: jax.Array) -> jax.Array:
    """Groups of ROWS that hold `count` rows."""
    return (count + ROWS - 1) // ROWS


def wait_rows(array: Ref, semaphore: Ref, count: jax.Array) -> None:
    """Waits for copies of `count` rows like those of an array."""

    def wait(number: int) -> Callable[[jax.Array], None]:
        part = array.at[pl.ds(0, number)]
        return lambda _: pltpu.make_async_copy(part, part, semaphore).wait()

    most = min(ROWS, 1 << (array.shape[0].bit_length() - 1))
    whole, left = divide(count, most)
    repeat(whole, wait(most))
    if array.dtype.itemsize == 4:  # rows of narrower types move in whole groups
        repeat(left, wait(1))


def start(source: Ref, target: Ref, semaphore: Ref) -> None:
    """Starts a copy on this device."""
    pltpu.make_async_copy(source, target, semaphore).start()


def wait(target: Ref, semaphore: Ref) -> None:
    """Waits for a copy as large as target."""
    pltpu.make_async_copy(target, target, semaphore).wait()
