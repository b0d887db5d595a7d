"""Seeded faults: the gates have to be red on every one of them."""

# ruff: noqa: E501  (a row of a table is a line)

import dataclasses

import jax.numpy as jnp
import pytest
from jax import lax

import gla
from gla import chunk, fusions, kernel, plumbing, recurrent, schedule, tables
from tests.gla import around, oracle, test_fusions
from tests.gla.test_gla import check_gates, compiled, run
from tpukit import buffers, interpret

pytestmark = pytest.mark.needs("interpreted faults")

PLAN = gla.Plan(heads=2, interleave=2, window=32, inputs=2, states=2, lookahead=1)
BATCHES = {
    per_token: oracle.random_batch(
        30,
        [1, 1, 40, 1, 5, 1, 20, 1],
        qk_heads=1,
        known=[True, False, True, True, False, True, True, True],
        slots=[3, 1, 2, 4, 5, 2, -1, 99],
        per_token=per_token,
        strongest=0.5,
    )
    for per_token in (False, True)
}


def passes(per_token=False):
    """Whether the gates are green: values, states, other slots, and the strict harness."""
    compiled.cache_clear()
    batch = BATCHES[per_token]
    try:
        o, pool = run(batch, plan=PLAN)
        check_gates(batch, o, pool, window=32)
    except (AssertionError, interpret.InterpretError):
        return False
    finally:
        compiled.cache_clear()
    return True


@pytest.mark.parametrize("per_token", [False, True])
def test_the_kernel_passes(per_token):
    assert passes(per_token)


def narrow_sums(a, b, contract):
    product = lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)
    return lax.reduce_precision(product, exponent_bits=8, mantissa_bits=7)


def changed(function, change):
    """`function` with its result changed."""
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def without_wait(stream_name):
    """The kernel's streams, one of which never waits."""
    stream = getattr(plumbing.Plumbing, stream_name)

    class Careless(buffers.Stream):
        def wait(self, index):
            pass

    def careless(self):
        found = stream.fget(self)
        return Careless(found.copies, found.depth, found.exists)

    return property(careless)


def stream_with(stream_name, **changes):
    stream = getattr(plumbing.Plumbing, stream_name)

    def other(self):
        found = stream.fget(self)
        return dataclasses.replace(found, **{k: make(self, found) for k, make in changes.items()})

    return property(other)


def first_kept(batch, listed, limits):
    """The schedule with every state stored, whoever else has the slot."""
    good_items(batch, listed, limits)

    def keep(r, _):
        listed.store[r] = jnp.where(listed.load[r] >= 0, listed.load[r], listed.store[r])

    lax.fori_loop(0, listed.counts[1], keep, None)


good_items = schedule.list_items
good_chunk = tables.ConstantTables.chunk
good_token = tables.TokenTables.chunk

MUTANTS = {
    "decay within a chunk": (chunk, "score", lambda q, k, s, d: good_score(q, k, s, d._replace(within=jnp.tril(jnp.ones_like(d.within)) * 128**-0.5))),
    "not causal": (tables, "power", lambda g, n: jnp.exp(g * jnp.abs(n).astype(jnp.float32))),
    "state not decayed": (chunk, "finish", lambda k, v, s, d, x, **on: good_finish(k, v, s, d._replace(whole=jnp.ones_like(d.whole)), x, **on)),
    "keys not decayed": (chunk, "finish", lambda k, v, s, d, x, **on: good_finish(k, v, s, d._replace(until=jnp.ones_like(d.until)), x, **on)),
    "no carried state": (chunk, "finish", lambda k, v, s, d, x, **on: good_finish(k, v, s, d, x._replace(carried=0 * x.carried), **on)),
    "swapped rows": (chunk, "finish", changed(chunk.finish, lambda found: (jnp.flip(found[0], 0), found[1]))),
    "bf16 sums": (chunk, "matmul", narrow_sums),
    "bf16 sums, decode": (kernel, "decode_token", lambda q, k, v, state, decay: good_decode(q, k, v, state.astype(jnp.bfloat16), decay.astype(jnp.bfloat16))),
    "q for k": (recurrent, "pack", lambda q, k: good_pack(k, q)),
    "wrong scale": (chunk, "score", lambda q, k, s, d: good_score(q, k, s, d._replace(since=d.since * 1.05))),
    "off by one": (tables.ConstantTables, "chunk", lambda self, h, begin, end, size, dims: good_chunk(self, h, begin, end + 1, size, dims)),
    "rows not cleared": (kernel.Walk, "clear_outside", lambda *args: None),
    "groups not joined": (kernel.Walk, "join", lambda *args: None),
    "state never loaded": (plumbing.Plumbing, "loads", stream_with("loads", exists=lambda self, s: lambda r: r < 0)),
    "state never stored": (plumbing.Plumbing, "stores", stream_with("stores", exists=lambda self, s: lambda r: r < 0)),
    "fresh states not zeroed": (kernel, "FRESH", -99),
    "input not awaited": (plumbing.Plumbing, "inputs", without_wait("inputs")),
    "state not awaited": (plumbing.Plumbing, "loads", without_wait("loads")),
    "store not awaited": (plumbing.Plumbing, "stores", without_wait("stores")),
    "output not awaited": (plumbing.Plumbing, "outputs", without_wait("outputs")),
    "wrong row of q": (recurrent, "pick", lambda c, lane: good_pick(c, lane ^ 1)),
    "heads in the wrong order": (kernel.Walk, "value_lanes", lambda self, h: slice((h ^ 1) * 128, ((h ^ 1) + 1) * 128)),
    "null request not skipped": (schedule, "NULL", schedule.FRESH),
    "first of repeated slots kept": (kernel, "list_items", first_kept),
    "decay of the next token": (tables.ConstantTables, "token", lambda self, *args: good_decay(self, *args) ** 2),
}  # fmt: skip

