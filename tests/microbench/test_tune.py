"""The command `tune`."""

import dataclasses
import importlib
import json
import shlex
import sys
import types

import pytest

from microbench import bench, cases, cli, environment, tune
from microbench.case import Case
from microbench.tune import TIE
from tests.microbench import fake
from tpukit import aot, planning
from tpukit.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class Plan:
    block: int = 8
    depth: int = 2


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A kernel whose time is a formula; how it comes by plans is the fixture's value."""
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"schema": 1, "kernel": "fake", "entries": []}))
    rooms = types.ModuleType("fake.plan")

    rooms.PLANS = planning.Planner(
        kernel="fake",
        plan=Plan,
        check=lambda problem, plan, chip: None,
        model=lambda problem, chip: Plan(),
        exact={"dtype": str},
        bucketed=("rows",),
        key=lambda problem: {"dtype": "float32", "rows": problem},
        choices={"block": (8, 16, 32, 12), "depth": (2, 4)},
        path=path,
    )
    monkeypatch.setitem(sys.modules, "fake.plan", rooms)

    def explain(case, chip):
        plan = Plan(**case.plan) if case.plan else Plan()
        if plan.block == 12:
            raise UnsupportedError(where="fake", what="12", place=chip, why="it is a test")
        return planning.Explanation(case.params["rows"], plan, "argument", "a test", 0, 1)

    monkeypatch.setattr(fake, "explain", explain)
    monkeypatch.setattr(cases, "kernels", lambda: ("fake",))
    monkeypatch.setattr(cases, "load", lambda kernel: fake)
    monkeypatch.setattr(environment, "prepare", lambda: None)
    return rooms.PLANS


@pytest.fixture
def times(monkeypatch):
    """Sets the time of a plan, as a function of it and of the case."""

    def use(formula):
        def predict(suite, case, chip, options):
            return types.SimpleNamespace(milliseconds=formula(Plan(**case.plan), case) / 1e3)

        monkeypatch.setattr(tune.predicted, "case", predict)

    return use


def run(*words):
    return cli.main(["microbench", "tune", "--chip", "v6e", *words])


def test_the_best_plan_is_found_and_kept_with_its_provenance(kernel, times, capsys, tmp_path):
    times(lambda plan, case: 100 - 20 * (plan.block == 32) - 10 * (plan.depth == 4))
    records = tmp_path / "records"
    assert run("--save", "--case", "right", "--json", str(records)) == 0
    out = capsys.readouterr().out
    assert "block=32 depth=4" in out and "30" in out
    (entry,) = kernel.read().entries
    assert entry.plan == {"block": 32, "depth": 4} and entry.key == {"dtype": "float32", "rows": 64}
    assert (entry.chip, entry.found.how, entry.found.microseconds) == ("v6e", "predicted", 70.0)
    wanted = "python -m microbench tune --kernel fake --chip v6e --case right"
    assert entry.found.command == wanted and entry.found.versions["jax"]
    (row,) = map(json.loads, records.read_text().splitlines())
    assert row["kind"] == "tune" and row["values"]["refused"] == 2  # 12 with either depth


def test_without_save_nothing_is_written(kernel, times):
    before = kernel.path.read_text()
    times(lambda plan, case: 100 - plan.block)
    assert run() == 0 and kernel.path.read_text() == before


def test_a_tie_leaves_the_cost_model_its_plan_and_takes_back_an_old_entry(kernel, times, capsys):
    times(lambda plan, case: 100 - 50 * (plan.block == 32))
    run("--save", "--case", "right")
    assert kernel.read().entries
    times(lambda plan, case: 100 * (1 - 0.9 * TIE * (plan.block == 32)))
    run("--save", "--case", "right")
    assert not kernel.read().entries
    assert "the cost model's plan stays" in capsys.readouterr().out


def test_cases_of_one_entry_are_tuned_together(kernel, times, monkeypatch):
    same = Case("fake", "model/twin", {"rows": 64, "lengths": (), "fault": "none"})
    monkeypatch.setattr(fake, "CASES", (*fake.CASES, same))

    def formula(plan, case):
        better = {"model/right": 0.5, "model/twin": 4.0}.get(case.name, 1.0)
        return 100 * (better if plan.block == 32 else 1.0)

    times(formula)
    run("--save")
    assert not kernel.read().entries  # 0.5 for one is not worth 4 for the other


def test_entries_of_other_problems_stay(kernel, times):
    times(lambda plan, case: 100 - plan.block)
    run("--save", "--case", "right")
    run("--save", "--case", "other")
    assert {entry.key["rows"] for entry in kernel.read().entries} == {64, 128}


def test_only_what_the_plan_flags_name_is_tried(kernel, times, capsys):
    tried = set()
    times(lambda plan, case: tried.add((plan.block, plan.depth)) or 100 - plan.block - plan.depth)
    flags = ("--plan", "block=16", "--plan", "block=32")
    assert run("--save", "--case", "right", *flags) == 0
    assert tried == {(8, 2), (16, 2), (32, 2)}
    (entry,) = kernel.read().entries
    assert entry.plan == {"block": 32, "depth": 2}
    assert entry.found.command.endswith("--plan block=16 --plan block=32 --case right")
    assert run("--plan", "blocks=16") == 2
    assert "no field 'blocks' is tuned; those that are: block, depth" in capsys.readouterr().err
    assert run("--plan", "block=many") == 2


def test_commands_quote_names_with_spaces():
    options = cli.Options(case="one device")
    assert tune.command_of("fake", "v6e", options).endswith("--case 'one device'")
    case = Case("fake", "model/one device", {})
    assert "--case 'model/one device'" in bench.repeat("predict", case, options, "v6e")


def test_a_kernel_without_a_table_is_refused(kernel, times, capsys):
    del sys.modules["fake.plan"].PLANS
    times(lambda plan, case: 1.0)
    assert run() == 2
    assert "fake has no table of plans to tune" in capsys.readouterr().err


TUNED = ("fused_moe", "gla", "ragged_attention")


def plans(kernel_name):
    return importlib.import_module(f"{kernel_name}.plan").PLANS


@pytest.mark.parametrize(
    "kernel_name,entry",
    [
        pytest.param(name, x, id=f"{name}-{x.chip}")
        for name in TUNED
        for x in plans(name).read().entries
    ],
)
def test_an_entry_is_what_its_command_s_cases_get_and_it_compiles(kernel_name, entry):
    options = cli.parse(shlex.split(entry.found.command.removeprefix("python -m ")))
    assert options.command == "tune" and options.chips == (entry.chip,)
    for suite, case in bench.select(options):
        found = suite.explain(case, entry.chip)
        assert found.source == "exact"
        assert plans(kernel_name).key(found.problem) == entry.key
        assert dataclasses.asdict(found.plan) == entry.plan
        target, arguments = suite.aot_target(case)
        assert aot.static_report(target, entry.chip, **arguments).kernels


@pytest.mark.parametrize("kernel_name", TUNED)
def test_choices_are_fields_of_the_plan(kernel_name):
    suite = cases.load(kernel_name)
    case = suite.CASES[0]
    for chip in suite.chips(case):
        found = suite.explain(case, chip)
        fields = dataclasses.asdict(found.plan)
        assert set(plans(kernel_name).choices) <= set(fields)
        schema = plans(kernel_name).table.schema
        assert schema.key.keys() == plans(kernel_name).key(found.problem).keys()
