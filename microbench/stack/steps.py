"""Layers of Ling-2.6 at their real sizes: a step that decodes, and one that also reads prompts.

Ling-2.6-1T on 32 devices of tpu7x (8 along data, 4 along tensor) with 512 requests, or 16,384
tokens, a step, as in LMSYS's article on SGLang-JAX; Ling-2.6-flash on 8 devices with 256 requests,
or 4,096 tokens. A step with prompts has per data rank 48 requests that decode and 4 chunks of 500
tokens. Every request has `kv_len` tokens by the end of the step; routing is drawn, of half of the
groups, as the router would choose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fused_moe
import ragged_attention
from microbench.stack.layer import (
    DEVICES,
    FLOAT8,
    TENSOR,
    Batch,
    Config,
    Kind,
    Layer,
    Lightning,
    Linear,
    Mla,
    layer,
)

CONFIGS = {
    "ling-2.6-1t": Config(8192, 64, 2048, layers=80, data=8, tensor=4),
    "ling-2.6-flash": Config(4096, 32, 1024, layers=32, data=2, tensor=4),
}
TOPOLOGIES = {
    ("tpu7x", 8): "tpu7x:2x2x1",
    ("tpu7x", 32): "tpu7x:2x2x4",
    ("v6e", 8): "v6e:2x4",
    ("v6e", 16): "v6e:4x4",
    ("v6e", 64): "v6e:8x8",
}
KINDS: tuple[Kind, ...] = ("mla", "lightning")


@dataclasses.dataclass(frozen=True)
class Step:
    """What a data rank does in a step.

    Attributes:
      q_lens: new tokens of each request.
      kv_len: tokens of each request, these included.
    """

    q_lens: tuple[int, ...]
    kv_len: int = 4096

    @property
    def tokens(self) -> int:
        """New tokens."""
        return sum(self.q_lens)


def step_of(name: str, config: Config) -> Step:
    """The step called "decode" or "prompts"."""
    if name == "decode":
        return Step((1,) * (64 if config.data > 2 else 128))
    return Step((1,) * 48 + (500,) * 4)


def spec(*shape: int, dtype: Any = jnp.float32) -> Any:
    """The shape of an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def matrix(inputs: int, outputs: int) -> Linear:
    """Shapes of a matrix."""
    return Linear(spec(inputs, outputs, dtype=FLOAT8), spec(1, outputs))


COLUMNS = Linear(jax.P(None, TENSOR), jax.P(None, TENSOR))  # each device has some outputs
ROWS = Linear(jax.P(TENSOR), jax.P())  # each device has some inputs
WHOLE = jax.P()


def attention_weights(config: Config, kind: Kind) -> tuple[Any, Any]:
    """Shapes of the weights of attention, and how they are split."""
    heads, hidden = config.heads, config.hidden
    if kind == "mla":
        width = config.kv_rank + config.rope
        shapes = Mla(
            q_down=matrix(hidden, config.q_rank),
            kv_down=matrix(hidden, config.kv_rank),
            k_rope=matrix(hidden, config.rope),
            q_norm=spec(config.q_rank),
            kv_norm=spec(config.kv_rank),
            q_nope=matrix(config.q_rank, heads * config.nope),
            q_rope=matrix(config.q_rank, heads * config.rope),
            k_up=spec(heads, config.nope + config.rope, width, dtype=jnp.bfloat16),
            v_up=spec(heads, config.kv_rank, config.value_dim, dtype=jnp.bfloat16),
            out=matrix(heads * config.value_dim, hidden),
        )
        split = Mla(
            **dict.fromkeys(Mla._fields[:5], WHOLE),
            q_nope=COLUMNS,
            q_rope=COLUMNS,
            k_up=jax.P(TENSOR),
            v_up=jax.P(TENSOR),
            out=ROWS,
        )
        return shapes, split
    inner = matrix(hidden, heads * config.dim)
    shapes = Lightning(
        **dict.fromkeys(Lightning._fields[:4], inner),
        q_norm=spec(config.dim),
        k_norm=spec(config.dim),
        o_norm=spec(heads, config.dim),
        decay=spec(heads),
        out=matrix(heads * config.dim, hidden),
    )
    split = Lightning(
        **dict.fromkeys(Lightning._fields[:4], COLUMNS),
        q_norm=WHOLE,
        k_norm=WHOLE,
        o_norm=jax.P(TENSOR),
        decay=jax.P(TENSOR),
        out=ROWS,
    )
    return shapes, split


def weights(config: Config, kind: Kind) -> tuple[Layer, Layer]:
    """Shapes of the weights of a layer, and how they are split."""

    def moe(*lead: int) -> fused_moe.Weights:
        up, down = (*lead, config.hidden, config.inter), (*lead, config.inter, config.hidden)
        matrices = (spec(*size, dtype=FLOAT8) for size in (up, up, down))
        scales = (spec(*lead, 1, size) for size in (config.inter, config.inter, config.hidden))
        return fused_moe.Weights(*matrices, *scales)

    shapes, split = attention_weights(config, kind)
    found = Layer(
        first_norm=spec(config.hidden),
        second_norm=spec(config.hidden),
        attention=shapes,
        router=spec(config.hidden, config.experts, dtype=jnp.bfloat16),
        bias=spec(config.experts),
        experts=moe(config.experts),
        shared=moe(),
    )
    return found, Layer(WHOLE, WHOLE, split, WHOLE, WHOLE, jax.P(DEVICES), WHOLE)


