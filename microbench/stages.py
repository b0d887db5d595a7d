"""What can be done with one case: check, time, compile, predict, and set beside its peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from microbench import predicted, static
from microbench.case import Case, Check, Suite, planned
from microbench.cli import Options, UsageError
from microbench.record import NOT_REPLAYED
from microbench.timing import time_calls
from tpukit import chips, errors, interpret

REFUSALS = (
    errors.ArgumentError,
    errors.KernelCompileError,
    errors.KernelResourceError,
    errors.ListingError,
    errors.ReplayError,
    errors.UnsupportedError,
)
INPUT_SETS = 2
TITLES = {
    "check": "check: the kernel against its specification",
    "time": "time: on this machine",
    "aot": (
        "aot: static, compiled for the chip and not run; "
        "floor us = the roofline from data-sheet peaks, no measurement"
    ),
    "predict": (
        "predict: predicted for the chip by replaying the final schedule, not measured; floor = "
        "the schedule's own bytes and products at data-sheet peaks"
    ),
    "compare": (
        "compare: predicted for the chip by replaying final schedules, not measured; times as slow "
        "= of the whole call, to the kernel's"
    ),
}


class Finding(NamedTuple):
    """One figure, or one row of them.

    Attributes:
      label: what they are, such as "static".
      values: the figures; tables show those that are single values.
      context: chip, plan, seed and the like.
    """

    label: str
    values: dict[str, Any]
    context: Mapping[str, Any]


def single(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that fit a table's cell."""
    return {key: x for key, x in values.items() if not isinstance(x, list | dict | tuple)}


def with_plan(suite: Suite, case: Case, chip: str, options: Options) -> Case:
    """The case with the fields of its plan that the options name; none named, none given.

    Raises:
      UsageError, ArgumentError, UnsupportedError: no such field, or no legal plan.
    """
    if not options.plan:
        return case
    chosen = suite.explain(case, chip).plan
    try:
        found = planned(case, chosen, dict(options.plan))
    except ValueError as error:
        raise UsageError(str(error)) from error
    suite.explain(found, chip)  # refuses a plan that is not legal
    return found


def check(suite: Suite, case: Case, options: Options) -> list[Finding]:
    """Compares the kernel with its specification."""
    try:
        checks = suite.check(case, options.seed)
    except interpret.InterpretError as error:
        checks = [Check(f"runs: {type(error).__name__}", float("inf"), 0.0, note=str(error))]
        print(f"\n{case.name}: {error}")
    found = []
    for one in checks:
        note = "" if one.ok else one.note.split("\n")[0]
        name = f"{one.name}: {note}" if note else one.name
        values = {"check": name, **dataclasses.asdict(one), "ok": one.ok}
        found.append(Finding("checked", values, {"seed": options.seed}))
    return found


def time(suite: Suite, case: Case, options: Options) -> list[Finding]:
    """Times the kernel on a TPU, elsewhere the reference."""
    here = chips.current_chip() if jax.default_backend() == "tpu" else None
    case = suite.timed(case)
    case = with_plan(suite, case, here.name, options) if here else case
    function = suite.kernel_fn(case) if here else suite.reference_fn(case)
    timing = time_calls(function, [suite.inputs(case, options.seed + i) for i in range(INPUT_SETS)])
    what = "tpu kernel" if here else "cpu reference"
    label = f"{what}, {timing.clock} clock, measured"
    cost = suite.cost(case)
    values = {
        "what": label,
        "size": case.name,
        "median_ms": timing.median * 1e3,
        "best_ms": timing.best * 1e3,
        "worst_ms": timing.worst * 1e3,
        "calls": timing.calls,
        "first_ms": timing.first * 1e3,
        "gflop_per_s": cost.flops / timing.median / 1e9,
        "gbyte_per_s": cost.hbm_bytes / timing.median / 1e9,
    }
    plan = str(suite.explain(case, here.name)) if here else "none: the reference"
    place = {"chip": here.name if here else "cpu", "plan": plan, "seed": options.seed}
    return [Finding(label, values, place)]


def aot(suite: Suite, case: Case, chip: str, options: Options) -> list[Finding]:
    """Compiles for a chip that is not here, and reads what the compiler made.

    Raises:
      one of `REFUSALS`.
    """
    report = static.compile_case(suite, case, chip)
    plan = str(suite.explain(case, chip))
    if options.command == "aot":
        print(f"\n{case.name} on {chip}, {plan}\n{static.details(report)}")
    floor = static.floor_us(suite.cost(case), chips.chip(chip))
    shown = static.figures(report) | suite.figures(case, report) | {"floor us": floor}
    return [Finding("static", shown | static.tree(report), {"plan": plan})]


def predict(suite: Suite, case: Case, chip: str, options: Options) -> list[Finding]:
    """Predicts the time on a chip that is not here.

    Raises:
      one of `REFUSALS`.
    """
    found = predicted.case(suite, case, chip, options)
    if found is None:
        return [Finding("predicted", {"predicted us": None, "note": NOT_REPLAYED}, {})]
    if options.command == "predict":
        print(f"\n{case.name} on {chip}\n{found.text()}")
    predicted.save(found, case, options)
    cost = dataclasses.asdict(suite.cost(case))
    place = {"plan": str(suite.explain(case, chip)), "seed": options.seed, "cost": cost}
    return [Finding("predicted", predicted.figures(found), place)]


def compare(suite: Suite, case: Case, chip: str, options: Options) -> list[Finding]:
    """Predicts the kernel and what one would use instead.

    Raises:
      one of `REFUSALS`.
    """
    own = predicted.case(suite, case, chip, options)
    if own is None:
        return []
    ours = own.milliseconds * 1e3
    found = [Finding("predicted", {"who": "this kernel", "predicted us": ours}, {})]
    for name, call in suite.peers(case, options.seed).items():
        values: dict[str, Any] = {"who": name}
        try:
            theirs = predicted.call(call, chip).milliseconds * 1e3
            values |= {"predicted us": theirs, "times as slow": theirs / ours}
        except Exception as error:  # noqa: BLE001  (others' code: a line, not the end)
            values["note"] = f"{type(error).__name__}: {error}".split("\n")[0]
        found.append(Finding("predicted", values, {}))
    return [one._replace(context={"seed": options.seed}) for one in found]
