"""The commands `predict` and `validate`."""

import importlib.util
import json

import pytest

from microbench import cli
from microbench.validation import peers, report, rows, run
from microbench.validation.rows import Row
from tpukit.errors import UnsupportedError


def test_predict_shows_records_and_draws(microbench, tmp_path):
    pytest.importorskip("matplotlib")
    records = tmp_path / "records.jsonl"
    words = ["predict", "--case", "right", "--chip", "v6e", "--json", str(records)]
    status, out, err = microbench(*words, "--trace", str(tmp_path), "--picture", str(tmp_path))
    assert status == 0, err
    assert "predicted for v6e" in out
    assert "not measured" in out
    (entry,) = map(json.loads, records.read_text().splitlines())
    assert (entry["kind"], entry["label"], entry["chip"]) == ("predict", "predicted", "v6e")
    assert entry["values"]["HBM MB"] == pytest.approx(2 * 64 * 128 * 4 / 1e6)
    assert "predict --kernel fake --case model/right --chip v6e --seed 0" in entry["command"]
    trace = json.loads((tmp_path / "fake-model-right-v6e.json").read_text())
    assert trace["traceEvents"]
    assert (tmp_path / "fake-model-right-v6e.png").stat().st_size > 1000


def test_what_cannot_be_predicted_is_reported_not_raised(microbench):
    status, out, _ = microbench("predict", "--case", "right", "--chip", "v5p,v5e")
    assert status == 2
    assert "its constants are not known" in out
    assert "predicted for v5e" in out


def test_rows_are_what_the_table_says():
    every = rows.load()
    assert len({row.id for row in every}) == len(every) == 151
    assert {row.use for row in every} == {"fit", "test"}
    assert all(row.milliseconds > 0 and row.source for row in every)
    held_out = {(row.kernel, row.chip) for row in every if row.use == "test"}
    assert set(run.TARGETS) <= held_out


def made_up(published, predicted, use="test", config=None, problem=""):
    row = Row("R", use, "grouped_matmul", "v5e", published, {"m": 1}, config or {}, "nobody")
    return run.Outcome(row, predicted, predicted, "MXU", problem)


def test_summary_by_hand():
    outcomes = [
        made_up(1.0, 1.1, config={"tile": 1}),
        made_up(2.0, 1.9, config={"tile": 2}),
        made_up(1.0, 2.2, use="fit"),
        made_up(1.5, None, problem="ListingError: odd"),
    ]
    fit, test = run.summary(outcomes)
    assert (fit["rows"], fit["target mean"]) == (1, None)
    assert (test["rows"], test["not predicted"]) == (3, 1)
    assert test["mean |error|"] == pytest.approx((0.1 + 0.05) / 2)
    assert test["worst"] == pytest.approx(0.1)
    assert test["bias"] == pytest.approx((0.1 - 0.05) / 2)
    assert test["order right"] == "1 of 1"


def test_order_of_tiles_can_be_wrong():
    wrong = [made_up(1.0, 2.0, config={"tile": 1}), made_up(2.0, 1.5, config={"tile": 2})]
    assert run.summary(wrong)[0]["order right"] == "0 of 1"


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (made_up(1.0, 1.02), 0),
        (made_up(1.0, 1.05), 1),  # the mean is over its target
        (made_up(1.0, None, problem="ReplayError: no"), 1),
        (made_up(1.0, 1.5, use="fit"), 0),  # fitted rows are held to nothing
    ],
)
def test_status_says_whether_the_targets_hold(monkeypatch, capsys, outcome, status):
    monkeypatch.setattr(report, "predict_rows", lambda selected, processes: [outcome])
    assert report.run(cli.Options(command="validate", chips=("v5e",))) == status
    assert "predicted against published" in capsys.readouterr().out


def test_validate_predicts_a_row(microbench, tmp_path):
    """One that needs no other package, from the command line to the file."""
    path, sheet = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    words = ["validate", "--case", "P1136", "--json", str(path), "--csv", str(sheet)]
    status, out, err = microbench(*words)
    assert status == 0, err
    (entry,) = map(json.loads, path.read_text().splitlines())
    assert entry["id"] == "P1136"
    assert (entry["label"], entry["command"]) == (
        "predicted",
        "python -m microbench validate --case P1136",
    )
    assert "jax" in entry["versions"] and entry["commit"]
    assert "P1136" in sheet.read_text()
    assert abs(entry["predicted_ms"] / entry["published_ms"] - 1) < 0.05
    assert "hbm_copy" in out


def test_validate_refuses_a_row_that_is_not_there(microbench):
    status, _, err = microbench("validate", "--case", "P9999")
    assert status == 2
    assert "no published row" in err


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    row = next(row for row in rows.load() if row.kernel == "flash_attention")
    with pytest.raises(UnsupportedError, match="pip install tokamax"):
        peers.build(row)
    assert "tokamax" in run.predict_row(row).problem
