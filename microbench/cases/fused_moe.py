"""Mixture-of-experts layers of published models, spread over the devices of a slice.

Sources: the configurations of the models in `transformers`; Ling-2.6-1T's deployment on 32 devices
from LMSYS's article on SGLang-JAX (16,384 tokens of prefill, 512 of decode), sizes of flash as far
as they follow from its 104 billion parameters. Weights are float8 with a scale per channel (per
block of 128 x 128 for DeepSeek-V3), activations are quantised per token; routing is drawn, grouped
as the model's router groups it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fused_moe
from microbench import peers as others
from microbench.case import Call, Case, Check, Cost
from microbench.static import longest_pass
from reference import fused_moe as reference
from tpukit import interpret

MODELS: dict[str, dict[str, Any]] = {
    "ling-2.6-1t": {"hidden": 8192, "inter": 2048, "experts": 256, "groups": 8},
    "ling-2.6-flash": {"hidden": 4096, "inter": 1024, "experts": 256, "groups": 8},
    "deepseek-v3": {"hidden": 7168, "inter": 2048, "experts": 256, "groups": 8, "block": 128},
    "qwen3-coder-480b": {"hidden": 6144, "inter": 2560, "experts": 160, "shared": 0},
    "qwen3-235b": {"hidden": 4096, "inter": 1536, "experts": 128, "shared": 0},
    "deepseek-v4-flash": {
        "hidden": 4096,
        "inter": 2048,
        "experts": 256,
        "top_k": 6,
        "limit": 10.0,
    },
    "deepseek-v4-pro": {"hidden": 7168, "inter": 3072, "experts": 384, "top_k": 6, "limit": 10.0},
    "qwen3-30b": {"hidden": 2048, "inter": 768, "experts": 128, "shared": 0},
    "gpt-oss-120b": {
        "hidden": 2880,
        "inter": 2880,
        "experts": 128,
        "top_k": 4,
        "shared": 0,
        "activation": "swigluoai",
        "limit": 7.0,
        "biased": True,
    },
}
TOPOLOGIES = {
    ("tpu7x", 8): "tpu7x:2x2x1",
    ("tpu7x", 32): "tpu7x:2x2x4",
    ("tpu7x", 64): "tpu7x:2x4x4",
    ("v6e", 8): "v6e:2x4",
    ("v5e", 8): "v5e:2x4",
}
AXIS = "expert"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The parameters of a case; tokens and experts are of all devices."""

    hidden: int
    inter: int
    experts: int
    tokens: int
    devices: int
    top_k: int = 8
    groups: int = 1
    shared: int = 1
    block: int = 0
    biased: bool = False
    activation: str = "silu"
    limit: float = 0.0
    dtype: str = "float8_e4m3fn"
    rows: str = "float8_e4m3fn"
    back: str = "bfloat16"
    wraps: bool = True

    @property
    def padded(self) -> Shape:
        """With the widths that the kernel needs."""
        weights = jax.eval_shape(fused_moe.pad, _weights(self))
        hidden, inter = weights.gate.shape[1:]
        return dataclasses.replace(self, hidden=hidden, inter=inter)

    def reduced(self, devices: int) -> Shape:
        """The same kind of layer, small enough for this machine."""
        return dataclasses.replace(
            self,
            hidden=512,
            inter=256,
            experts=8,
            tokens=48,
            devices=devices,
            top_k=min(self.top_k, 3),
            groups=min(self.groups, 4),
        )


class Inputs(NamedTuple):
    """Arrays of one call."""

    tokens: Any  # [T, hidden]
    routed: Any  # weights of the experts
    shared: Any  # of the shared one, or None
    ids: Any  # [T, top_k]
    expert_weights: Any  # [T, top_k]


def _case(model: str, name: str, tokens: int, devices: int, **more: Any) -> Case:
    shape = Shape(tokens=tokens, devices=devices, **{**MODELS[model], **more})
    return Case("fused_moe", f"{model}/{name}", dataclasses.asdict(shape))


