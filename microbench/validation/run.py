"""Predicts the published rows again and says how far off the predictions are."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from microbench import environment
from microbench.validation.rows import Row

# Mean and worst absolute error that the model is held to on the rows it was not fitted on.
TARGETS = {
    ("grouped_matmul", "v5e"): (0.03, 0.08),
    ("grouped_matmul", "tpu7x"): (0.03, 0.08),
    ("flash_attention", "tpu7x"): (0.06, 0.12),
    ("flash_attention", "v6e"): (0.08, 0.15),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a row.

    Attributes:
      row: the published time.
      milliseconds: predicted, of the whole call; None where there is no prediction.
      kernel_milliseconds: predicted, of the Pallas kernels in it.
      binds: what the kernels are bound by.
      problem: why there is no prediction.
    """

    row: Row
    milliseconds: float | None = None
    kernel_milliseconds: float | None = None
    binds: str = ""
    problem: str = ""

    @property
    def error(self) -> float | None:
        """Relative error of the prediction."""
        return None if self.milliseconds is None else self.milliseconds / self.row.milliseconds - 1


def predict_row(row: Row) -> Outcome:
    """Predicts one row; whatever goes wrong is the outcome."""
    environment.prepare()
    from microbench.validation import peers  # noqa: PLC0415  (imports JAX, so after `prepare`)
    from tpukit.predict import predict  # noqa: PLC0415

    try:
        fn, args = peers.build(row)
        prediction = predict(fn, *args, chip=row.chip)
    except Exception as error:  # noqa: BLE001  (one bad row must not hide the others)
        return Outcome(row, problem=f"{type(error).__name__}: {error}")
    binds = "/".join(sorted({kernel.binds for kernel in prediction.kernels})) or "XLA"
    return Outcome(row, prediction.milliseconds, prediction.kernel_milliseconds, binds)


def predict_rows(rows: Sequence[Row], processes: int) -> Iterator[Outcome]:
    """Predicts rows side by side, in order."""
    if processes == 1:
        yield from map(predict_row, rows)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(predict_row, rows)


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Errors by kernel, chip and use; one row of a table each."""

    def key(one: Outcome) -> tuple[str, str, str]:
        return one.row.use, one.row.kernel, one.row.chip

    table = []
    for (use, kernel, chip), group in itertools.groupby(sorted(outcomes, key=key), key):
        members = list(group)
        errors = [one.error for one in members if one.error is not None]
        mean_limit, worst_limit = TARGETS.get((kernel, chip), (None, None))
        sizes = [abs(error) for error in errors]
        mean = sum(sizes) / len(sizes) if sizes else None
        worst = max(sizes, default=None)
        held = use == "test" and mean_limit is not None
        table.append(
            {
                "use": use,
                "kernel": kernel,
                "chip": chip,
                "rows": len(members),
                "not predicted": len(members) - len(errors),
                "mean |error|": mean,
                "worst": worst,
                "bias": sum(errors) / len(errors) if errors else None,
                "target mean": mean_limit if held else None,
                "target worst": worst_limit if held else None,
                "order right": _order([one for one in members if one.error is not None]),
            }
        )
    return table


def _order(outcomes: Sequence[Outcome]) -> str:
    """Of pairs of block sizes for the same call, how many are predicted in the published order."""
    by_call: dict[str, list[Outcome]] = {}
    for one in outcomes:
        by_call.setdefault(one.row.shape, []).append(one)
    right = pairs = 0
    for group in by_call.values():
        for a, b in itertools.combinations(group, 2):
            pairs += 1
            predicted = (a.milliseconds or 0) < (b.milliseconds or 0)
            right += predicted == (a.row.milliseconds < b.row.milliseconds)
    return f"{right} of {pairs}" if pairs else ""
