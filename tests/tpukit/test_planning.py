"""How a kernel comes by its plans, and what runs."""

import dataclasses
import json

import pytest

from tests.tpukit.test_tuning import MEASURED
from tpukit import chips, planning
from tpukit.errors import ArgumentError, UnsupportedError


@dataclasses.dataclass(frozen=True)
class Plan:
    block: int


def check(rows, plan, chip):
    if plan.block > rows:
        where = {"where": "toy", "argument": "plan.block", "got": f"is {plan.block}"}
        raise ArgumentError(**where, expected=f"at most {rows}")


@pytest.fixture
def planner(tmp_path):
    entry = {"chip": "v6e", "key": {"rows": 64}, "plan": {"block": 32}, "found": MEASURED}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"schema": 1, "kernel": "toy", "entries": [entry]}))
    return planning.Planner(
        kernel="toy",
        plan=Plan,
        check=check,
        model=lambda rows, chip: Plan(8),
        exact={},
        bucketed=("rows",),
        key=lambda rows: {"rows": rows},
        choices={"block": (8, 32)},
        path=path,
    )


@pytest.mark.parametrize(
    ("rows", "chip", "plan", "block", "source"),
    [
        (64, "v6e", None, 32, "exact"),
        (128, "v6e", None, 32, "nearest"),
        (64, "v5e", None, 8, "model"),
        (24, "v6e", None, 8, "model"),  # for which the nearest entry is not legal
        (64, "v6e", Plan(16), 16, "argument"),
    ],
)
def test_the_callers_plan_then_the_tables_then_the_models(planner, rows, chip, plan, block, source):
    found, where, why = planner.choose(rows, chips.chip(chip), plan)
    assert found == Plan(block) and where == source and why


def test_a_plan_that_is_not_legal_is_refused_and_does_not_fit(planner):
    chip = chips.chip("v6e")
    with pytest.raises(ArgumentError, match=r"plan\.block is 65; needs at most 64"):
        planner.choose(64, chip, Plan(65))
    assert planner.fits(64, Plan(64), chip) and not planner.fits(64, Plan(65), chip)


def test_an_explanation_names_the_plan_and_its_memory():
    found = planning.Explanation(64, Plan(32), "model", "it is a test", 3 * 2**19, 64 * 2**20)
    assert str(found) == "block=32 (model: it is a test; 1.5 of 64 MiB VMEM)"


def plan_for(chip):
    if chip.name == "v5e":
        raise UnsupportedError(where="toy", what="it", place="v5e", why="small", advice="Wait.")


@pytest.mark.parametrize(
    ("here", "asked", "chosen"),
    [
        (None, "auto", "reference"),
        ("v6e", "auto", "pallas"),
        ("v5e", "auto", "reference"),  # which has no plan
        ("tpu7x", "auto", "reference"),  # which the kernel does not support
        ("v6e", "reference", "reference"),
        (None, "interpret", "interpret"),
        ("v6e", "pallas", "pallas"),
        ("v5e", "pallas", "pallas"),  # and the plan will say why not
    ],
)
def test_what_runs(monkeypatch, here, asked, chosen):
    monkeypatch.setattr(planning, "current_chip", lambda: here and chips.chip(here))
    found, chip = planning.choose_implementation("toy", asked, ("v5e", "v6e"), plan_for)
    assert found == chosen and chip.name == (here or "tpu7x")


@pytest.mark.parametrize("here", [None, "tpu7x"])
def test_a_kernel_that_cannot_run_here_is_refused(monkeypatch, here):
    monkeypatch.setattr(planning, "current_chip", lambda: here and chips.chip(here))
    with pytest.raises(UnsupportedError, match=r"pallas.*the kernel runs on v5e, v6e"):
        planning.choose_implementation("toy", "pallas", ("v5e", "v6e"), plan_for)
