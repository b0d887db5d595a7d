"""What the values of arguments have to obey, for validation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gla.schedule import Form
from reference.gla import Decay, requests
from reference.gla_drafts import MAX_DRAFTS, Drafts, Snapshots, bits_of, taken_snapshots
from tpukit import checks
from tpukit.errors import ArgumentError


def value_rules(
    slot_ids: jax.Array, cu_seqlens: jax.Array, decay: Decay, num_slots: int, num_tokens: int
) -> list[checks.Condition]:
    """What values have to obey; -1 is the one null slot that is not a mistake."""
    index = jnp.arange(slot_ids.shape[0])
    twin = (slot_ids[:, None] == slot_ids[None, :]) & (index[None, :] < index[:, None])
    repeated = jnp.any(twin, axis=1) & (slot_ids >= 0)
    previous = jnp.concatenate([cu_seqlens[:1], cu_seqlens[:-1]])
    return [
        checks.in_range("slot_ids", slot_ids, -1, num_slots),
        checks.Condition("slot_ids", slot_ids, repeated, "each slot at most once"),
        checks.in_range("cu_seqlens", cu_seqlens, 0, num_tokens + 1),
        checks.Condition("cu_seqlens", cu_seqlens, cu_seqlens < previous, "ascending bounds"),
        checks.Condition("decay.g", decay.g, ~(decay.g <= 0), "log decays of at most 0"),
    ]


def draft_rules(drafts: Drafts, cu_seqlens: jax.Array) -> list[checks.Condition]:
    """At most 64 drafts a request, and words that describe a tree."""
    length = cu_seqlens[1:] - cu_seqlens[:-1]
    long = drafts.requests & (length > MAX_DRAFTS)
    expected = f"at most {MAX_DRAFTS} rows in a request of drafts"
    rules = [checks.Condition("drafts.requests", drafts.requests, long, expected)]
    if drafts.ancestors is None:
        return rules
    row, bit = jnp.arange(drafts.ancestors.shape[0])[:, None], jnp.arange(MAX_DRAFTS)
    owns = (row >= cu_seqlens[:-1]) & (row < cu_seqlens[1:]) & drafts.requests & ~long
    start = jnp.max(jnp.where(owns, cu_seqlens[:-1], 0), axis=1, keepdims=True)
    bits, own = bits_of(drafts.ancestors), bit == row - start
    before = bits & (bit < row - start)
    parent = jnp.max(jnp.where(before, bit, -1), axis=1, keepdims=True)
    of_parent = bits[jnp.maximum(start + parent, 0)[:, 0]] & (parent >= 0)
    wrong = jnp.any(owns, axis=1) & jnp.any(bits != (of_parent | own), axis=1)
    words = jnp.broadcast_to(wrong[:, None], drafts.ancestors.shape)
    expected = "a draft's own bit and the bits of its parent, the last of the others"
    return [*rules, checks.Condition("drafts.ancestors", drafts.ancestors, words, expected)]


def snapshot_rules(
    snapshots: Snapshots,
    batch: tuple[jax.Array, jax.Array, jax.Array],
    drafts: Drafts | None,
    num_slots: int,
    num_tokens: int,
) -> list[checks.Condition]:
    """Every snapshot that names a slot is taken."""
    slot_ids, cu_seqlens, has_state = batch
    reqs = requests(cu_seqlens, slot_ids, has_state, num_tokens, num_slots)
    found = taken_snapshots(snapshots, reqs, drafts, num_tokens, num_slots)
    wanted = (snapshots.slots >= 0) & (snapshots.slots < num_slots)
    return [
        checks.in_range("snapshots.slots", snapshots.slots, -1, num_slots),
        checks.Condition(
            "snapshots.rows",
            snapshots.rows,
            wanted & ~found.placed,
            "ascending rows of requests with a slot, but of no tree",
        ),
        checks.Condition(
            "snapshots.slots",
            snapshots.slots,
            found.placed & ~found.taken,
            "a slot that no request has, and no other snapshot",
        ),
    ]


def accepted_rules(accepted: jax.Array, cu_seqlens: jax.Array) -> list[checks.Condition]:
    """Only drafts that are there are accepted."""
    length = cu_seqlens[1:] - cu_seqlens[:-1]
    extra = jnp.any(bits_of(accepted) & (jnp.arange(MAX_DRAFTS) >= length[:, None]), axis=1)
    bad = jnp.broadcast_to(extra[:, None], accepted.shape)
    return [checks.Condition("accepted", accepted, bad, "bits of the request's drafts only")]


def all_rules(
    batch: tuple[jax.Array, jax.Array, jax.Array],
    decay: Decay,
    beta: jax.Array | None,
    drafts: Drafts | None,
    snapshots: Snapshots | None,
    num_slots: int,
    num_tokens: int,
) -> list[checks.Condition]:
    """What the values of a call have to obey; batch: slot_ids, cu_seqlens, has_state."""
    rules = value_rules(*batch[:2], decay, num_slots, num_tokens)
    if beta is not None:
        rules.append(checks.Condition("beta", beta, ~jnp.isfinite(beta), "finite strengths"))
    rules += draft_rules(drafts, batch[1]) if drafts else []
    if snapshots:
        rules += snapshot_rules(snapshots, batch, drafts, num_slots, num_tokens)
    return rules


def form_of(reverse: bool, drafts: Drafts | None, snapshots: Snapshots | None) -> Form:
    """The form of the recurrence.

    Raises:
      ArgumentError: it runs backwards with something that is for tokens to come.
    """
    if reverse and (drafts is not None or snapshots is not None):
        raise ArgumentError(
            where="gla",
            argument="reverse",
            got="is True beside drafts or snapshots",
            expected="False, since those are for tokens to come",
        )
    return Form(reverse=bool(reverse))


def check_scale(scale: float | None, key_dim: int) -> float:
    """The scale as a finite Python number.

    Raises:
      ArgumentError: it is something else.
    """
    if scale is None:
        return key_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < 1e30:
        raise ArgumentError(
            where="gla",
            argument="scale",
            got=f"is {scale!r}",
            expected="a finite Python number or None",
            advice="Multiply q or the output by an array instead.",
        )
    return float(scale)