good_score, good_finish = chunk.score, chunk.finish
good_pick, good_decay = recurrent.pick, tables.ConstantTables.token
good_pack, good_decode = recurrent.pack, recurrent.decode_token


@pytest.mark.parametrize("name", MUTANTS)
def test_every_fault_is_caught(name, monkeypatch):
    owner, attribute, fault = MUTANTS[name]
    assert hasattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, fault)
    assert not passes()


def test_token_sums_off_by_one(monkeypatch):
    def late(self, h, begin, end, size, dims):
        found = good_token(self, h, begin, end, size, dims)
        return found._replace(until=jnp.roll(found.until, 1, axis=0))

    monkeypatch.setattr(tables.TokenTables, "chunk", late)
    assert not passes(per_token=True)


FUSED = test_fusions.mixed(50)
NAMED = around.random_prologue(51, FUSED), around.random_epilogue(52, FUSED)


def fused_passes():
    """Whether the gates are green where norms, rope and gate are fused."""
    test_fusions.compiled.cache_clear()
    try:
        test_fusions.check_gates(FUSED, *NAMED, *test_fusions.run(FUSED, *NAMED))
    except (AssertionError, interpret.InterpretError):
        return False
    finally:
        test_fusions.compiled.cache_clear()
    return True


good_turn, good_partner, good_gate = fusions.turn, fusions.partner, fusions.norm_gate
good_rope, good_each = fusions.norm_rope, fusions.each_group
FUSED_MUTANTS = {
    "turned the wrong way": (fusions, "turn", lambda *args: good_turn(*args)._replace(other=-good_turn(*args).other)),
    "turned with the next lane": (fusions, "partner", lambda n: good_partner(n) ^ 1),
    "weights of the wrong lane": (fusions, "turn", lambda a, w, n: good_turn(a, jnp.roll(w, 1, axis=1), n)),
    "q not normed": (fusions, "norm_rope", lambda x, t, lanes, eps: good_rope(x, t, lanes, 0.5)),
    "no eps": (fusions, "norm_gate", lambda x, g, w, eps: good_gate(x, g, w, 0.0)),
    "norm per head": (fusions, "norm_gate", lambda x, g, w, eps: jnp.concatenate([good_gate(*(y[:, i : i + 128] for y in (x, g, w)), eps) for i in (0, 128)], axis=1)),
    "gate without sigmoid": (fusions, "norm_gate", lambda x, g, w, eps: good_gate(x, jnp.zeros_like(g), w, eps) * 2 * g.astype(jnp.float32)),
    "last group left out": (fusions, "each_group", lambda end, action: good_each(end - 16, action)),
    "outputs not normed": (kernel.Walk, "norm_outputs", lambda self, item: None),
}  # fmt: skip


def test_the_fused_kernel_passes():
    assert fused_passes()


@pytest.mark.parametrize("name", FUSED_MUTANTS)
def test_every_fused_fault_is_caught(name, monkeypatch):
    owner, attribute, fault = FUSED_MUTANTS[name]
    assert hasattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, fault)
    assert not fused_passes()
