"""Block sizes for a problem, better ones first; the first that fits is taken."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import jax.numpy as jnp

from fused_moe.dispatch import LANES, round_up
from fused_moe.spec import ROWS, Plan, Problem

PARTIALS_BYTES = 64_000_000

# Columns of gate and up, columns of down, buffers of each: the first that fits. Deep rings keep HBM
# busy while rows are being gathered and sent. Tiles of up to SMALL rows wait for their weights, for
# less time at either end if slices are short, so for them the first of these is left out.
SMALL = 2 * ROWS
SLICES = (
    (512, 1024, 4),
    (256, 1024, 4),
    (512, 1024, 2),
    (256, 1024, 2),
    (256, 512, 2),
    (128, 512, 2),
    (128, 256, 2),
)
# In bulk nothing but weights keeps a tile waiting: two long slices of each are enough. Most bytes
# of one, the first that fits; columns that fill a matrix unit of 256 before others.
SLICE_BYTES = (2**22, 2**21, 2**20, 2**19)
MXU_COLUMNS = 256


def divisors(width: int, most: int) -> list[int]:
    """Multiples of 128 that divide a width, from `most` down."""
    return [d for d in range(most - most % LANES, 0, -LANES) if width % d == 0]


def expected_partials(problem: Problem) -> int:
    """Partials for twice the tokens that have several experts on one device, if routing is even.

    At least as many as PARTIALS_BYTES hold: routers prefer groups of experts.
    """
    rows, k = problem.num_devices * problem.num_tokens, problem.top_k
    here = 1 / problem.num_devices
    several = 1 - (1 - here) ** k - k * here * (1 - here) ** (k - 1)
    cheap = PARTIALS_BYTES // (4 * problem.hidden)
    return min(rows, round_up(max(int(2 * rows * several) + 256, cheap), ROWS))


def even_tile(rows: float, deviations: float) -> int:
    """Rows of a tile such that most experts need as many tiles as the mean one, of some 288.

    Args:
      rows: of the mean expert.
      deviations: of Poisson's distribution that are still to fit.
    """
    most = rows + deviations * math.sqrt(rows)
    return max(round_up(math.ceil(most / math.ceil(rows / 256)), ROWS), 2 * ROWS)


def tiles_of(problem: Problem, deviations: float) -> list[int]:
    """Tiles for an expert's expected rows, the largest first."""
    rows = problem.num_devices * problem.num_tokens * problem.top_k / problem.num_experts
    best = even_tile(rows, deviations)
    return sorted({min(best, most) for most in (512, 256, 128, 64)}, reverse=True)


def common_inter(problem: Problem) -> int:
    """What slices of gate and up have to divide."""
    return functools.reduce(math.gcd, [shape.inter for shape in problem.shapes])


def candidates(problem: Problem) -> Iterator[Plan]:
    """Plans that move rows one by one, better ones first."""
    for tile in tiles_of(problem, 2.8):  # all but 0.3 % of experts fit
        for up, down, depth in SLICES[1:] if tile <= SMALL else SLICES:
            yield Plan(
                tile=tile,
                inter_slice=divisors(common_inter(problem), up)[0],
                hidden_slice=divisors(problem.hidden, down)[0],
                depth=depth,
                partials=expected_partials(problem),
            )


def bulk_candidates(problem: Problem) -> list[Plan]:
    """The same in bulk: those first whose slices fill a matrix unit."""
    size = jnp.dtype(problem.weight_dtype).itemsize

    def columns(width: int, inputs: int, most: int) -> int:
        found = divisors(width, max(most // (inputs * size), LANES))
        return next((d for d in found if d % MXU_COLUMNS == 0), found[0])

    widest = max(shape.inter for shape in problem.shapes)
    found = [
        Plan(
            tile=tile,
            inter_slice=columns(common_inter(problem), problem.hidden, most),
            hidden_slice=columns(problem.hidden, widest, most),
            partials=expected_partials(problem),  # if a caller takes the plan with bulk=0
            bulk=1,
        )
        for tile in tiles_of(problem, 2.0)  # a second tile for a few costs less than rows of all
        for most in SLICE_BYTES
    ]
    return sorted(found, key=lambda plan: plan.inter_slice < MXU_COLUMNS)
