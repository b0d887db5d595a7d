"""A small Ling-style model: one layer of latent attention to several of linear attention.

The layers are those of `microbench.stack.layer`, which are compiled at their real sizes elsewhere;
here are the embedding, the step of all layers, and what a server needs besides: the keys and values
of drafts, to advance states by those that are accepted.

All matrices have float8 values. Only the experts round rows to float8, and the others are float32:
rounding again and again makes as much noise of any last bit as float8 has, and hides faults in it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

import gla
import ragged_attention
from microbench.stack import steps
from microbench.stack.layer import (
    DEVICES,
    TENSOR,
    Batch,
    Config,
    Linear,
    Mla,
    drafted,
    experts,
    lightning,
    mla,
    rms_norm,
)
from tests.stack import small

VOCABULARY = 64
HEADS = jax.P(None, TENSOR)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on `tensor` devices.

    Attributes:
      config: sizes.
      kinds: of its layers.
      weights: of its layers.
      embedding: [VOCABULARY, hidden] f32.
      head: [hidden, VOCABULARY] f32.
    """

    config: Config
    kinds: tuple[str, ...]
    weights: tuple
    embedding: jax.Array
    head: jax.Array

    @property
    def mesh(self):
        """Its devices."""
        count = self.config.tensor
        return Mesh(np.array(jax.devices()[:count]).reshape(1, count), DEVICES)


def bfloat16(x):
    """Rounds x; a mere change of type is left out where XLA sees that it is changed back."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def wide(x):
    """A matrix of attention as float32."""
    return x._replace(weight=x.weight.astype(jnp.float32)) if isinstance(x, Linear) else x


def make(kinds, tensor=1):
    """A model with drawn weights."""
    config = small.config(1, tensor, heads=8, norm_groups=8)
    rng = np.random.default_rng(0)
    specs = tuple(steps.weights(config, kind)[0] for kind in kinds)
    held = small.place(specs, jax.P(), ".weights", lambda _, value, __: jnp.asarray(value), rng)
    held = jax.tree.map(wide, held, is_leaf=lambda x: isinstance(x, Linear))
    embedding, head = rng.standard_normal((2, VOCABULARY, config.hidden), np.float32)
    return Model(config, tuple(kinds), held, jnp.asarray(embedding), jnp.asarray(head.T))


def stores_of(model, pages, slots):
    """A cache of latents, or states, for each layer."""
    c = model.config

    def store(kind):
        if kind == "mla":
            sizes = c.page_size, c.kv_rank, c.rope
            return ragged_attention.allocate_mla_cache(pages, *sizes, jnp.float32)
        return jnp.zeros((slots, c.heads, c.dim, c.dim), jnp.float32)

    return tuple(map(store, model.kinds))


def one_layer(config, x, weights, store, batch):
    """As `layer.layer`, and the keys and values of linear attention."""
    y = lax.all_gather(rms_norm(x, weights.first_norm), TENSOR, axis=0, tiled=True)
    if isinstance(weights.attention, Mla):
        kept = None
        y, store = mla(config, y, weights.attention, store, batch)
    else:
        kept = drafted(config, y, weights.attention, batch)
        y, store = lightning(config, y, weights.attention, store, batch)
    x += lax.psum_scatter(y, TENSOR, scatter_dimension=0, tiled=True)
    y = bfloat16(rms_norm(x, weights.second_norm))
    return x + bfloat16(experts(config, y, weights, batch)), store, kept


@functools.cache
def program(config, kinds):
    """The jitted step of all layers."""
    split = tuple(steps.weights(config, kind)[1] for kind in kinds)
    kept = tuple(jax.P() if kind == "mla" else HEADS for kind in kinds)

    def device(x, weights, stores, batch):
        found, drafts = [], []
        for held, store in zip(weights, stores, strict=True):
            x, store, made = one_layer(config, x, held, store, batch)
            found.append(store)
            drafts.append(made)
        return x, tuple(found), tuple(drafts)

    @functools.partial(jax.jit, donate_argnums=4)
    def run(embedding, head, weights, tokens, stores, batch):
        x, stores, drafts = jax.shard_map(
            device,
            in_specs=(jax.P(DEVICES), split, kept, jax.P()),
            out_specs=(jax.P(DEVICES), kept, kept),
            check_vma=False,
        )(embedding[tokens], weights, stores, batch)
        return rms_norm(x, 1.0) @ head, stores, drafts

    return run


def step(model, tokens, stores, batch):
    """Logits [T, VOCABULARY] of a batch, the stores, and the keys and values of each layer."""
    with jax.set_mesh(model.mesh):
        run = program(model.config, model.kinds)
        return run(model.embedding, model.head, model.weights, tokens, stores, batch)


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
