"""The call without the kernel."""

from __future__ import annotations

import functools
from typing import Any

import jax

from reference import gla as reference
from reference import gla_drafts
from reference.gla_norm import NormGate, NormRope, norm_gate, norm_rope


def by_reference(
    prologue: NormRope | None,
    epilogue: NormGate | None,
    q: jax.Array,
    k: jax.Array,
    *args: jax.Array,
    reverse: bool,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """`gla` without the kernel."""
    q, k = (q, k) if prologue is None else norm_rope(q, k, prologue)
    run = functools.partial(reference.chunked, reverse=reverse)
    o, pool = gla_drafts.gla(q, k, *args, run=run, **options)
    return (o if epilogue is None else norm_gate(o, epilogue)), pool
