"""Results vary over the mesh axes of any of their operands."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tpukit.manual import manual_axes


def test_axes_are_joined():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("a", "b"), auto, devices=jax.devices()[:4])
    seen = []

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("a"), P("b"), P()), out_specs=P("a"))
    def run(x, y, z):
        seen.extend(manual_axes(*given).varying for given in ((x,), (y,), (z,), (x, y, z)))
        return x

    run(jnp.ones(4), jnp.ones(4, jnp.int32), jnp.ones((0, 2), bool))
    assert seen == [{"a"}, {"b"}, set(), {"a", "b"}]
    assert not manual_axes(jnp.ones(3)).varying
