"""The static problem, the block sizes, and the VMEM they take."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from gla.schedule import Limits


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything about a call that is known when it is traced.

    Attributes:
      num_tokens: rows of the batch, a multiple of ROWS.
      num_requests: requests, empty ones included.
      num_slots: slots of the state pool.
      qk_heads, heads: query/key heads and value heads.
      key_dim, value_dim: width of a head of q and k, and of v.
      dtype: of q, k, v and the output.
      state_dtype: of the state pool.
      per_token: the decay is a scalar per token and head, not a constant per head.
      batch_invariant: no bit of a request's result may depend on the rest of the batch.
    """

    num_tokens: int
    num_requests: int
    num_slots: int
    qk_heads: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: jnp.dtype
    state_dtype: jnp.dtype
    per_token: bool
    batch_invariant: bool

    def limits(self, plan: "Plan") -> Limits:
        """What the schedule depends on."""
        return Limits(self.num_tokens, self.num_slots, plan.window, self.batch_invariant)

    @property
    def group(self) -> int:
        """Value heads that share one query/key head."""
        return self.heads // self.qk_heads


@dataclasses.dataclass(frozen=True)
class Plan:
    """Block sizes of the kernel.

    Attributes:
      window: most rows that are computed at once.
      heads: value heads of one grid step, unrolled in the kernel's body.
      interleave: heads whose stages are interleaved to keep the matrix units fed.
      inputs: buffers of q, k, v windows, a power of two; all but one are being fetched ahead.
      states: buffers of states, a power of two.
      lookahead: states fetched ahead; the other buffers but one are being written back.
    """

    window: int = 128
    heads: int = 16
    interleave: int = 4
    inputs: int = 4
    states: int = 8
    lookahead: int = 4

    @property
    def windows(self) -> tuple[int, ...]:
        """Window sizes that the kernel is specialised for, ascending."""
        sizes = [self.window]
        while sizes[0] > 32:
            sizes.insert(0, sizes[0] // 2)
        return tuple(sizes)
