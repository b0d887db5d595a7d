"""Routing: from a router's logits to the experts of each token, in plain JAX."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from tpukit import checks
from tpukit.errors import ArgumentError

Scoring = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]


def route(
    logits: jax.Array,
    *,
    top_k: int,
    scoring: Scoring = "softmax",
    bias: jax.Array | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: GroupScore = "top2",
    renormalise: bool = True,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Chooses the experts of each token.

    Args:
      logits: [T, num_experts] of the router; computed in float32.
      top_k: experts of a token.
      scoring: softmax over all experts, or a sigmoid of each.
      bias: [num_experts] float32, added to the scores for choosing but not for weighing
        (DeepSeek-V3's correction for load balance), or None.
      num_groups: groups of consecutive experts; only those of the best groups can be chosen.
      top_groups: how many groups are the best.
      group_score: a group's score: that of its best expert (DeepSeek-V2), or the sum of its best
        two (DeepSeek-V3, Ling).
      renormalise: weights of a token add up to `scale`.
      scale: of the weights (DeepSeek's routed scaling factor).

    Returns:
      expert_ids [T, top_k] int32, best first, and expert_weights [T, top_k] float32. Of equal
      scores the lower id is better.

    Raises:
      ArgumentError: sizes that do not fit.

    Sources: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv 2412.19437).
    """
    dims = checks.Dims("route")
    dims.bind("logits", logits, "tokens num_experts")
    if bias is not None:
        dims.bind("bias", bias, "num_experts")
    num_experts = dims["num_experts"]
    checks.check_choice("route", "scoring", scoring, get_args(Scoring))
    checks.check_choice("route", "group_score", group_score, get_args(GroupScore))
    checks.check_range("route", "num_groups", num_groups, 1, num_experts)
    checks.check_range("route", "top_groups", top_groups, 1, num_groups)
    checks.check_multiple("route", "num_experts", num_experts, num_groups, "Groups are equal.")
    size = num_experts // num_groups
    checks.check_range("route", "top_k", top_k, 1, size * top_groups)
    if group_score == "top2" and num_groups > 1:
        checks.check_range("route", "experts of a group", size, 2)

    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1) if scoring == "softmax" else jax.nn.sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if num_groups > 1:
        groups = choice.reshape(-1, num_groups, size)
        best = jnp.max(groups, axis=-1)
        if group_score == "top2":  # not by `top_k`, which sorts them all
            first = jnp.argmax(groups, axis=-1, keepdims=True)
            others = jnp.where(jnp.arange(size) == first, -jnp.inf, groups)
            best += jnp.max(others, axis=-1)
        _, kept = lax.top_k(best, top_groups)
        keep = jnp.any(kept[:, :, None] == jnp.arange(num_groups), axis=1)
        choice = jnp.where(keep[:, :, None], groups, -jnp.inf).reshape(-1, num_experts)
    _, ids = lax.top_k(choice, top_k)
    weights = jnp.take_along_axis(scores, ids, axis=1)
    if renormalise:
        weights /= jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-20)
    return ids.astype(jnp.int32), weights * scale


def to_physical(expert_ids: jax.Array, replicas: jax.Array, *, first_token: int = 0) -> jax.Array:
    """Ids of physical experts, of which a logical expert may have several to balance the load.

    The replicas of an expert take turns over the tokens.

    Args:
      expert_ids: [T, top_k] int32 logical ids; those outside [0, num_logical) become -1.
      replicas: [num_logical, most] int32: each logical expert's physical ids, first, then -1.
      first_token: number of the first token, so that devices do not all begin with one replica.

    Raises:
      ArgumentError: wrong shapes or types.
    """
    dims = checks.Dims("to_physical")
    dims.bind("expert_ids", expert_ids, "tokens top_k")
    dims.bind("replicas", replicas, "num_logical most")
    for name, array in (("expert_ids", expert_ids), ("replicas", replicas)):
        checks.check_dtype("to_physical", name, array, (jnp.int32,))
    if 0 in replicas.shape:
        raise ArgumentError(
            where="to_physical",
            argument="replicas",
            got=f"has shape {replicas.shape}",
            expected="at least one replica of at least one expert",
        )
    counts = jnp.maximum(jnp.sum(replicas >= 0, axis=1), 1)
    known = (expert_ids >= 0) & (expert_ids < replicas.shape[0])
    logical = jnp.where(known, expert_ids, 0)
    turn = (jnp.arange(expert_ids.shape[0])[:, None] + first_token) % counts[logical]
    return jnp.where(known, replicas[logical, turn], -1)
