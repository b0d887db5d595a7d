"""`python -m microbench validate`: the table of errors."""

from __future__ import annotations

import sys

from microbench import environment
from microbench.cli import Options
from microbench.record import Log, Record
from microbench.table import table
from microbench.validation import rows
from microbench.validation.run import Outcome, predict_rows, summary

_PROCESSES = 2


def run(options: Options) -> int:
    """Predicts the rows that the options name; 0 if all were predicted and the targets hold."""
    selected = [
        row
        for row in rows.load()
        if (not options.kernels or row.kernel in options.kernels)
        and row.chip in options.chips
        and options.case in (row.id, "")
    ]
    if not selected:
        print("microbench: no published row is so called", file=sys.stderr)
        return 2
    print(f"{len(selected)} published times, predicted again; versions {environment.versions()}")
    outcomes = []
    log = Log(options.json, options.csv)
    try:
        for outcome in predict_rows(selected, min(_PROCESSES, len(selected))):
            outcomes.append(outcome)
            log.add(_record(outcome))
            print(_line(outcome), flush=True)
    finally:
        log.close()
    totals = summary(outcomes)
    print(f"\nerrors of the whole call, predicted against published\n{table(totals)}")
    held = all(
        row["not predicted"] == 0
        and (
            row["target mean"] is None
            or (row["mean |error|"] <= row["target mean"] and row["worst"] <= row["target worst"])
        )
        for row in totals
    )
    return 0 if held else 1


def _line(outcome: Outcome) -> str:
    row = outcome.row
    head = f"{row.id} {row.use:4} {row.kernel:16} {row.chip:6}"
    if outcome.milliseconds is None:
        return f"{head} not predicted: {outcome.problem.splitlines()[0][:160]}"
    return (
        f"{head} published {row.milliseconds:9.4f} ms, predicted {outcome.milliseconds:9.4f} "
        f"({outcome.error:+6.1%}), kernel {outcome.kernel_milliseconds:9.4f}, {outcome.binds}"
    )


def _record(outcome: Outcome) -> Record:
    return {
        "kind": "validate",
        "label": "predicted",
        "id": outcome.row.id,
        "use": outcome.row.use,
        "kernel": outcome.row.kernel,
        "chip": outcome.row.chip,
        "published_ms": outcome.row.milliseconds,
        "predicted_ms": outcome.milliseconds,
        "kernel_ms": outcome.kernel_milliseconds,
        "binds": outcome.binds,
        "problem": outcome.problem,
        "source": outcome.row.source,
        "versions": environment.versions(),
        "commit": environment.commit(),
        "command": f"python -m microbench validate --case {outcome.row.id}",
    }
