"""Another kernel for float32 rows without weights: the streams add them up on their way.

No vector arithmetic touches a row: the sums of as many tokens as a vector has lanes are cleared,
then the first rows of all of them are gathered and added in one stream, then the second ones, ...
The order of the sum is that of k, not that of the tree, so that no cost model chooses this: the
bits of a token would depend on how many others there are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from gather_reduce.kernel import NO_ROW, Walk
from gather_reduce.plan import SLOTS


@dataclasses.dataclass(frozen=True)
class AdderWalk(Walk):
    """A walk whose steps come in as many at a time as there are buffers, one stream each."""

    def walk(self, first: jax.Array, count: jax.Array) -> None:
        """The steps of a window."""

        @pl.loop(0, count, step=SLOTS)
        def _(begin: jax.Array) -> None:
            steps = [begin + n for n in range(SLOTS)]

            def each(action: Any) -> None:
                for step in steps:
                    pl.when(step < count)(lambda step=step: action(step))

            each(lambda step: self.clear(first, step))

            @pl.loop(0, self.problem.top_k)
            def _(k: jax.Array) -> None:
                each(lambda step: self.add_copy(step, k).start(add=True))
                each(lambda step: self.add_copy(step, k).wait())

            each(lambda step: self.send(first, step))

        @pl.loop(jnp.maximum(count - SLOTS, 0), count)
        def _(step: jax.Array) -> None:
            self.wait_sums(first, step)

        for copy in self.out_copies(first, jnp.int32(0)):
            copy.wait_write()

    def clear(self, first: jax.Array, step: jax.Array) -> None:
        """Zeros for sums that have left."""
        pl.when(step >= SLOTS)(lambda: self.wait_sums(first, step - SLOTS))
        slot = self.place(step)[2]
        zeros = jnp.zeros(self.work.lanes, jnp.float32)

        @plsc.parallel_loop(0, self.plan.chunk, self.work.lanes)
        def _(at: jax.Array) -> None:
            for row in range(self.problem.out_rows):
                self.refs.sums[slot, 0, row, pl.ds(at, self.work.lanes)] = zeros

    def add_copy(self, step: jax.Array, k: jax.Array) -> Any:
        """The stream that adds row k of each token of a step."""
        group, word, slot = self.place(step)
        tokens = group * self.problem.group + lax.iota(jnp.int32, self.work.lanes)
        ids = plsc.load_gather(self.refs.ids, [tokens * self.problem.top_k + k])
        chosen = plsc.Indices(ids, ignored_value=NO_ROW)
        return pltpu.make_async_copy(
            self.refs.x.at[chosen, pl.ds(word, self.plan.chunk)],
            self.refs.sums.at[slot, 0],
            self.refs.arrived.at[slot],
        )

    def send(self, first: jax.Array, step: jax.Array) -> None:
        """Starts to take the sums of a step to HBM."""
        for copy in self.out_copies(first, step):
            copy.start()
