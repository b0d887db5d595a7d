"""Trees of drafts inside the kernel: who descends from whom, and the decay on the way.

A word of each draft has a bit for every draft of its request that it descends from. With b_i the
sum of log decays over draft i and its ancestors, the decay from draft j to a descendant i is
e^(b_i - b_j), and from the state to i it is e^(b_i): the chunk form, with ancestors in place of
everything before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from gla.chunk import NN, Decays, matmul
from gla.plan import Plan
from gla.tables import LANES, iota

Ref = Any


class Tree(NamedTuple):
    """Words of ancestors and what is made of them; P = plan.inputs, h = plan.heads, V rows."""

    words: Ref  # [P, V, LANES] i32, as fetched
    seen: Ref  # [V, V] f32, scale where row i is row j or descends from it, else 0
    sums: Ref  # [V, h] f32, sum of the log decays of a row and its ancestors
    columns: Ref  # [h, V] the same, transposed

    @staticmethod
    def shapes(plan: Plan) -> Tree:
        """Shapes of the fields."""
        rows, heads = plan.draft_windows[-1], plan.heads
        return Tree(
            pltpu.VMEM((plan.inputs, rows, LANES), jnp.int32),
            pltpu.VMEM((rows, rows), jnp.float32),
            pltpu.VMEM((rows, heads), jnp.float32),
            pltpu.VMEM((heads, rows), jnp.float32),
        )

    def open(self, words: jax.Array, begin: jax.Array, steps: jax.Array, scale: float) -> None:
        """Prepares an item.

        Args:
          words: [size, LANES] of the item's window.
          begin: its first row.
          steps: [size or 1, h] log decays of the window's rows, 0 outside the item; or of any row.
          scale: of the output.
        """
        size = words.shape[0]
        row, column = iota((size, size), 0), iota((size, size), 1)
        draft = column - begin
        word = jnp.where(draft < 32, words[:, 0:1], words[:, 1:2])
        bit = lax.shift_right_logical(word, draft & 31) & 1
        ancestor = (bit == 1) & (draft >= 0) & (column < row)
        path = jnp.where(ancestor | (column == row), 1.0, 0.0)
        if steps.shape[0] == 1:
            sums = jnp.sum(path, axis=1, keepdims=True) * steps
        else:
            sums = matmul(path, steps, NN)
        self.seen[:size, :size] = scale * path
        self.sums[:size] = sums
        self.columns[:, :size] = sums.T

    def decays(self, h: int, size: int, scale: float) -> Decays:
        """Factors of head h over a window of `size` rows; a state after it there is none."""
        upto = self.sums[:size, h : h + 1]
        distance = jnp.minimum(upto - self.columns[h : h + 1, :size], 0.0)
        none = jnp.zeros((1, 1), jnp.float32)
        return Decays(
            within=self.seen[:size, :size] * jnp.exp(distance),
            since=scale * jnp.exp(upto),
            until=none,
            whole=none,
        )
