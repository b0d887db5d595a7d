"""The public functions on states: drafts that were accepted, and copies of slots."""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp

from gla.api import Call, Implementation, check_words, choose, launch, problem_of
from gla.plan import Plan, plan_for
from gla.values import accepted_rules, value_rules
from reference import gla as reference
from reference import gla_drafts
from reference.gla import Decay
from tpukit import checks


def commit(
    k: jax.Array,
    v: jax.Array,
    state_pool: jax.Array,
    slot_ids: jax.Array,
    cu_seqlens: jax.Array,
    has_state: jax.Array,
    accepted: jax.Array,
    *,
    decay: Decay,
    batch_invariant: bool = False,
    implementation: Implementation = "auto",
    plan: Plan | None = None,
    validate: bool = False,
) -> jax.Array:
    """Advances states by the drafts that were accepted, after `gla` has verified them.

    The kernel of `gla`, without queries and outputs: each state is read and written once, in place
    (donate the pool); a request of which nothing is accepted moves nothing.

    Args:
      k, v: [tokens, qk_heads, key_dim] and [tokens, heads, value_dim], the drafts' own.
      state_pool, slot_ids, cu_seqlens, has_state, decay: as `gla` had them.
      accepted: [requests, 1 or 2] uint32: bit d of word w accepts a request's draft 32 w + d. For
        the first n drafts of a chain that is 2 ** n - 1, for a path in a tree the words
        `Drafts.ancestors` of its last draft. Bits past the request's rows do not count.
      batch_invariant, implementation, plan, validate: as in `gla`.

    Returns:
      The new pool: that of `gla` on the accepted tokens alone.

    Raises:
      ArgumentError, UnsupportedError: as `gla`.

    Source: KVBuffer (arXiv 2605.19049).
    """
    batch = (slot_ids, cu_seqlens, has_state)
    problem = problem_of(None, k, v, state_pool, *batch, decay, batch_invariant, where="commit")
    dims = checks.Dims("commit")
    dims.bind("slot_ids", slot_ids, "requests")
    check_words("commit", dims, "accepted", accepted, "requests")
    checks.check_choice("commit", "implementation", implementation, get_args(Implementation))
    if validate:
        rules = value_rules(slot_ids, cu_seqlens, decay, state_pool.shape[0], v.shape[0])
        checks.raise_if_bad("commit", rules + accepted_rules(accepted, cu_seqlens))
    chosen, target = choose(implementation, problem, plan)
    if chosen == "reference" or not problem.any_work:
        options = {"decay": decay, "run": reference.chunked}
        return gla_drafts.commit(k, v, state_pool, *batch, accepted, **options)
    rows, bounds = gla_drafts.accepted_rows(accepted, cu_seqlens, v.shape[0])
    arrays = (None, k[rows], v[rows], state_pool)
    decay = gla_drafts.rows_of(decay, rows)
    call = Call(arrays, (slot_ids, bounds, has_state), decay)
    return launch(call, problem, plan_for(problem, target, plan).plan, 1.0, chosen)[1]


def copy_slots(state_pool: jax.Array, source: Any, target: Any) -> jax.Array:
    """Copies states between slots, as when a request is forked; donate the pool.

    Args:
      state_pool: [slots, heads, key_dim, value_dim], or any array of slots.
      source, target: [copies] int32. All sources are read before the first target is written. A
        copy whose source or target is outside [0, slots) does nothing; of copies to one target the
        last one counts.

    Returns:
      The new pool.

    Raises:
      ArgumentError: source and target differ in length or are not int32.
    """
    dims = checks.Dims("copy_slots")
    for name, slots in (("source", source), ("target", target)):
        dims.bind(name, slots, "copies")
        checks.check_dtype("copy_slots", name, slots, (jnp.int32,))
    slots, index = state_pool.shape[0], jnp.arange(dims["copies"])
    if not slots:
        return state_pool
    legal = (source >= 0) & (source < slots) & (target >= 0) & (target < slots)
    later = legal[None, :] & (target[None, :] == target[:, None]) & (index > index[:, None])
    place = jnp.where(legal & ~jnp.any(later, axis=1), target, slots)
    return state_pool.at[place].set(state_pool[jnp.clip(source, 0, slots - 1)], mode="drop")
