"""What `jax.shard_map` has to be told about results that it cannot see the making of."""

from __future__ import annotations

import jax
from jax.sharding import ManualAxisType


def manual_axes(*arrays: jax.Array) -> ManualAxisType:
    """How a result of these arrays varies over manual mesh axes: as any of them does."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    return ManualAxisType(varying=frozenset().union(*axes))
