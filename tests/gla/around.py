"""Norms, rope and gate for the tests: random ones, and what they do in numpy float64."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import gla
from tests.gla import oracle


def random_prologue(seed, batch, rotary_dim=64):
    rng = np.random.default_rng(seed)
    tokens, _, key_dim = batch.q.shape
    angles = rng.uniform(0, 6, (tokens, rotary_dim // 2))
    weights = rng.uniform(0.5, 1.5, (2, key_dim)).astype(np.float32)
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    return gla.NormRope(jnp.asarray(weights[0]), jnp.asarray(weights[1]), cos, sin, eps=0.1)


def random_epilogue(seed, batch, heads_per_group=2):
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.5, 1.5, batch.v.shape[1:]).astype(np.float32)
    gate = rng.standard_normal(batch.v.shape).astype(batch.v.dtype)
    return gla.NormGate(jnp.asarray(weight), jnp.asarray(gate), heads_per_group, eps=0.1)


def norm_rope(x, weight, prologue):
    x, weight, cos, sin = map(oracle.wide, (x, weight, prologue.cos, prologue.sin))
    half = cos.shape[1]
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + prologue.eps) * weight
    turned = x.copy()
    for i in range(half):
        a, b = x[..., i], x[..., half + i]
        turned[..., i] = a * cos[:, i, None] - b * sin[:, i, None]
        turned[..., half + i] = b * cos[:, i, None] + a * sin[:, i, None]
    return turned


def norm_gate(o, epilogue):
    o, weight, gate = map(oracle.wide, (o, epilogue.weight, epilogue.gate))
    found = np.empty_like(o)
    size = epilogue.heads_per_group
    for first in range(0, o.shape[1], size):
        part = slice(first, first + size)
        mean = np.mean(o[:, part] ** 2, axis=(1, 2), keepdims=True)
        found[:, part] = o[:, part] / np.sqrt(mean + epilogue.eps) * weight[part]
    return found / (1 + np.exp(-gate))


def exact(batch, prologue=None, epilogue=None, **options):
    """Output and pool of the definitions, nothing rounded."""
    return _compose(batch, prologue, epilogue, oracle.exact, lambda x: x, **options)


def rounded(batch, prologue=None, epilogue=None, **cut):
    """Float64 arithmetic on what the layers round to bf16 between them, and the kernel inside."""
    bf16 = lambda x: x.astype(ml_dtypes.bfloat16)  # noqa: E731
    return _compose(batch, prologue, epilogue, oracle.rounded, bf16, **cut)


def _compose(batch, prologue, epilogue, run, between, **options):
    if prologue is not None:
        q, k = (
            between(norm_rope(x, weight, prologue))
            for x, weight in ((batch.q, prologue.q_weight), (batch.k, prologue.k_weight))
        )
        batch = dataclasses.replace(batch, q=q, k=k)
    o, pool = run(batch, **options)
    return (o if epilogue is None else norm_gate(between(o), epilogue)), pool
