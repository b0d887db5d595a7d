"""Rows of a window moved to where a chunk's bits do not depend on its place in the batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def shift_rows(window: Any, by: jax.Array) -> None:
    """Moves row i of a ref [W, n] to row (i + by) modulo W, for 0 <= by < W."""
    width = window.shape[1]
    step = LANES if width % LANES == 0 else width

    def part(i: jax.Array, _: None) -> None:
        lanes = pl.ds(pl.multiple_of(i * step, step), step)
        values = window[:, lanes].astype(jnp.float32)
        window[:, lanes] = pltpu.roll(values, by, 0).astype(window.dtype)

    lax.fori_loop(0, width // step, part, None)
