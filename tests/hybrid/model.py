"""A small Ling-style model: latent attention in one layer of several, linear in the others.

The layers are those of `microbench.stack.layer`, which are compiled at their real sizes elsewhere;
here are the embedding, the step of all layers, and what a server needs besides: to advance states
by the drafts that are accepted.

All matrices have float8 values, rows are float32: rounding them again and again makes as much noise
of any last bit as float8 has, which other choices of experts then multiply, and hides faults in it.
Of a model with `rows` the experts round theirs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

import gla
import ragged_attention
from microbench.stack import steps
from microbench.stack.layer import DEVICES, TENSOR, Batch, Config, layer, rms_norm
from tests.stack import small

VOCABULARY = 64
MODEL = {
    "heads": 8,
    "norm_groups": 8,
    "experts": 32,
    "top_k": 8,
    "groups": 8,
    "top_groups": 4,
}
KEPT = {"mla": jax.P(), "lightning": jax.P(None, TENSOR)}  # how the stores are split


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on `tensor` devices.

    Attributes:
      config: sizes.
      kinds: of its layers.
      weights: of its layers, on one device.
      shards: the same, on all.
      embedding: [VOCABULARY, hidden] f32.
      head: [hidden, VOCABULARY] f32.
    """

    config: Config
    kinds: tuple[str, ...]
    weights: tuple
    shards: tuple
    embedding: jax.Array
    head: jax.Array


def make(kinds, tensor=1, rows=None):
    """A model with drawn weights, its experts small where they need not fit the kernel."""
    sizes = {"hidden": 256, "inter": 64} if rows is None else {}
    config = small.config(1, tensor, rows=rows, **MODEL, **sizes)
    shapes = [steps.weights(config, kind) for kind in kinds]
    specs, splits = (tuple(pair[n] for pair in shapes) for n in (0, 1))

    def drawn(name, value, _):
        return jnp.asarray(value, jnp.float32 if ".attention" in name else value.dtype)

    def spread(split):
        return NamedSharding(mesh_of(config), split)

    rng = np.random.default_rng(0)
    held = small.place(specs, jax.P(), ".weights", drawn, rng)
    shards = jax.device_put(held, jax.tree.map(spread, splits, is_leaf=small.is_split))
    embedding, head = rng.standard_normal((2, VOCABULARY, config.hidden), np.float32)
    return Model(config, tuple(kinds), held, shards, jnp.asarray(embedding), jnp.asarray(head.T))


def mesh_of(config):
    """Its devices."""
    return Mesh(np.array(jax.devices()[: config.tensor]).reshape(1, -1), DEVICES)


def stores_of(model, pages, slots):
    """A cache of latents, or states, for each layer."""
    c, mesh = model.config, mesh_of(model.config)

    def store(kind) -> Any:  # of either type
        if kind == "mla":
            sizes = c.page_size, c.kv_rank, c.rope
            made = ragged_attention.allocate_mla_cache(pages, *sizes, jnp.float32)
        else:
            made = jnp.zeros((slots, c.heads, c.dim, c.dim), jnp.float32)
        return jax.device_put(made, NamedSharding(mesh, KEPT[kind]))

    return tuple(map(store, model.kinds))


@functools.cache
def program(config, kind):
    """The jitted step of a layer: one program for all of a kind."""
    split, rows, kept = steps.weights(config, kind)[1], jax.P(DEVICES), KEPT[kind]

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def run(x, weights, store, batch):
        return jax.shard_map(
            functools.partial(layer, config),
            mesh=mesh_of(config),
            in_specs=(rows, split, kept, jax.P()),
            out_specs=(rows, kept, kept),
            check_vma=False,
        )(x, weights, store, batch)

    return run


@jax.jit
def unembed(head, x):
    """Logits of rows."""
    return rms_norm(x, jnp.float32(1)) @ head


def one_layer(model, number, x, store, batch):
    """Rows behind a layer, its store, and keys and values of drafts in linear attention."""
    return program(model.config, model.kinds[number])(x, model.shards[number], store, batch)


def step(model, tokens, stores, batch):
    """Logits [T, VOCABULARY] of a batch, the stores, and what each layer keeps of drafts."""
    rows, found, drafts = NamedSharding(mesh_of(model.config), jax.P(DEVICES)), [], []
    x = jax.device_put(model.embedding[tokens], rows)
    for number, store in enumerate(stores):
        x, store, made = one_layer(model, number, x, store, batch)
        found.append(store)
        drafts.append(made)
    return unembed(model.head, x), tuple(found), tuple(drafts)


@functools.partial(jax.jit, static_argnames="implementation", donate_argnums=3)
def accept(weights, k, v, states, batch, words, implementation):
    """States of a layer after the drafts whose bits are set in words [N, 2]."""
    return gla.commit(
        k,
        v,
        states,
        batch.slot_ids,
        batch.cu_q_lens,
        batch.has_state,
        words,
        decay=gla.HeadDecay(weights.attention.decay),
        implementation=implementation,
    )


@functools.partial(jax.jit, donate_argnums=0)
def move_latents(cache, source, target):
    """Copies tokens of a cache of latents: from each (page, place) to another; page -1 is none."""
    latents, _ = cache.unpack()
    rows = latents[source[:, 0], source[:, 1]]
    lengths, offsets = target[:, 1] + 1, jnp.arange(len(target) + 1)
    return ragged_attention.update_kv_cache(
        rows, None, cache, lengths, offsets, target[:, 0], offsets
    )


__all__ = ["Batch", "Model", "accept", "make", "move_latents", "step", "stores_of"]
