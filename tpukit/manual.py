"""What `jax.shard_map` has to be told about results that it cannot see the making of."""

from __future__ import annotations

import jax
from jax import lax
from jax.sharding import ManualAxisType


def manual_axes(*arrays: jax.Array) -> ManualAxisType:
    """How a result of these arrays varies over manual mesh axes: as any of them does."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    return ManualAxisType(varying=frozenset().union(*axes))


def vary_together[Tree](tree: Tree, *others: jax.Array) -> Tree:
    """The arrays of `tree`, each varying over every axis over which one of them or `others` does.

    A gradient with regard to one of them then varies likewise, as a custom rule has to declare, and
    is summed over what was added.
    """
    axes = manual_axes(*jax.tree.leaves(tree), *others).varying

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
