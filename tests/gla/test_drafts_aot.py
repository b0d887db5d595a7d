"""The real TPU compiler accepts drafts, commits and snapshots, for every chip."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import gla
from tests.gla import test_aot
from tests.gla.test_aot import BF16, CHIPS, F32, array
from tpukit import aot


@dataclasses.dataclass(frozen=True)
class Shape(test_aot.Shape):
    words: int = 0
    snapshots: int = 0
    commits: bool = False

    def call(self):
        """A step of drafts and snapshots, or a commit, on flat rows."""

        def decay(g):
            if self.per_channel:
                return gla.ChannelDecay(g.reshape(self.tokens, self.heads, self.key_dim))
            return gla.TokenDecay(g) if self.per_token else gla.HeadDecay(g)

        def verify(q, k, v, *rest):
            *batch, g, flags, words, rows, slots = rest
            drafts = gla.Drafts(flags, words if self.words else None)
            snapshots = gla.Snapshots(rows, slots) if self.snapshots else None
            options = {"drafts": drafts, "snapshots": snapshots, "implementation": "pallas"}
            options["batch_invariant"] = self.batch_invariant
            o, pool = gla.gla(qk(q), qk(k), vo(v), *batch, decay=decay(g), **options)
            return o.reshape(self.tokens, -1), pool

        def commit(q, k, v, *rest):
            *batch, g, words = rest
            options = {"decay": decay(g), "implementation": "pallas"}
            return gla.commit(qk(k), vo(v), *batch, words, **options)

        def qk(x):
            return x.reshape(self.tokens, self.qk_heads, self.key_dim)

        def vo(x):
            return x.reshape(self.tokens, self.heads, self.value_dim)

        if self.commits:
            more = [array(self.requests, 2, dtype=jnp.uint32)]
        else:
            words = array(self.tokens, max(self.words, 1), dtype=jnp.uint32)
            rows = array(self.snapshots)
            more = [array(self.requests, dtype=jnp.bool_), words, rows, rows]
        fn = commit if self.commits else verify
        return jax.jit(fn, donate_argnums=3), (*self.operands(), *more)


OPTIONS = {
    "chains and snapshots": Shape(snapshots=8),
    "trees": Shape(words=1),
    "trees per token, dims 64, snapshots, bf16 state": Shape(
        words=2, per_token=True, key_dim=64, value_dim=64, snapshots=8, state=BF16
    ),
    "f32 trees": Shape(words=2, dtype=F32),
    "commit": Shape(commits=True),
    "commit per token": Shape(commits=True, per_token=True),
    "commit per channel": Shape(commits=True, per_channel=True),
    "chains per channel, batch invariant": Shape(per_channel=True, batch_invariant=True),
    "production trees": Shape(256, 64, 16, 16, words=1),
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_compiles(name, chip):
    fn, args = OPTIONS[name].call()
    assert aot.compile_for(fn, *args, chip=chip).kernels
