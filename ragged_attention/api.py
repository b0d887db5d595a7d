"""The public functions: check, plan, dispatch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from ragged_attention.kernel import ragged_attention_kernel
from ragged_attention.layout import LANES, KVCache, pack_pages, round_up, token_rows
from ragged_attention.plan import Explanation, Plan, Problem, plan_for
from ragged_attention.plumbing import entries
from ragged_attention.problem import Call, problem_of, value_rules
from ragged_attention.row_scales import listed
from ragged_attention.schedule import GROUP_ROWS, Batch
from reference import ragged_attention as reference
from tpukit import checks
from tpukit.chips import Chip
from tpukit.chips import chip as chip_named
from tpukit.errors import ArgumentError, UnsupportedError
from tpukit.planning import Implementation, choose_implementation

SUPPORTED_CHIPS = ("v5e", "v5p", "v6e", "tpu7x")


class Attention(NamedTuple):
    """What attention gives back.

    Attributes:
      o: [tokens, q_heads, value_dim] in the type of q; 0 where a token sees nothing.
      cache: the cache with the new rows.
      lse: [tokens, q_heads] f32 natural logarithm of the softmax's denominator, sinks included,
        -inf where it is 0; None unless asked for.
    """

    o: jax.Array
    cache: KVCache
    lse: jax.Array | None


def ragged_paged_attention(  # noqa: PLR0913  (what the field's kernels take, each by its name)
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    cache: KVCache,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    page_indices: jax.Array,
    page_offsets: jax.Array | None = None,
    num_requests: jax.Array | int | None = None,
    *,
    causal: bool = True,
    window: jax.Array | int | None = None,
    ancestors: jax.Array | None = None,
    sinks: jax.Array | None = None,
    soft_cap: float | None = None,
    sm_scale: float | None = None,
    q_scale: jax.Array | float | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    temperature_len: int | None = None,
    query_starts: jax.Array | None = None,
    return_lse: bool = False,
    bounds_checks: bool = True,
    implementation: Implementation = "auto",
    plan: Plan | None = None,
    validate: bool = False,
) -> Attention:
    """Attention of a ragged batch over a paged cache, which the batch's own keys enter first.

    Decode, verification of drafts, chunked prefill and prefill mix in any order. Request r owns
    query tokens [cu_q_lens[r], cu_q_lens[r + 1]), the last of its kv_lens[r] tokens. One kernel.

    Args:
      q: [tokens, q_heads, key_dim] bfloat16 or float32.
      k, v: [tokens, kv_heads, key_dim] and [tokens, kv_heads, value_dim], the new keys and values,
        of any float type; written to the cache in the cache's type. None, both: the cache holds
        everything already (layers that share one), and is not written.
      cache: pages, see `allocate_kv_cache`. Donate it: it is written in place.
      kv_lens: [requests] int32 tokens of each request, the new ones included.
      cu_q_lens: [requests + 1] int32 bounds of query tokens. Made monotone, clipped to [0, tokens].
      page_indices: int32 pages. [n]: those of all requests, one after another; or a page table
        [requests, pages], without page_offsets.
      page_offsets: [requests + 1] int32: request r has pages page_indices[page_offsets[r]:
        page_offsets[r + 1]].
      num_requests: how many requests count, a number or int32 []; all by default.
      causal: a query sees no later position.
      window: last positions that a query sees: a number, the quickest, or int32 [requests], 0: all.
      ancestors: [tokens, 1 or 2] uint32 tree mask for requests of at most 64 query tokens: bit d of
        word w says that a token sees its request's query token 32 w + d. Keys before the query
        tokens are visible; longer requests stay causal.
      sinks: [q_heads] f32 logits that take part in the softmax and carry no value.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap).
      sm_scale: of the logits, key_dim ** -0.5 by default.
      q_scale: of q: a number or [] (exact), [q_heads], [tokens, 1] or [tokens, q_heads] (rounded).
      k_scale, v_scale: of cached keys and values, a number, [], [kv_heads] or, of every row,
        [pages, page_size, kv_heads]. New ones are divided by it when written. Scales of rows are
        gathered for the whole list of pages first, so keep its padding short.
      temperature_len: logits of a query at position p beyond it are multiplied by
        log(p) / log(temperature_len).
      query_starts: [requests] int32 position of each request's first query token among the keys
        here, kv_len - q_len by default; negative, or kv_len and more, where keys are spread over
        devices and the query tokens' own are elsewhere (see `context_parallel_attention`).
      return_lse: also give the logarithm of the softmax's denominator.
      bounds_checks: False leaves out the compiler's checks of addresses: two thirds of the scalar
        code that fetches pages, no other result. Pages are checked by the kernel in any case.
      implementation: "pallas" (a TPU), "interpret" (the kernel on a CPU, slow), "reference", or
        "auto": the kernel on a TPU that supports it, else the reference.
      plan: block sizes instead of the tuned ones.
      validate: check values as well (eager calls only).

    Returns:
      An `Attention`; 0 for tokens of no request and queries that see nothing. Pages that are not in
      the pool read as zeros and are not written; keys behind the listed pages are not there. Where
      new rows are written, the rest of their group of 8 rows of words becomes 0. NaN stays with the
      queries that see it, see `layout.contained`.

    Raises:
      ArgumentError: an argument that can never work: what it was, what it needs.
      UnsupportedError: valid, but not on this machine or chip.

    Source: see `reference.ragged_attention`.
    """
    call = Call(
        q, k, v, cache, kv_lens, cu_q_lens, page_indices, page_offsets, num_requests, causal,
        window, ancestors, sinks, soft_cap, sm_scale, q_scale, k_scale, v_scale, temperature_len,
        query_starts, return_lse,
    )  # fmt: skip
    problem = problem_of(call)
    check_static(implementation, plan, bounds_checks=bounds_checks, validate=validate)
    if validate:
        checks.raise_if_bad("ragged_attention", value_rules(call))
    chosen, target = choose(implementation, problem, plan)
    batch = call.batch()
    q, scales = call.scaled_queries(batch)
    if chosen == "reference" or not problem.any_work:
        return by_reference(call, problem, batch, q, scales)
    options = {"plan": plan_for(problem, target, plan).plan, "chip": target}
    options["interpret"] = pltpu.InterpretParams() if chosen == "interpret" else False
    return launch(call, problem, batch, q, scales, options | {"bounds_checks": bounds_checks})


def mla_ragged_paged_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array | None,
    rope: jax.Array | None,
    cache: KVCache,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    page_indices: jax.Array,
    page_offsets: jax.Array | None = None,
    num_requests: jax.Array | int | None = None,
    *,
    sm_scale: float,
    **options: Any,
) -> Attention:
    """Multi-head latent attention with absorbed projections; see `ragged_paged_attention`.

    Args:
      q_latent: [tokens, q_heads, rank] queries times the up-projection of keys.
      q_rope: [tokens, q_heads, rope_dim] their rotated part.
      latent: [tokens, rank] new latents, which are keys and values of all heads; or None.
      rope: [tokens, rope_dim] new rotated keys, shared by all heads; or None.
      cache: see `allocate_mla_cache`.
      kv_lens, cu_q_lens, page_indices, page_offsets, num_requests: as there.
      sm_scale: of the logits; it belongs to the model's head, not to the rank.
      **options: as there.

    Returns:
      An `Attention` whose o is [tokens, q_heads, rank].

    Raises:
      ArgumentError, UnsupportedError: as there.
    """
    dims = checks.Dims("mla_ragged_paged_attention")
    checks.check_type("mla_ragged_paged_attention", "cache", cache, KVCache)
    dims.bind("q_latent", q_latent, "tokens q_heads rank")
    dims.bind("q_rope", q_rope, "tokens q_heads rope_dim")
    if not cache.layout.latent or cache.layout.value_dim != dims["rank"]:
        raise ArgumentError(
            where="mla_ragged_paged_attention",
            argument="cache",
            got=f"has layout {cache.layout}",
            expected=f"a latent layout of rank {dims['rank']}",
            advice="Use allocate_mla_cache.",
        )
    k = None
    if latent is not None or rope is not None:
        if latent is None or rope is None:
            raise ArgumentError(
                where="mla_ragged_paged_attention",
                argument="rope" if rope is None else "latent",
                got="is None",
                expected="both of latent and rope, or neither",
            )
        dims.bind("latent", latent, "tokens rank")
        dims.bind("rope", rope, "tokens rope_dim")
        k = jnp.concatenate([latent, rope], axis=1)[:, None, :]
    q = jnp.concatenate([q_latent, q_rope.astype(q_latent.dtype)], axis=2)
    return ragged_paged_attention(
        q, k, None, cache, kv_lens, cu_q_lens, page_indices, page_offsets, num_requests,
        sm_scale=sm_scale, **options,
    )  # fmt: skip


def explain(*args: Any, chip: str, plan: Plan | None = None, **kwargs: Any) -> Explanation:
    """The plan that `ragged_paged_attention` would use on a chip that need not be present.

    Args:
      *args: its arguments, arrays or shapes.
      chip: name of the chip.
      plan: block sizes to check.
      **kwargs: its options.

    Raises:
      ArgumentError, UnsupportedError: what the call would raise there.
    """
    return plan_for(problem_of(Call(*args, **kwargs)), chip_named(chip), plan)


def supports(*args: Any, **kwargs: Any) -> bool:
    """Whether the kernel runs for these shapes on a chip; arguments as `explain`."""
    try:
        explain(*args, **kwargs)
    except (ArgumentError, UnsupportedError):
        return False
    return True


def check_static(implementation: Implementation, plan: Plan | None, **flags: bool) -> None:
    """Checks what is no array and no part of the problem."""
    checks.check_choice(
        "ragged_attention", "implementation", implementation, get_args(Implementation)
    )
    if plan is not None:
        checks.check_type("ragged_attention", "plan", plan, Plan)
    for name, flag in flags.items():
        checks.check_type("ragged_attention", name, flag, bool)


def choose(
    implementation: Implementation, problem: Problem, plan: Plan | None
) -> tuple[Implementation, Chip]:
    """What runs, and the chip to plan for."""
    planned = functools.partial(plan_for, problem, plan=plan)
    return choose_implementation("ragged_attention", implementation, SUPPORTED_CHIPS, planned)


def by_reference(
    call: Call, problem: Problem, batch: reference.Batch, q: jax.Array, scales: jax.Array
) -> Attention:
    """The specification, on the cache unpacked."""
    cache = call.cache
    keys, values = cache.unpack()
    if problem.update and problem.any_work:
        k, v = call.quantised()
        keys = reference.write(keys, k, batch)
        values = (
            keys[..., : problem.layout.value_dim]
            if v is None
            else (reference.write(values, v, batch))
        )
        cache = pack_pages(keys, None if v is None else values, problem.layout)
    masks = reference.Masks(problem.causal, call.windows(), call.words())
    o, lse = reference.attend(
        q, keys, values, batch, masks, logit_scale=scales[0], value_scale=scales[1],
        soft_cap=problem.soft_cap, sinks=call.sinks, **call.row_scales(),
    )  # fmt: skip
    return Attention(o, cache, lse if problem.lse else None)


def launch(
    call: Call,
    problem: Problem,
    batch: reference.Batch,
    q: jax.Array,
    scales: jax.Array,
    options: dict[str, Any],
) -> Attention:
    """Brings the arguments into the kernel's layout and runs it."""
    layout, tokens, plan = problem.layout, problem.num_tokens, options["plan"]
    rows = (
        round_up(problem.num_indices, LANES) // LANES + plan.keys // layout.page_size // LANES + 2
    )
    padding = rows * LANES - problem.num_indices
    indices = entries(jnp.pad(batch.page_indices, (0, padding), constant_values=-1), problem)
    if problem.streams_pages:
        indices = indices.reshape(-1, LANES)
    operands = {"scales": scales, "indices": indices, "q": q}
    if problem.sinks:
        sinks = jnp.asarray(call.sinks, jnp.float32)[:, None]
        operands["sinks"] = jnp.broadcast_to(sinks, (problem.q_heads, LANES))
    if problem.update:
        k, v = call.quantised()
        new = token_rows(k, v, layout)
        padding = -tokens % layout.run
        operands["fresh"] = jnp.pad(new, ((0, padding), (0, 0))) if padding else new
    if (words := call.words()) is not None:
        below = -tokens % GROUP_ROWS + plan.queries + GROUP_ROWS
        padded = jnp.pad(words, ((0, below), (0, LANES - words.shape[1])))
        operands["tree"] = jax.lax.bitcast_convert_type(padded, jnp.int32)
    for name, scale in call.row_scales().items():
        operands[name] = listed(scale, batch.page_indices, problem)
    cache = call.cache.words
    grouped = problem.unit == GROUP_ROWS
    operands["cache"] = cache.reshape(-1, GROUP_ROWS, layout.width) if grouped else cache
    windows, zero = call.windows(), jnp.zeros(1, jnp.int32)
    described = Batch(
        kv_lens=batch.kv_lens,
        cu_q_lens=batch.cu_q_lens,
        page_offsets=batch.page_offsets,
        windows=zero if windows is None else windows,
        query_starts=zero if batch.query_starts is None else batch.query_starts,
        num_requests=jnp.clip(batch.num_requests, 0, problem.num_requests).reshape(1),
    )
    o, lse, found = ragged_attention_kernel(described, operands, problem=problem, **options)
    lse = None if lse is None else lse[:, : problem.q_heads]
    return Attention(o, KVCache(found.reshape(cache.shape), layout), lse)