def store(config: Config, kind: Kind, step: Step) -> tuple[Any, Any]:
    """Shape of the cache or of the states of all devices, and how they are split."""
    requests = len(step.q_lens)
    if kind == "lightning":
        size = (config.data * requests, config.heads, config.dim, config.dim)
        return spec(*size), jax.P("data", TENSOR)
    pages = requests * -(-step.kv_len // config.page_size)
    dims = config.page_size, config.kv_rank, config.rope
    cache = jax.eval_shape(lambda: ragged_attention.allocate_mla_cache(config.data * pages, *dims))
    return cache, jax.P("data")


def batch(config: Config, step: Step, seed: int) -> tuple[Batch, Batch]:
    """The requests of all data ranks, which are alike, and how they are split."""
    rng, requests = np.random.default_rng(seed), len(step.q_lens)
    pages = -(-step.kv_len // config.page_size)
    q_lens = np.array(step.q_lens)
    positions = np.concatenate([np.arange(step.kv_len - n, step.kv_len) for n in step.q_lens])
    tokens = config.data * step.tokens
    table, slots = rng.permutation(requests * pages), rng.permutation(requests)
    scores = jnp.asarray(rng.standard_normal((tokens, config.experts)), jnp.float32)
    ids, _ = fused_moe.route(
        scores,
        top_k=config.top_k,
        scoring="sigmoid",
        num_groups=config.groups,
        top_groups=config.top_groups,
    )

    def ranks(values: Any, dtype: Any = np.int32) -> np.ndarray:
        return np.tile(np.asarray(values, dtype), config.data)

    found = Batch(
        positions=ranks(positions),
        cu_q_lens=ranks(np.concatenate([[0], np.cumsum(q_lens)])),
        kv_lens=ranks([step.kv_len] * requests),
        page_indices=ranks(table),
        page_offsets=ranks(np.arange(requests + 1) * pages),
        slot_ids=ranks(slots),
        has_state=ranks([True] * requests, np.bool_),
        forced=np.bool_(True),
        expert_ids=np.asarray(ids),
    )
    ranked = dict.fromkeys(Batch._fields[:7], jax.P("data"))
    return found, Batch(**ranked, forced=WHOLE, expert_ids=jax.P(DEVICES))


def whole_step(
    config: Config, kinds: Sequence[Kind], step: Step, seed: int = 0
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
    """A function of all devices, its arguments and how they are split.

    The arguments are tokens, weights and stores of each layer, and the batch, whose values are
    known; the results tokens and stores.
    """
    found, split = zip(*(weights(config, kind) for kind in kinds), strict=True)
    stores, store_split = zip(*(store(config, kind, step) for kind in kinds), strict=True)
    requests, batch_split = batch(config, step, seed)
    x = spec(config.data * step.tokens, config.hidden, dtype=jnp.bfloat16)
    splits = (jax.P(DEVICES), split, store_split, batch_split)

    def device(x: Any, found: Any, stores: Any, requests: Batch) -> tuple[Any, Any]:
        kept = []
        for w, held in zip(found, stores, strict=True):
            x, held, _ = layer(config, x, w, held, requests)
            kept.append(held)
        return x, tuple(kept)

    def run(*args: Any) -> Any:
        # Latents are the same on all devices along "tensor", which JAX cannot see of a kernel.
        outs = (splits[0], store_split)
        return jax.shard_map(device, in_specs=splits, out_specs=outs, check_vma=False)(*args)

    return jax.jit(run, donate_argnums=(0, 2)), (x, found, stores, requests), splits


def build(
    chip: str,
    model: str,
    kinds: Sequence[Kind],
    step: str,
    seed: int = 0,
    mesh: Sequence[int] | None = None,
) -> tuple[Any, ...]:
    """A target for `tpukit.aot` and `tpukit.predict`: layers of a model in a step.

    Args:
      chip: a name in `tpukit.chips`.
      model: a name in CONFIGS.
      kinds: "mla" or "lightning", for each layer.
      step: "decode" or "prompts".
      seed: of page tables and routing.
      mesh: devices along data and tensor, instead of the model's own.
    """
    config = CONFIGS[model]
    if mesh is not None:
        config = dataclasses.replace(config, data=mesh[0], tensor=mesh[1])
    fn, args, splits = whole_step(config, kinds, step_of(step, config), seed)
    options = {
        "topology": TOPOLOGIES[chip, config.data * config.tensor],
        "mesh_axes": {"data": config.data, TENSOR: config.tensor},
        "in_specs": splits,
    }
    return fn, args, options
