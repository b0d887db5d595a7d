"""The weights' way in: slices of the projections stream through rings, across tiles and experts.

Tiles are visited in order, those of the shared expert first. A visit takes all slices of gate and
up, then all slices of down. Slices are numbered through all visits, so that the next visit's first
slices arrive while this one computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fused_moe.plumbing import Plumbing, Ref, Slices, divide
from fused_moe.spec import ExpertShape
from reference.fused_moe import Weights
from tpukit.buffers import Index, Stream


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of some consecutive visits.

    Attributes:
      weights: theirs, in HBM.
      shape: what they are like.
      first: the first of their visits.
      end: one past the last.
      first_up, first_down: number of the first slice of gate and up, and of down.
      expert: which expert a visit is to.
      rows: the first of a visit's received rows, and how many, where those are consecutive.
    """

    weights: Weights
    shape: ExpertShape
    first: int
    end: Callable[[], Any]
    first_up: int
    first_down: int
    expert: Callable[[jax.Array], Any]
    rows: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Rings(Plumbing):
    """The rings of slices."""

    def ups(self, experts: Experts) -> int:
        """Slices of gate and up of a visit."""
        return experts.shape.inter // self.plan.inter_slice

    @property
    def downs(self) -> int:
        """Slices of down of a visit."""
        return self.problem.hidden // self.plan.hidden_slice

    def numbers(self, experts: Experts, names: tuple[str, ...]) -> tuple[int, int]:
        """The number of the first slice of these projections, and how many a visit has."""
        if names == ("down",):
            return experts.first_down, self.downs
        return experts.first_up, self.ups(experts)

    def stream(self, experts: Experts, names: tuple[str, ...]) -> Stream:
        """The slices of these projections, numbered through all visits."""
        down = names == ("down",)
        first, count = self.numbers(experts, names)
        width = self.plan.hidden_slice if down else self.plan.inter_slice
        sems = self.vmem.sems.down if down else self.vmem.sems.gate_up

        def copies(index: Index, slot: jax.Array) -> list[Any]:
            visit, part = divide(index - first, count)
            expert = experts.expert(visit + experts.first)
            columns = pl.ds(pl.multiple_of(part * width, width), width)
            return [
                pltpu.make_async_copy(
                    source.at[expert, :, columns],
                    target.at[slot, pl.ds(0, source.shape[1])],
                    sems.at[slot],
                )
                for name in names
                for source, target in self.pairs(experts.weights, name)
            ]

        def exists(index: Index) -> jax.Array:
            end = first + (experts.end() - experts.first) * count
            return (index >= first) & (index < end)

        return Stream(copies, self.plan.depth, exists)

    def pairs(self, weights: Weights, name: str) -> list[tuple[Ref, Ref]]:
        """Arrays of a projection in HBM with their rings in VMEM."""
        ring: Slices = getattr(self.vmem, name)
        sources = [getattr(weights, name + part) for part in ("", "_scale", "_bias")]
        return [(s, t) for s, t in zip(sources, ring, strict=True) if s is not None]