BFLOAT16 = "bfloat16"
CASES = (
    _case("ling-2.6-1t", "prefill", 16384, 32),
    _case("ling-2.6-1t", "prefill-mesh", 16384, 32, wraps=False, back="float8_e4m3fn"),
    _case("ling-2.6-1t", "decode", 512, 32),
    _case("ling-2.6-flash", "prefill", 4096, 8),
    _case("ling-2.6-flash", "decode", 256, 8),
    _case("ling-2.6-flash", "int8", 256, 8, dtype="int8", rows=BFLOAT16),
    _case("deepseek-v3", "decode", 512, 32),
    _case("qwen3-coder-480b", "prefill", 2048, 8),
    _case("gpt-oss-120b", "decode", 1024, 8),
    _case("qwen3-30b", "one device", 128, 1),
)
MORE = (  # a layer of experts knows tokens only: those of drafts and of prompts are the same to it
    _case("deepseek-v3", "prefill", 16384, 32),
    _case("deepseek-v4-flash", "prefill", 4096, 8),
    _case("deepseek-v4-flash", "decode", 256, 8),
    _case("deepseek-v4-pro", "prefill", 16384, 32),
    _case("deepseek-v4-pro", "decode", 512, 32),
    _case("qwen3-235b", "prefill", 4096, 8),
    _case("qwen3-235b", "decode", 256, 8),
    _case("qwen3-235b", "speculative", 1024, 8),
    _case("qwen3-coder-480b", "decode", 256, 8),
    _case("gpt-oss-120b", "prefill", 8192, 8),
    _case("qwen3-30b", "prefill", 4096, 1),
)


def _shape(case: Case) -> Shape:
    params: dict[str, Any] = dict(case.params)
    return Shape(**params)


def _weights(shape: Shape, *, shared: bool = False) -> fused_moe.Weights:
    """Shapes of the weights."""
    lead = () if shared else (shape.experts,)
    narrow = shape.dtype != BFLOAT16

    def matrix(rows: int, columns: int) -> Any:
        return jax.ShapeDtypeStruct((*lead, rows, columns), jnp.dtype(shape.dtype))

    def scale(rows: int, columns: int) -> Any:
        blocks = rows // shape.block if shape.block else 1
        return jax.ShapeDtypeStruct((*lead, blocks, columns), jnp.float32) if narrow else None

    def bias(columns: int) -> Any:
        return jax.ShapeDtypeStruct((*lead, columns), jnp.float32) if shape.biased else None

    up, down = (shape.hidden, shape.inter), (shape.inter, shape.hidden)
    return fused_moe.Weights(
        matrix(*up),
        matrix(*up),
        matrix(*down),
        scale(*up),
        scale(*up),
        scale(*down),
        bias(shape.inter),
        bias(shape.inter),
        bias(shape.hidden),
    )


