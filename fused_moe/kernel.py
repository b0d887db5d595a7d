"""The kernel: a mixture-of-experts layer on the devices of a mesh, in one pass over the weights.

A token's way: `dispatch` lists who goes where; `scatter` packs the token and sends it once to each
device that has experts of it; `experts` gathers rows expert by expert, computes, adds up what one
device has for a token and sends that home; `combine` adds up what came home. Weights stream through
`slices` all the while. Rows are sent in the order in which experts use them, so that the first
experts compute while later rows, and earlier results, are still on the links.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fused_moe.combine import Combine
from fused_moe.dispatch import LANES, Layout, Lists
from fused_moe.experts import Visits
from fused_moe.plan import vmem_allowed
from fused_moe.plumbing import Operands, Scratch, start, wait
from fused_moe.scatter import Scatter
from fused_moe.spec import Plan, Problem
from reference.fused_moe import Weights
from tpukit.compat import in_hbm

COLLECTIVE_ID = 0


def layer(problem: Problem, plan: Plan, hbm: Operands, vmem: Scratch) -> None:
    """One device's part, from start to end."""
    ready = vmem.sems.lists.at[0]
    start(hbm.own, vmem.books.own, ready)
    wait(hbm.own, ready)
    me = vmem.books.own[Layout.ME]
    scatter = Scatter(problem, plan, me, hbm, vmem)
    visits = Visits(problem, plan, me, hbm, vmem)
    combine = Combine(problem, plan, me, hbm, vmem)

    scatter.pack_tokens()
    visits.start_shared(0, 1)  # slice by slice: small transfers must not queue behind large ones
    if problem.num_devices > 1:
        scatter.enter()
    scatter.send_lists()
    if problem.num_devices > 1:
        scatter.send_tokens()
    for visit in range(2):
        visits.fetch_rows(jnp.int32(visit))
    visits.start_shared(1, 2)
    scatter.receive_lists()
    visits.start_shared(2, plan.depth)
    visits.list_visits()
    for ahead in range(2):
        visits.open_window(jnp.int32(visits.shared_visits + ahead))
    visits.start_routed()
    visits.run()
    combine.run()
    scatter.finish()


def bulk_layer(problem: Problem, plan: Plan, hbm: Operands, vmem: Scratch) -> None:
    """The same where rows come sorted, and results leave as they are: the experts alone."""
    visits = Visits(problem, plan, jnp.int32(0), hbm, vmem)
    ready = vmem.sems.lists.at[0]
    start(hbm.heads, vmem.books.heads, ready)
    visits.start_shared(0, plan.depth)
    wait(hbm.heads, ready)
    visits.list_visits()
    for visit in range(2):
        visits.fetch_rows(jnp.int32(visit))
    visits.start_routed()
    visits.run()


def fused_moe_kernel(
    lists: Lists,
    tails: jax.Array,
    tokens: jax.Array,
    weights: Weights,
    *,
    problem: Problem,
    plan: Plan,
    interpret: Any = False,
) -> jax.Array:
    """Runs the kernel on one device of the mesh.

    Args:
      lists, tails: of this device's tokens, see `dispatch`.
      tokens: [T, hidden].
      weights: of this device's experts; scales and biases [E_l, B, width], the shared expert's
        arrays with a leading dimension of 1.
      problem: static facts of the call.
      plan: block sizes.
      interpret: parameters of interpretation, or False.

    Returns:
      [T, hidden].
    """
    rows = problem.num_devices * problem.num_tokens
    layout = problem.layout
    inputs = {
        "own": lists.own,
        "own_heads": lists.heads,
        "own_entries": lists.entries,
        "tails": tails,
        "tokens": tokens,
        "weights": weights,
    }
    back = (problem.slots * problem.num_tokens, problem.rows_back.row_words)
    like = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=manual_axes(tokens))
    outputs = {
        "output": like(tokens.shape, tokens.dtype),
        "heads": like((problem.num_devices * layout.head_rows, LANES), jnp.int32),
        "entries": like((problem.num_devices * layout.entry_rows, LANES), jnp.int32),
        "received": like((rows, problem.rows_out.row_words), jnp.uint32),
        "returned": like(back, jnp.uint32),
        "partials": like((min(plan.partials, rows), problem.hidden), jnp.float32),
    }
    return call(layer, inputs, outputs, problem, plan, interpret)["output"]


def bulk_kernel(
    heads: jax.Array,
    rows: jax.Array,
    weights: Weights,
    *,
    problem: Problem,
    plan: Plan,
    interpret: Any = False,
) -> jax.Array:
    """Runs the experts on rows that are sorted.

    Args:
      heads, rows: see `bulk.Sorted`.
      weights, problem, plan, interpret: as `fused_moe_kernel`.

    Returns:
      [R, hidden], what the experts of these rows gave; rows that are nobody's hold anything.
    """
    inputs = {"heads": heads, "received": rows, "weights": weights}
    shape = (problem.bulk_rows, problem.hidden)
    kept = jax.typeof(rows).update(shape=shape, dtype=problem.dtype)
    # small results would be in VMEM else, where the kernel moves them by its vector units
    outputs = {"returned": kept if interpret else pltpu.HBM.like(kept)}
    return call(bulk_layer, inputs, outputs, problem, plan, interpret)["returned"]


def call(
    body: Callable[[Problem, Plan, Operands, Scratch], None],
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    problem: Problem,
    plan: Plan,
    interpret: Any,
) -> dict[str, jax.Array]:
    """Calls the kernel with these fields of `Operands`; the others are None.

    Args:
      body: what it does.
      inputs: arrays, and trees of arrays.
      outputs: shapes and types.
      problem, plan, interpret: as `fused_moe_kernel`.

    Returns:
      The outputs.
    """
    leaves, structure = jax.tree.flatten(inputs)
    if not interpret:  # else XLA copies small operands to VMEM first, only to be copied again
        leaves = [in_hbm(x) for x in leaves]

    def kernel(*refs: Any) -> None:
        given, made, vmem = refs[: len(leaves)], refs[len(leaves) : -1], refs[-1]
        fields = jax.tree.unflatten(structure, given) | dict(zip(outputs, made, strict=True))
        body(problem, plan, Operands(**dict.fromkeys(Operands._fields) | fields), vmem)

    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    found = pl.pallas_call(
        kernel,
        name="fused_moe",
        in_specs=[anywhere] * len(leaves),
        out_specs=[anywhere] * len(outputs),
        out_shape=list(outputs.values()),
        scratch_shapes=[Scratch.shapes(problem, plan)],
        compiler_params=pltpu.CompilerParams(
            collective_id=COLLECTIVE_ID if problem.num_devices > 1 else None,
            has_side_effects=True,
            vmem_limit_bytes=vmem_allowed(problem, plan),
        ),
        interpret=interpret,
    )(*leaves)
    return dict(zip(outputs, found, strict=True))


def manual_axes(x: jax.Array) -> Any:
    """Which manual mesh axes a value varies over."""
    return jax.typeof(x).manual_axis_type
