"""The real TPU compiler accepts every option and every production shape, for every chip."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import gla
from gla.plan import vmem_bytes
from microbench.cases import gla as cases
from microbench.cases._gla_bundles import Schedule, chunks
from tests.gla import oracle
from tpukit import aot

CHIPS = ("v5e", "v6e", "tpu7x")
BF16, F32 = jnp.bfloat16, jnp.float32


def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Shape:
    tokens: int = 256
    requests: int = 8
    qk_heads: int = 4
    heads: int = 4
    key_dim: int = 128
    value_dim: int = 128
    dtype: jnp.dtype = BF16
    state: jnp.dtype = F32
    per_token: bool = False
    per_channel: bool = False
    delta: bool = False
    batch_invariant: bool = False
    heads_per_group: int = 0  # norm, rope and gate are fused

    def call(self):
        """The function on flat rows, as a model's projections leave them, and its shapes."""

        def fn(q, k, v, pool, slots, cu, known, g, around, beta):
            g = g.reshape(self.tokens, self.heads, self.key_dim) if self.per_channel else g
            q, k = (x.reshape(self.tokens, self.qk_heads, self.key_dim) for x in (q, k))
            v = v.reshape(self.tokens, self.heads, self.value_dim)
            options = {"batch_invariant": self.batch_invariant, "implementation": "pallas"}
            if around:
                gate = around[1].gate.reshape(v.shape)
                options["prologue"] = around[0]
                options["epilogue"] = dataclasses.replace(around[1], gate=gate)
            gates = {"decay": oracle.decay_of(g), "beta": beta}
            o, pool = gla.gla(q, k, v, pool, slots, cu, known, **gates, **options)
            return o.reshape(self.tokens, -1), pool

        norm, angle = array(self.key_dim, dtype=F32), array(self.tokens, 32, dtype=F32)
        weight = array(self.heads, self.value_dim, dtype=F32)
        flat = array(self.tokens, self.heads * self.value_dim, dtype=self.dtype)
        around = (
            gla.NormRope(norm, norm, angle, angle),
            gla.NormGate(weight, flat, self.heads_per_group),
        )
        around = around if self.heads_per_group else ()
        beta = array(self.tokens, self.heads, dtype=F32) if self.delta else None
        return jax.jit(fn, donate_argnums=3), (*self.operands(), around, beta)

    def operands(self):
        """Shapes of q, k, v, pool, slots, cu, known and decays."""
        qk = array(self.tokens, self.qk_heads * self.key_dim, dtype=self.dtype)
        vo = array(self.tokens, self.heads * self.value_dim, dtype=self.dtype)
        pool = array(self.requests + 2, self.heads, self.key_dim, self.value_dim, dtype=self.state)
        g = (self.tokens, self.heads) if self.per_token else (self.heads,)
        g = (self.tokens, self.heads * self.key_dim) if self.per_channel else g
        n = self.requests
        scalars = (array(n), array(n + 1), array(n, dtype=jnp.bool_))
        return qk, qk, vo, pool, *scalars, array(*g, dtype=F32)


OPTIONS = {
    "per token": Shape(per_token=True),
    "per channel": Shape(per_channel=True),
    "per channel, f32, bf16 state": Shape(per_channel=True, dtype=F32, state=BF16),
    "per channel, dims 64": Shape(per_channel=True, qk_heads=3, heads=3, key_dim=64, value_dim=64),
    "per channel, grouped, batch invariant": Shape(
        per_channel=True, qk_heads=2, heads=8, key_dim=256, batch_invariant=True
    ),
    "delta": Shape(delta=True),
    "delta per token": Shape(delta=True, per_token=True, state=BF16),
    "delta per token, dims 64 and 256": Shape(
        delta=True, per_token=True, qk_heads=3, heads=3, key_dim=64, value_dim=256
    ),
    "delta per channel": Shape(delta=True, per_channel=True),
    "delta per channel, f32, grouped, batch invariant": Shape(
        delta=True, per_channel=True, qk_heads=2, heads=4, dtype=F32, batch_invariant=True
    ),
    "f32": Shape(dtype=F32),
    "f32 per token": Shape(dtype=F32, per_token=True),
    "bf16 state": Shape(state=BF16),
    "bf16 state per token": Shape(state=BF16, per_token=True),
    "dims 64": Shape(key_dim=64, value_dim=64),
    "dims 64 per token": Shape(key_dim=64, value_dim=64, per_token=True),
    "dims 256": Shape(key_dim=256, value_dim=256),
    "dims 256 per token": Shape(key_dim=256, value_dim=256, per_token=True),
    "dims 64 and 256": Shape(key_dim=64, value_dim=256),
    "dims 256 and 128": Shape(key_dim=256, value_dim=128),
    "dims 128 and 64, f32": Shape(key_dim=128, value_dim=64, dtype=F32),
    "grouped": Shape(qk_heads=2, heads=8),
    "one head": Shape(qk_heads=1, heads=1),
    "odd heads of dim 64": Shape(qk_heads=3, heads=3, key_dim=64, value_dim=64),
    "batch invariant": Shape(batch_invariant=True),
    "batch invariant per token": Shape(batch_invariant=True, per_token=True),
    "odd number of rows": Shape(tokens=250),
    "fused": Shape(tokens=250, heads_per_group=4),
    "fused, grouped, per token": Shape(qk_heads=2, heads=8, heads_per_group=2, per_token=True),
    "fused, f32": Shape(dtype=F32, heads_per_group=1),
    "fused, value dim 64": Shape(value_dim=64, heads_per_group=1),
    "fused, value dim 256": Shape(value_dim=256, heads_per_group=2),
}

