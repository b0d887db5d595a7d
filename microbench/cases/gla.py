"""Gated linear attention on the shapes of Ling-2.6, per device.

Sources: the BailingMoeV2_5 configuration in `transformers` and sglang-jax's model of it. Linear
layers of Ling-2.6-1T have 64 heads, of flash 32, with key and value dim 128; q, k, v arrive in bf16
and states are f32. A device has 16 heads of 1T (tensor parallel 4 in a layer of 8 norm groups) and
8 of flash. A serving step prefills 2,048 tokens on a data-parallel rank and decodes 16 or 64
requests. Their linear layers are Lightning attention: one constant decay per head and layer; q and
k are normed and half of their dims turned before, the output is normed in groups of 8 heads and
gated after, which the kernel can do as well ("fused") or XLA around it ("unfused").

Beside them, on the same shape: decays per token (Mamba-2) and per key channel (GLA), and the delta
rule with either (Gated DeltaNet, KDA).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gla
from gla.schedule import ROWS
from microbench import peers as others
from microbench.case import Call, Case, Check, Cost
from microbench.cases._gla_bundles import Schedule
from reference import gla as reference
from reference import gla_drafts
from reference.gla_norm import NormGate, NormRope, norm_gate, norm_rope
from tpukit import interpret

MODELS = {
    "ling-2.6-1t": {"heads": 16, "model_heads": 64, "layers": 80},
    "ling-2.6-flash": {"heads": 8, "model_heads": 32, "layers": 32},
}


AROUND = ("prologue", "epilogue")
RULES = {
    "token-decay": {"decay": "token", "delta": False},
    "channel-decay": {"decay": "channel", "delta": False},
    "gated-deltanet": {"decay": "token", "delta": True},
    "kda": {"decay": "channel", "delta": True},
}


def ragged(tokens: int, requests: int) -> tuple[int, ...]:
    """Lengths from short to long with the given sum, in an order that is not sorted."""
    bounds = [round(tokens * (i / requests) ** 1.5) for i in range(requests + 1)]
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    return tuple(lengths[(7 * i) % requests] for i in range(requests))


BATCHES: dict[str, tuple[int, tuple[int, ...]]] = {  # decodes, lengths of the prefills
    "prefill": (0, (8192,)),
    "step": (0, ragged(2048, 32)),
    "decode": (64, ()),
    "mixed": (32, (512, 512)),
}
# Four drafts of each request, from a model's multi-token heads; a prefix cache of pages of 16 rows.
DRAFTED = {"verify": (0, (4,) * 64), "tree": (0, (4,) * 64)}
CACHED = {"snapshots": BATCHES["step"]}
CHUNKED = {"chunked": (0, (2048, 2048))}  # the second goes on from a state


def _case(model: str, batch: str, name: str = "", **changes: str) -> Case:
    decodes, prefills = (BATCHES | DRAFTED | CACHED | CHUNKED)[batch]
    sizes = {"key_dim": 128, "value_dim": 128, "layer": 0, "dtype": "bfloat16", "state": "float32"}
    rule = RULES.get(model, {"decay": "head", "delta": False})
    sizes |= MODELS.get(model, MODELS["ling-2.6-1t"])
    drafts = {"verify": "chain", "tree": "tree"}.get(batch, "")
    sizes |= {"drafts": drafts, "page": 16 * (batch in CACHED)}
    params = {"decodes": decodes, "prefills": prefills, **sizes, **rule, "around": ""}
    return Case("gla", f"{model}/{batch}{name}", {**params, **changes})


CASES = (
    *(_case(model, batch) for model in MODELS for batch in BATCHES),
    *(_case(rule, "prefill") for rule in RULES),
    *(_case(rule, "decode") for rule in RULES if RULES[rule]["delta"]),
    *(_case("ling-2.6-1t", batch) for batch in (*DRAFTED, *CACHED)),
    _case("ling-2.6-1t", "decode", " bf16 state", state="bfloat16"),
    *(_case("ling-2.6-1t", batch, " fused", around="fused") for batch in BATCHES),
)
MORE = (
    *(_case("ling-2.6-1t", batch, " unfused", around="unfused") for batch in BATCHES),
    *(_case(model, "chunked") for model in MODELS),
    *(_case("ling-2.6-flash", batch) for batch in (*DRAFTED, *CACHED)),
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The parameters of a case."""

    decodes: int
    prefills: tuple[int, ...]
    heads: int
    model_heads: int
    layers: int
    key_dim: int
    value_dim: int
    layer: int
    dtype: str
    state: str
    decay: str
    delta: bool
    drafts: str  # "chain" or "tree": what is not decoded is drafts; or ""
    page: int  # rows after multiples of which the last state of a prefill is kept; or 0
    around: str  # norms, rope and gate: "", "fused" or "unfused"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each request, the decodes first."""
        return (1,) * self.decodes + self.prefills

    @property
    def tokens(self) -> int:
        """Rows of the batch."""
        return sum(self.lengths)

    @property
    def slots(self) -> int:
        """States in the pool: one per request and two that nobody uses, and the snapshots."""
        return len(self.lengths) + 2 + len(self.kept)

    @property
    def kept(self) -> tuple[int, ...]:
        """The rows after which states are kept."""
        if not self.page:
            return ()
        ends = np.cumsum(self.lengths)
        rows = ends - np.asarray(self.lengths) % self.page - 1
        return tuple(int(r) for r, n in zip(rows, self.lengths, strict=True) if n >= self.page)

    def options(self) -> dict[str, Any]:
        """Drafts and snapshots of the batch."""
        found: dict[str, Any] = {}
        if self.drafts:
            flags = jnp.arange(len(self.lengths)) >= self.decodes
            found["drafts"] = gla.Drafts(flags, self.words() if self.drafts == "tree" else None)
        if self.page:
            slots = len(self.lengths) + 2 + jnp.arange(len(self.kept), dtype=jnp.int32)
            found["snapshots"] = gla.Snapshots(jnp.asarray(self.kept, jnp.int32), slots)
        return found

    def words(self) -> jax.Array:
        """Binary trees: the parent of draft d is draft (d - 1) // 2."""
        paths = [1]
        while len(paths) < max(self.lengths):
            paths.append(paths[(len(paths) - 1) // 2] | 1 << len(paths))
        words = [word for length in self.lengths for word in paths[:length]]
        return jnp.asarray(np.asarray(words, np.uint32)[:, None])

    def resumes(self) -> np.ndarray:
        """[N] whether a request has a state: decodes and drafts do, and every other prefill."""
        index = np.arange(len(self.lengths))
        return (index < self.decodes) | (index % 2 == 1) | bool(self.drafts)

    def reduced(self) -> Shape:
        """The same kind of batch, small enough to be interpreted."""
        kept = self.prefills[:: max(1, len(self.prefills) // 6)]
        shrink = min(1.0, 288 / max(sum(kept), 1))
        prefills = tuple(max(1, round(length * shrink)) for length in kept)
        return dataclasses.replace(self, decodes=min(self.decodes, 6), prefills=prefills)


DECAYS = {"head": gla.HeadDecay, "token": gla.TokenDecay, "channel": gla.ChannelDecay}


class Inputs(NamedTuple):
    """Arrays of one call; T tokens, N requests, H heads of dims K and V."""

    q: Any  # [T, H * K], as a projection leaves it
    k: Any  # [T, H * K]
    v: Any  # [T, H * V]
    pool: Any  # [slots, H, K, V]
    slot_ids: Any  # [N]
    cu_seqlens: Any  # [N + 1]
    has_state: Any  # [N]
    g: Any  # [H], [T, H] or [T, H * K]
    around: Any  # (NormRope, NormGate) or ()
    beta: Any  # [T, H] or None


def _shape(case: Case) -> Shape:
    params: dict[str, Any] = dict(case.params)
    return Shape(**params)


def _specs(shape: Shape) -> Inputs:
    """Shapes and dtypes of the inputs."""

    def spec(dtype: Any, *size: int) -> Any:
        return jax.ShapeDtypeStruct(size, jnp.dtype(dtype))

    requests, half = len(shape.lengths), shape.key_dim // 4
    norm = spec(jnp.float32, shape.key_dim)
    angle = spec(jnp.float32, shape.tokens, half)
    gate = spec(shape.dtype, shape.tokens, shape.heads * shape.value_dim)
    weight = spec(jnp.float32, shape.heads, shape.value_dim)
    around = (NormRope(norm, norm, angle, angle), NormGate(weight, gate, heads_per_group=8))
    gates = {
        "head": (shape.heads,),
        "token": (shape.tokens, shape.heads),
        "channel": (shape.tokens, shape.heads * shape.key_dim),
    }
    return Inputs(
        q=spec(shape.dtype, shape.tokens, shape.heads * shape.key_dim),
        k=spec(shape.dtype, shape.tokens, shape.heads * shape.key_dim),
        v=spec(shape.dtype, shape.tokens, shape.heads * shape.value_dim),
        pool=spec(shape.state, shape.slots, shape.heads, shape.key_dim, shape.value_dim),
        slot_ids=spec(jnp.int32, requests),
        cu_seqlens=spec(jnp.int32, requests + 1),
        has_state=spec(jnp.bool_, requests),
        g=spec(jnp.float32, *gates[shape.decay]),
        around=around if shape.around else (),
        beta=spec(jnp.float32, *gates["token"]) if shape.delta else None,
    )


def _inputs(shape: Shape, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)

    def normal(spec: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.standard_normal(spec.shape, dtype=np.float32), spec.dtype)

    specs = _specs(shape)
    names = ("q", "k", "v", "pool", "around")
    values = {name: jax.tree.map(normal, getattr(specs, name)) for name in names}
    if shape.decay != "head":
        values["g"] = -jnp.asarray(rng.uniform(1e-3, 1, specs.g.shape), jnp.float32)
    if shape.delta:
        values["beta"] = jnp.asarray(rng.uniform(0, 1, specs.beta.shape), jnp.float32)
        keys = values["k"].reshape(shape.tokens, shape.heads, -1).astype(jnp.float32)
        keys /= jnp.linalg.norm(keys, axis=-1, keepdims=True)
        values["k"] = keys.astype(shape.dtype).reshape(specs.k.shape)
    return _steering(shape, seed)._replace(**values)


def _steering(shape: Shape, seed: int) -> Inputs:
    """Slots, lengths and decays as values, the large arrays as shapes."""
    rng = np.random.default_rng(seed)
    specs = _specs(shape)
    decay = gla.ling_decay(shape.model_heads, shape.layer, shape.layers)
    return specs._replace(
        slot_ids=jnp.asarray(1 + rng.permutation(len(shape.lengths)), jnp.int32),
        cu_seqlens=jnp.asarray(np.cumsum([0, *shape.lengths]), jnp.int32),
        has_state=jnp.asarray(shape.resumes()),
        # the first shard has the strongest decays
        g=decay.g[: shape.heads] if shape.decay == "head" else specs.g,
    )


def _arguments(shape: Shape, args: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional arguments of `gla.gla`, and those with names that are arrays."""
    q, k, v, *states, g, around, beta = args
    q, k = (x.reshape(-1, shape.heads, shape.key_dim) for x in (q, k))
    v = v.reshape(-1, shape.heads, shape.value_dim)
    if shape.decay == "channel":
        g = g.reshape(-1, shape.heads, shape.key_dim)
    named: dict[str, Any] = {"decay": DECAYS[shape.decay](g), "beta": beta}
    if around:
        prologue, epilogue = around
        gate = epilogue.gate.reshape(v.shape)
        named |= {"prologue": prologue, "epilogue": dataclasses.replace(epilogue, gate=gate)}
    return (q, k, v, *states), named


def _plan(case: Case) -> gla.Plan | None:
    """The case's plan, None for the kernel's own."""
    fields: dict[str, Any] = dict(case.plan)
    return gla.Plan(**fields) if fields else None


def _call(shape: Shape, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` on flat q, k, v, as the projections of a model leave them."""
    fused = function is gla.gla and shape.around == "fused"
    dtype = options.get("dtype", jnp.float32)

    def fn(*args: Any) -> tuple[jax.Array, jax.Array]:
        (q, k, *arrays), named = _arguments(shape, Inputs(*args))
        prologue, epilogue = (None if fused else named.pop(x, None) for x in AROUND)
        q, k = (q, k) if prologue is None else norm_rope(q, k, prologue, dtype)
        o, pool = function(q, k, *arrays, **named, **shape.options(), **options)
        o = o if epilogue is None else norm_gate(o, epilogue, dtype)
        return o.reshape(-1, shape.heads * shape.value_dim), pool

    return fn


def inputs(case: Case, seed: int) -> Inputs:
    """See `microbench.case.Suite`, as for all that follows."""
    return _inputs(_shape(case), seed)


def timed(case: Case) -> Case:
    """Itself."""
    return case


def chips(case: Case) -> tuple[str, ...]:
    """All."""
    del case
    return gla.SUPPORTED_CHIPS


def reference_fn(case: Case) -> Callable[..., Any]:
    """The chunked reference."""
    return jax.jit(_call(_shape(case), gla_drafts.gla))


def kernel_fn(case: Case) -> Callable[..., Any]:
    """The kernel on this machine's TPU."""
    return jax.jit(_call(_shape(case), gla.gla, implementation="pallas", plan=_plan(case)))


def check(case: Case, seed: int) -> list[Check]:
    """Compares with the float64 recurrence, on a TPU at full size, elsewhere interpreted."""
    on_tpu = jax.default_backend() == "tpu"
    shape = _shape(case) if on_tpu else _shape(case).reduced()
    args = _inputs(shape, seed)
    if on_tpu:
        kernel = kernel_fn(case)
        o, pool = jax.block_until_ready(kernel(*args))
    else:
        with interpret.strict():
            run = _call(shape, gla.gla, implementation="interpret", plan=_plan(case))
            kernel = jax.jit(run)
            o, pool = jax.block_until_ready(kernel(*args))
    with jax.enable_x64(True):
        oracle = _call(shape, gla_drafts.gla, run=reference.recurrent, dtype=jnp.float64)
        wide = jax.tree.map(lambda x: x.astype(float) if x.dtype == shape.dtype else x, args)
        exact, exact_pool = jax.jit(oracle)(*wide[:3], args.pool.astype(jnp.float64), *wide[4:])
    rounded = _call(shape, gla_drafts.gla, operands=jnp.dtype(shape.dtype))
    plain, plain_pool = jax.jit(rounded)(*args)
    used = np.r_[np.asarray(args.slot_ids), len(shape.lengths) + 2 : shape.slots]
    unused = np.setdiff1d(np.arange(shape.slots), used)
    touched = np.sum(np.asarray(pool)[unused] != np.asarray(args.pool)[unused])
    return [
        _no_worse("output", o, plain, exact),
        _no_worse("worst token", o, plain, exact, axis=1),
        _no_worse("states", pool[used], plain_pool[used], exact_pool[used]),
        Check("other slots", float(touched), 0.0, note="elements changed in slots of no request"),
    ]


def _no_worse(name: str, found: Any, plain: Any, exact: Any, axis: int | None = None) -> Check:
    """Relative error of `found`, limited to 1.1 times that of the reference, and f32's rounding."""
    found, plain, exact = (np.asarray(x).astype(np.float64) for x in (found, plain, exact))

    def error(x: np.ndarray) -> float:
        difference = np.sqrt(np.sum((x - exact) ** 2, axis=axis))
        return float(np.max(difference / (np.sqrt(np.sum(exact**2, axis=axis)) + 1e-30)))

    return Check(f"{name}: relative error", error(found), 1.1 * error(plain) + 2.0**-24)


def aot_target(case: Case) -> tuple[str, dict[str, Any]]:
    """Names `build`."""
    return "microbench.cases.gla:build", {**case.params, "plan": dict(case.plan)}


def build(
    chip: str, plan: Mapping[str, int], **params: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The full-size call, for a chip that need not be present."""
    del chip  # the kernel asks what it is compiled for
    params["prefills"] = tuple(params["prefills"])  # JSON made a list of it
    shape = Shape(**params)
    chosen = gla.Plan(**plan) if plan else None
    fn = _call(shape, gla.gla, implementation="pallas", plan=chosen)
    return jax.jit(fn, donate_argnums=Inputs._fields.index("pool")), _specs(shape)


def steered(case: Case, seed: int) -> Call:
    """`build` with the lengths and slots that `inputs` would have."""
    _, arguments = aot_target(case)
    fn, _ = build("", **arguments)
    return fn, tuple(_steering(_shape(case), seed))


def peers(case: Case, seed: int) -> Mapping[str, Call]:
    """XLA's chunked form, or one step where all decode with decays per head; tokamax's kernels."""
    shape, (_, args) = _shape(case), steered(case, seed)
    if shape.decay == "head" and not (shape.prefills or shape.around):
        return {"XLA, one step": (jax.jit(_step(shape), donate_argnums=3), args)}
    found = {"XLA, chunked form": (reference_fn(case), args)}
    if not (shape.delta and others.has_tokamax()):
        return found
    if shape.decay == "token":
        found["tokamax's causal_conv1d_gated_delta_rule"] = others.tokamax_delta_rule(
            shape, Inputs(*args)
        )
    elif shape.prefills and len(set(shape.lengths)) == 1:
        found["tokamax's kimi_delta_attention"] = others.tokamax_kda(shape)
    return found


def _step(shape: Shape) -> Callable[..., Any]:
    """A token of every request, as one writes it for XLA."""

    def fn(*args: Any) -> tuple[jax.Array, jax.Array]:
        (q, k, v, pool, slots, _, _), named = _arguments(shape, Inputs(*args))
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        decays = jnp.exp(named["decay"].g)[:, None, None]
        states = pool[slots].astype(jnp.float32) * decays
        states += k[..., None] * v[..., None, :]
        o = jnp.einsum("nhk,nhkv->nhv", q, states) * shape.key_dim**-0.5
        out = pool.at[slots].set(states.astype(pool.dtype))
        return o.astype(shape.dtype).reshape(len(o), -1), out

    return fn


def cost(case: Case) -> Cost:
    """The recurrence's two products per token; rows and states moved once."""
    shape = _shape(case)
    dims = shape.heads * shape.key_dim * shape.value_dim
    width = 2 * shape.heads * (shape.key_dim + shape.value_dim)  # q, k, v and o
    written = shape.decodes if shape.drafts else len(shape.lengths)
    states = int(shape.resumes().sum()) + written + len(shape.kept)
    width += shape.heads * shape.value_dim if shape.around else 0  # the gate
    row_bytes = shape.tokens * width * jnp.dtype(shape.dtype).itemsize
    row_bytes += 2 * shape.tokens * shape.key_dim if shape.around else 0  # cosines and sines
    if shape.decay != "head":
        row_bytes += _specs(shape).g.size * 4
    row_bytes += 4 * shape.tokens * shape.heads * shape.delta
    return Cost(
        flops=4.0 * shape.tokens * dims,
        hbm_bytes=float(row_bytes + states * dims * jnp.dtype(shape.state).itemsize),
    )


def explain(case: Case, chip: str) -> gla.Explanation:
    """What `gla.explain` says."""
    shape = _shape(case)
    arrays, named = jax.eval_shape(lambda *args: _arguments(shape, Inputs(*args)), *_specs(shape))
    if shape.around == "unfused":
        named = {name: x for name, x in named.items() if name not in AROUND}
    return gla.explain(*arrays, **named, chip=chip, plan=_plan(case), **shape.options())


def figures(case: Case, report: Any) -> dict[str, float]:
    """Bundles of the steady loop per token and head and per decode and head, and of the batch."""
    shape = _shape(case)
    other = shape.drafts or shape.page or shape.around == "fused" or shape.delta
    if other:  # which take other paths through the kernel
        return {}
    plan = explain(case, report.chip).plan
    schedule = Schedule.of(report.kernel("gla"), plan)
    steps = shape.heads // plan.heads
    batch = steps * schedule.batch(shape.lengths, list(shape.resumes()))
    decode = schedule.request() + schedule.run() / ROWS
    return {
        "prefill bundles/token/head": schedule.steady() / (plan.window * plan.heads),
        "decode bundles/request/head": decode / plan.heads,
        "batch bundles": batch,
        "batch bundles/token/head": batch / (shape.tokens * shape.heads),
    }