def _ids(shape: Shape, seed: int) -> np.ndarray:
    """Experts of each token: the best of random scores, of the best half of the groups."""
    scores = np.random.default_rng(seed).standard_normal((shape.tokens, shape.experts))
    ids, _ = fused_moe.route(
        jnp.asarray(scores, jnp.float32),
        top_k=shape.top_k,
        scoring="sigmoid",
        num_groups=shape.groups,
        top_groups=max(1, shape.groups // 2),
    )
    return np.asarray(ids)


def _specs(shape: Shape) -> Inputs:
    """Shapes of the inputs."""
    return Inputs(
        jax.ShapeDtypeStruct((shape.tokens, shape.hidden), jnp.bfloat16),
        _weights(shape),
        _weights(shape, shared=True) if shape.shared else None,
        jax.ShapeDtypeStruct((shape.tokens, shape.top_k), jnp.int32),
        jax.ShapeDtypeStruct((shape.tokens, shape.top_k), jnp.float32),
    )


def _inputs(shape: Shape, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)

    def values(spec: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = rng.standard_normal(spec.shape, dtype=np.float32)
        return jnp.asarray(drawn / np.sqrt(spec.shape[-2]) if drawn.ndim > 1 else drawn)

    def quantised(spec: fused_moe.Weights | None) -> fused_moe.Weights | None:
        if spec is None:
            return None
        wide = jax.tree.map(values, spec)
        bare = dataclasses.replace(wide, gate_scale=None, up_scale=None, down_scale=None)
        if shape.dtype == BFLOAT16:
            return jax.tree.map(lambda x, s: x.astype(s.dtype), bare, spec)
        return fused_moe.quantise(bare, shape.dtype, block=shape.block or None)

    specs = _specs(shape)
    return Inputs(
        jnp.asarray(rng.standard_normal(specs.tokens.shape), jnp.bfloat16),
        quantised(specs.routed),
        quantised(specs.shared),
        jnp.asarray(_ids(shape, seed)),
        jnp.asarray(rng.random(specs.expert_weights.shape), jnp.float32),
    )


def _options(shape: Shape) -> dict[str, Any]:
    """Keyword arguments that the reference takes as well."""
    return {
        "activation": shape.activation,
        "limit": shape.limit or None,
        "activation_dtype": None if shape.rows == BFLOAT16 else shape.rows,
    }


REDUCED_PLAN = fused_moe.Plan(64, 256, 512)  # several tiles even of a reduced layer


def _plan(fields: Mapping[str, Any]) -> fused_moe.Plan | None:
    """A case's plan, None for the kernel's own."""
    return fused_moe.Plan(**fields) if fields else None


def _kernel(shape: Shape, **options: Any) -> Callable[..., Any]:
    """The layer on this shape's devices, called with the fields of `Inputs`."""

    def device(tokens: Any, routed: Any, shared: Any, ids: Any, expert_weights: Any) -> jax.Array:
        return fused_moe.fused_moe(
            tokens,
            dataclasses.replace(routed, shared=shared),
            ids,
            expert_weights,
            axis_name=AXIS if shape.devices > 1 else None,
            return_dtype=shape.back,
            **_options(shape),
            **options,
        )

    if shape.devices == 1:
        return jax.jit(device)
    return jax.jit(lambda *args: jax.shard_map(device, in_specs=SPLIT, out_specs=SPLIT[0])(*args))


SPLIT = (jax.P(AXIS), jax.P(AXIS), jax.P(), jax.P(AXIS), jax.P(AXIS))


def inputs(case: Case, seed: int) -> Inputs:
    """See `microbench.case.Suite`, as for all that follows."""
    return _inputs(_shape(case), seed)


def timed(case: Case) -> Case:
    """A reduced layer: the weights of a full one are too large for one device."""
    small = dataclasses.asdict(_shape(case).reduced(1))
    return dataclasses.replace(case, name=f"{case.name} (reduced)", params=small)


def reference_fn(case: Case) -> Callable[..., Any]:
    """The reference."""
    shape = _shape(case)

    def fn(tokens: Any, routed: Any, shared: Any, ids: Any, expert_weights: Any) -> jax.Array:
        weights = dataclasses.replace(routed, shared=shared)
        return reference.fused_moe(tokens, weights, ids, expert_weights, **_options(shape))

    return jax.jit(fn)


def kernel_fn(case: Case) -> Callable[..., Any]:
    """The kernel on this machine's TPU."""
    return _kernel(_shape(case), implementation="pallas", plan=_plan(case.plan))


def check(case: Case, seed: int) -> list[Check]:
    """Compares a reduced layer on one device with the reference, interpreted where no TPU is."""
    shape = _shape(case).reduced(1)
    args = _inputs(shape, seed)
    # rows move as they do on the devices of the case: on one in bulk
    plan = dataclasses.replace(REDUCED_PLAN, bulk=int(_shape(case).devices == 1))
    if jax.default_backend() == "tpu":
        kernel = _kernel(shape, implementation="pallas", plan=plan)
        found = jax.block_until_ready(kernel(*args))
    else:
        with interpret.strict():
            kernel = _kernel(shape, implementation="interpret", plan=plan)
            found = jax.block_until_ready(kernel(*args))
    small = dataclasses.replace(case, params=dataclasses.asdict(shape))
    wanted = reference_fn(small)(*args)
    # a result that travels is rounded once more than the reference's
    limit = 0.03 if shape.back != BFLOAT16 else 0.004
    return [
        Check("output: relative error", _error(found, wanted, None), limit),
        Check("worst token: relative error", _error(found, wanted, 1), 2 * limit),
    ]


def _error(found: Any, wanted: Any, axis: int | None) -> float:
    found, wanted = (np.asarray(x).astype(np.float64) for x in (found, wanted))
    difference = np.sqrt(np.sum((found - wanted) ** 2, axis=axis))
    return float(np.max(difference / (np.sqrt(np.sum(wanted**2, axis=axis)) + 1e-30)))


def chips(case: Case) -> tuple[str, ...]:
    """Those that have the types and, in the table of topologies, as many devices."""
    shape = _shape(case)
    narrow = "float8_e4m3fn" in (shape.dtype, shape.rows, shape.back)
    named = [chip for chip, devices in TOPOLOGIES if devices == shape.devices]
    found = named if shape.devices > 1 else ["tpu7x", "v6e", "v5e"]
    return tuple(chip for chip in found if not (narrow and chip == "v5e"))


def aot_target(case: Case) -> tuple[str, dict[str, Any]]:
    """Names `build`."""
    arguments = {**case.params, "plan": dict(case.plan), "seed": 0}
    return "microbench.cases.fused_moe:build", arguments


def build(chip: str, seed: int, plan: Mapping[str, int], **params: Any) -> tuple[Any, ...]:
    """The full-size call, for chips that need not be present; ids are values."""
    shape = Shape(**params).padded
    args = _specs(shape)._replace(ids=_ids(shape, seed))
    fn = _kernel(shape, implementation="pallas", plan=_plan(plan))
    if shape.devices == 1:
        return fn, tuple(args), {}
    options = {
        "topology": TOPOLOGIES[chip, shape.devices],
        "mesh_axes": {AXIS: shape.devices},
        "in_specs": SPLIT,
    }
    return fn, tuple(args), options


def steered(case: Case, seed: int) -> Call:
    """`build` on one device."""
    _, arguments = aot_target(case)
    arguments["seed"] = seed
    fn, args, _ = build("", **arguments)
    return fn, args


def peers(case: Case, seed: int) -> Mapping[str, Call]:
    """On one device, sorted rows and grouped matmuls; XLA's collectives are not predicted."""
    shape = _shape(case).padded
    if shape.devices > 1:
        return {}
    _, args = steered(case, seed)
    found = {"sorted rows, lax.ragged_dot": (_kernel(shape, implementation="grouped"), args)}
    if shape.shared or shape.block or shape.biased:
        return found
    named = Inputs(*args)
    wide = named._replace(routed=others.widened(named.routed))
    found["sorted rows, lax.ragged_dot, bfloat16"] = others.grouped_moe(others.ragged_dot, wide)
    found["sorted rows, JAX's megablox gmm, bfloat16"] = others.grouped_moe(others.megablox, wide)
    if others.has_tokamax():
        found["sorted rows, tokamax's gmm_v2"] = others.grouped_moe(others.tokamax_grouped, named)
    return found


def cost(case: Case) -> Cost:
    """One device's share: products of all entries; its weights and its tokens moved once."""
    shape = _shape(case)
    share = 1 / shape.devices
    rows = shape.tokens * (shape.top_k + shape.shared) * share
    experts = shape.experts * share + shape.shared
    weights = 3 * shape.hidden * shape.inter
    token_bytes = 4 * shape.tokens * shape.hidden * share  # bfloat16, read and written
    return Cost(
        flops=2.0 * rows * weights,
        hbm_bytes=experts * weights * jnp.dtype(shape.dtype).itemsize + token_bytes,
    )


def explain(case: Case, chip: str) -> fused_moe.Explanation:
    """What `fused_moe.explain` says."""
    shape = _shape(case).padded
    share = dataclasses.replace(
        shape, tokens=shape.tokens // shape.devices, experts=shape.experts // shape.devices
    )
    tokens, routed, shared, ids, expert_weights = _specs(share)
    return fused_moe.explain(
        tokens,
        dataclasses.replace(routed, shared=shared),
        ids,
        expert_weights,
        chip=chip,
        axes=[(AXIS, shape.devices)] if shape.devices > 1 else [],
        return_dtype=shape.back,
        plan=_plan(case.plan),
        **_options(shape),
    )


def figures(case: Case, report: Any) -> dict[str, float]:
    """Bundles of one whole tile of a routed expert, its transfers left out, and MXU use."""
    shape = _shape(case).padded
    plan = explain(case, report.chip).plan
    kernel = report.kernel("fused_moe")
    products = [loop for loop in kernel.loops if loop.ops.matmuls]
    visit = products[-1].path.split("/")[0]
    inside = [x for x in kernel.loops if x.path.startswith(f"{visit}/") and x.depth == 2]
    # unpacking, narrowing and packing go through a tile in groups of 32 rows
    groups = [x for x in inside if x.ops.vstore > 8 and not x.ops.matmuls]
    tile = sum(loop.bundles for loop in groups) * plan.tile // 32
    # a product of a single slice is no loop of its own, but a conditional part of the visit
    slices = (shape.inter // plan.inter_slice, shape.hidden // plan.hidden_slice)
    loops = [loop for loop in inside if loop.ops.matmuls]
    several = [count for count in slices if count > 1]
    tile += sum(longest_pass(x) * count for x, count in zip(loops, several, strict=True))
    (body,) = (loop for loop in kernel.loops if loop.path == visit)
    tile += _whole_products(body, slices.count(1))
    largest = max((r for x in (body, *loops) for r in x.regions), key=lambda r: r.ops.matmuls)
    return {
        "tile": plan.tile,
        "tile bundles": tile,
        "bundles/row": tile / plan.tile,
        "FFN1 MXU slots %": 100 * largest.ops.mxu / (2 * largest.bundles),
        "scratch MB": report.temp_bytes / 1e6,
    }


def _whole_products(body: Any, count: int) -> int:
    """Bundles of a loop's largest products: it has others, for smaller tiles."""
    matmuls: Counter[Any] = Counter()
    bundles: Counter[Any] = Counter()
    for region in body.regions:
        matmuls[frozenset(region.guards)] += region.ops.matmuls
        bundles[frozenset(region.guards)] += region.bundles
    return sum(bundles[guards] for guards, _ in matmuls.most_common(count))