PRODUCTION = {
    f"{model} {name}": Shape(tokens, requests, heads, heads)
    for model, heads in (("1t", 16), ("flash", 8))
    for name, tokens, requests in (
        ("prefill", 8192, 1),
        ("step", 2048, 32),
        ("decode", 64, 64),
        ("decode 512", 512, 512),
        ("long", 65536, 4),
    )
} | {
    "1t, all 64 heads": Shape(2048, 32, 64, 64),
    "step per token": Shape(2048, 32, 16, 16, per_token=True),
    "1t step, fused": Shape(2048, 32, 16, 16, heads_per_group=8),
    "1t decode, fused": Shape(64, 64, 16, 16, heads_per_group=8),
    "step per channel": Shape(2048, 32, 16, 16, per_channel=True),
    "step of the delta rule": Shape(2048, 32, 16, 16, per_token=True, delta=True),
    "step of KDA": Shape(2048, 32, 16, 16, per_channel=True, delta=True),
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_compiles(name, chip):
    fn, args = OPTIONS[name].call()
    assert aot.compile_for(fn, *args, chip=chip).kernels


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", PRODUCTION)
def test_production_shapes_compile_without_copies(name, chip):
    shape = PRODUCTION[name]
    fn, args = shape.call()
    compiled = aot.compile_for(fn, *args, chip=chip)
    assert compiled.kernels
    if not shape.per_token and not shape.delta:  # whose [tokens, heads] decays are laid out anew
        # nothing of the size of an operand; cosines and sines are put side by side
        assert compiled.temp_bytes < 2**20 + 8 * 128 * shape.tokens * bool(shape.heads_per_group)
        limit = 550_000 if chip == "tpu7x" else 700_000
        assert compiled.code_bytes <= limit * (5 if shape.per_channel else 1)


def test_v5p_compiles():
    fn, args = Shape().call()
    assert aot.compile_for(fn, *args, chip="v5p").kernels


@pytest.mark.parametrize("chip", CHIPS)
def test_static_figures_do_not_regress(chip):
    (case,) = [case for case in cases.CASES if case.name == "ling-2.6-1t/step"]
    target, arguments = cases.aot_target(case)
    report = aot.static_report(target, chip, **arguments)
    plan = gla.Plan(heads=16)
    schedule = Schedule.of(report.kernel("gla"), plan)
    steady = schedule.steady() / (plan.window * plan.heads)
    decode = (schedule.request() + schedule.run() / 16) / plan.heads
    limits = {"tpu7x": (0.87, 49), "v6e": (0.9, 50), "v5e": (1.2, 60)}[chip]
    assert 0.3 < steady <= limits[0]
    assert 20 < decode <= limits[1]
    assert not [op for op in report.other_ops if "[2048,2048]" in op.shape]
    problem = gla.api.problem_of(*as_gla(cases.build(chip, **arguments)[1]))
    assert vmem_bytes(problem, plan) == pytest.approx(report.kernel("gla").vmem_bytes, rel=0.1)


@pytest.mark.parametrize("row", [0, 5, 21])
def test_counted_chunks_are_the_kernels(row):
    assert [c.rows for c in chunks(row, 300, 128)] == oracle.cut(row, 300)


def as_gla(args):
    """Arguments of `problem_of` for the flat arrays of a case."""
    q, k, v, pool, slots, cu, known, g, *_ = args
    flat = [jax.ShapeDtypeStruct((x.shape[0], 16, 128), x.dtype) for x in (q, k, v)]
    return *flat, pool, slots, cu, known, gla.HeadDecay(g), False
