"""The model as one would write it first: a whole sequence at once, no pages, slots or batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import fused_moe
from microbench.stack.layer import Mla, project, rms_norm, rotate, rotation, rounded
from reference import fused_moe as reference
from tests.hybrid.model import unembed


@functools.partial(jax.jit, static_argnums=0)
def _layer(config, x, layer):
    """Rows [n, hidden] behind a layer: one program for all of a kind."""
    attend = latent if isinstance(layer.attention, Mla) else linear
    x += attend(config, rms_norm(x, layer.first_norm), layer.attention)
    return x + mixture(config, rms_norm(x, layer.second_norm), layer)


def logits(model, tokens, length):
    """Logits [n, VOCABULARY] of a sequence [n], computed as one of `length`."""
    x = model.embedding[np.pad(tokens, (0, length - len(tokens)))]
    for layer in model.weights:
        x = _layer(dataclasses.replace(model.config, tensor=1), x, layer)
    return np.asarray(unembed(model.head, x))[: len(tokens)]


def distance(n):
    """[n, n] how many tokens column j is before row i."""
    return jnp.arange(n)[:, None] - jnp.arange(n)


def latent(config, x, w):
    """Multi-head latent attention, keys and values of every head in full."""
    n, heads = len(x), config.heads
    cos, sin = rotation(jnp.arange(n), config.rope)
    q = rms_norm(project(x, w.q_down), w.q_norm)
    nope, rope = (project(q, m).reshape(n, heads, -1) for m in (w.q_nope, w.q_rope))
    low = rms_norm(project(x, w.kv_down), w.kv_norm).astype(jnp.float32)
    shared = rotate(project(x, w.k_rope)[:, None], cos, sin)[:, 0]
    lift = w.k_up[:, : config.nope, : config.kv_rank].astype(jnp.float32)
    keys = jnp.einsum("nr,hdr->nhd", low, lift)
    values = jnp.einsum("nr,hrd->nhd", low, w.v_up.astype(jnp.float32))
    scores = jnp.einsum("ihd,jhd->hij", nope.astype(jnp.float32), keys)
    scores += jnp.einsum(
        "ihd,jd->hij", rotate(rope, cos, sin), shared, preferred_element_type=jnp.float32
    )
    scores *= (config.nope + config.rope) ** -0.5
    weights = jax.nn.softmax(jnp.where(distance(n) >= 0, scores, -jnp.inf))
    o = jnp.einsum("hij,jhd->ihd", weights, values)
    return project(o.reshape(n, -1).astype(x.dtype), w.out)


def linear(config, x, w):
    """Linear attention with a constant decay per head, as a masked product."""
    n, heads, dim = len(x), config.heads, config.dim
    cos, sin = rotation(jnp.arange(n), config.rotary)
    q, k, v, gate = (project(x, m).reshape(n, heads, dim) for m in (w.q, w.k, w.v, w.gate))

    def prepare(y, weight):
        y = rms_norm(y.reshape(n * heads, dim), weight).reshape(n, heads, dim)
        turned = rotate(y[..., : config.rotary], cos, sin)
        return jnp.concatenate([turned, y[..., config.rotary :]], axis=2).astype(jnp.float32)

    decay = jnp.exp(w.decay[:, None, None] * jnp.maximum(distance(n), 0))
    decay = jnp.where(distance(n) >= 0, decay, 0.0)
    scores = jnp.einsum("ihd,jhd->hij", prepare(q, w.q_norm), prepare(k, w.k_norm)) * decay
    o = jnp.einsum("hij,jhd->ihd", scores * dim**-0.5, v.astype(jnp.float32))
    groups = o.reshape(n, config.norm_groups, -1)
    groups /= jnp.sqrt(jnp.mean(groups**2, axis=2, keepdims=True) + 1e-6)
    o = groups.reshape(o.shape) * w.o_norm * jax.nn.sigmoid(gate.astype(jnp.float32))
    return project(o.reshape(n, -1).astype(x.dtype), w.out)


def mixture(config, x, layer):
    """Router and experts."""
    ids, weights = fused_moe.route(
        jnp.dot(x, layer.router, preferred_element_type=jnp.float32),
        top_k=config.top_k,
        scoring="sigmoid",
        bias=layer.bias,
        num_groups=config.groups,
        top_groups=config.top_groups,
        scale=config.scale,
    )
    held = fused_moe.Weights(
        **{name: getattr(layer.experts, name) for name in layer.experts.__dataclass_fields__}
        | {"shared": layer.shared}
    )
    if config.rows is None:
        return reference.fused_moe(x, held, ids, weights)
    rows = rounded(x).astype(jnp.bfloat16)
    found = reference.fused_moe(rows, held, ids, weights, activation_dtype=config.rows)
    return rounded(found.astype(x.dtype))
