import csv
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from microbench import cases, environment, static, timing
from microbench.case import Case, Check, Cost
from microbench.record import Log, record
from microbench.table import table
from microbench.timing import time_calls
from tests.microbench import fake
from tpukit import aot, chips, errors

ROOT = Path(__file__).parents[2]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# The command line.


def test_help_names_every_command_and_imports_no_jax():
    script = (
        "import sys; from microbench.cli import main; status = main(['microbench', '--help']);"
        "assert not {'jax', 'numpy'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for word in ("list", "run", "aot", "env", "--kernel", "--set", "--json", "--seed"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dance"], "unknown command 'dance'"),
        (["run", "aot"], "unknown command 'run aot'"),
        (["--nothing"], "nothing"),
        (["run", "--seed", "x"], "seed"),
        (["run", "--set", "rows"], "needs key=value"),
        (["run", "--set", "columns=3"], "has no parameter 'columns'; it has fault, lengths, rows"),
        (["run", "--set", "rows=many"], "rows='many': expected int"),
        (["run", "--set", "lengths=1,b"], "expected integers with commas between"),
        (["run", "--kernel", "tango"], "no cases for kernel 'tango'; there are fake"),
        (["run", "--case", "zzz"], "no case is called 'zzz'"),
        (["aot", "--chip", "v99"], "'v99'"),
        (["run", "--json", "/nowhere/at/all.json"], "/nowhere/at/all.json"),
    ],
)
def test_bad_command_lines_are_refused_with_the_reason(microbench, words, message):
    status, out, err = microbench(*words)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not out


def test_list_shows_cases_with_changed_parameters(microbench):
    status, out, _ = microbench("list", "--set", "rows=8")
    assert status == 0
    assert "model/right" in out and "model/other" in out
    assert out.count("rows=8") == 2 and "lengths=1,2" in out and "lengths=none" in out


def test_case_selects_by_part_and_by_exact_name(microbench, monkeypatch):
    assert microbench("list", "--case", "oth")[1].count("model/") == 1
    monkeypatch.setattr(fake, "CASES", (*fake.CASES, Case("fake", "model", {"rows": 8})))
    assert microbench("list", "--case", "model")[1].count("model") == 1


def test_env_names_versions_and_commit(microbench):
    status, out, _ = microbench("env")
    assert status == 0
    assert "jax" in out and "libtpu" in out and environment.commit() in out


# Checks come before times.


def test_a_right_case_is_timed_and_recorded(microbench, tmp_path):
    path = tmp_path / "out.jsonl"
    status, out, _ = microbench("run", "--case", "right", "--json", str(path), "--seed", "5")
    assert status == 0
    assert "cpu reference, wall clock, measured" in out
    check, time = read(path)
    assert check["kind"] == "check" and check["values"]["ok"] is True
    assert time["label"] == "cpu reference, wall clock, measured" and time["chip"] == "cpu"
    assert 0 < time["values"]["best_ms"] <= time["values"]["median_ms"]
    assert time["values"]["calls"] == 2
    assert time["params"] == {"rows": 64, "lengths": [1, 2], "fault": "none"}
    assert time["versions"]["jax"] and time["commit"] == environment.commit()
    expected = "python -m microbench run --kernel fake --case model/right --seed 5"
    assert time["command"] == expected


@pytest.mark.parametrize("fault", ["wrong", "nan"])
def test_a_red_check_prints_no_time(microbench, tmp_path, fault):
    path = tmp_path / "out.jsonl"
    status, out, _ = microbench(
        "run", "--case", "right", "--set", f"fault={fault}", "--json", str(path)
    )
    assert status == 1
    assert "NO" in out and "time:" not in out and "measured" not in out
    assert {entry["kind"] for entry in read(path)} == {"check"}
    assert read(path)[0]["command"].endswith(f"--set fault={fault} --seed 0")


def test_a_red_check_says_what_is_wrong_and_leaves_other_cases_alone(microbench, monkeypatch):
    wrong = fake.CASES[0].override({"fault": "wrong"})
    monkeypatch.setattr(fake, "CASES", (wrong, fake.CASES[1]))
    status, out, _ = microbench("run")
    assert status == 1
    assert "row 3 is off" in out
    timed = out[out.index("time:") :]
    assert "model/other" in timed and "model/right" not in timed


def test_a_kernel_that_cannot_finish_is_a_red_check(microbench, tmp_path):
    path = tmp_path / "out.jsonl"
    words = ["--case", "right", "--set", "fault=deadlock", "--json", str(path)]
    status, out, _ = microbench("run", *words)
    assert status == 1
    assert "semaphore 3 needs 1, has 0" in out and "Deadlock: nobody signals" in out
    assert "time:" not in out and read(path)[0]["values"]["ok"] is False


def test_unsupported_has_its_own_status(microbench):
    status, out, _ = microbench("run", "--set", "fault=unsupported")
    assert status == 2
    assert "rows cannot run on this chip: it is a test" in out and "time:" not in out


def test_a_broken_toolchain_has_its_own_status(microbench, monkeypatch):
    def broken(*args, **kwargs):
        raise errors.ToolchainError(what="libtpu does not load", advice="Install it.")

    monkeypatch.setattr(static, "compile_case", broken)
    status, _, err = microbench("aot")
    assert status == 3
    assert "libtpu does not load. Install it." in err


def test_an_interrupted_run_shows_and_keeps_what_it_had(microbench, tmp_path):
    files = [tmp_path / "out.jsonl", tmp_path / "out.csv"]
    flags = ["--json", str(files[0]), "--csv", str(files[1])]
    status, out, err = microbench("run", "--set", "fault=interrupt", *flags)
    assert status == 130
    assert "model/right" in out and "interrupted after 1 records" in err
    assert len(read(files[0])) == 1
    assert len(list(csv.DictReader(files[1].open()))) == 1


# Ahead of time.


def test_aot_compiles_and_reports_loops_and_buffers(microbench, tmp_path):
    path = tmp_path / "out.jsonl"
    status, out, err = microbench("aot", "--case", "right", "--chip", "v5e", "--json", str(path))
    assert status == 0, err
    (entry,) = read(path)
    values = entry["values"]
    assert entry["label"] == "static" and entry["chip"] == "v5e" and entry["plan"] == "rows of 8"
    assert values["compiles"] and values["bundles"] > 0 and values["code KiB"] > 0
    assert values["bundles/row"] == values["bundles"] / 8
    assert any(loop["DMA starts"] for loop in values["kernels"][0]["loops"])
    assert "buffers, bytes" in out and "loops, bundles" in out
    assert (
        entry["command"] == "python -m microbench aot --kernel fake --case model/right --chip v5e"
    )


def test_a_case_that_does_not_fit_is_reported_not_raised(microbench, tmp_path):
    path = tmp_path / "out.jsonl"
    words = ["--case", "right", "--chip", "v5e", "--set", "fault=memory", "--json", str(path)]
    status, out, _ = microbench("aot", *words)
    assert status == 2
    assert "too_large" in out and "VMEM on v5e" in out
    (entry,) = read(path)
    assert entry["values"]["compiles"] is False and "VMEM" in entry["values"]["error"]


def test_a_dump_that_is_not_understood_gives_no_figures(microbench, monkeypatch, tmp_path):
    def unread(*args):
        raise errors.ListingError(file="x-final_bundles.txt", line=3, what="operation 'new'")

    monkeypatch.setattr(static, "compile_case", unread)
    path = tmp_path / "out.jsonl"
    status, out, _ = microbench("aot", "--case", "right", "--chip", "v5e", "--json", str(path))
    assert status == 2
    assert "x-final_bundles.txt:3: operation 'new'" in out
    (entry,) = read(path)
    assert entry["values"]["compiles"] is True and "bundles" not in entry["values"]


def test_floor_is_the_larger_of_compute_and_memory():
    v5e = chips.chip("v5e")
    assert static.floor_us(Cost(v5e.bf16_tflops * 1e12, 0), v5e) == pytest.approx(1e6)
    assert static.floor_us(Cost(0, v5e.hbm_gb_per_s * 1e9), v5e) == pytest.approx(1e6)


# Pieces.


def test_nan_and_excess_are_wrong():
    assert Check("x", 1.0, 1.0).ok
    assert not Check("x", float("nan"), 1.0).ok
    assert not Check("x", 1.1, 1.0).ok


def test_parameters_are_read_only_and_read_as_the_type_they_replace():
    case = Case("k", "c", {"n": 1, "x": 0.5, "b": False, "t": (1,), "s": "a"})
    with pytest.raises(TypeError):
        case.params["n"] = 2  # type: ignore[index]
    new = case.override({"n": "3", "x": "2", "b": "true", "t": "4,5", "s": "z"})
    assert dict(new.params) == {"n": 3, "x": 2.0, "b": True, "t": (4, 5), "s": "z"}
    assert case.params["n"] == 1


def test_tables_align_numbers_right_and_text_left():
    rows = [{"name": "a", "n": 1, "ok": True}, {"name": "long", "n": 12345, "ok": False}]
    assert table(rows).splitlines() == [
        "name       n  ok",
        "----  ------  ---",
        "a          1  yes",
        "long  12,345  NO",
    ]


def test_csv_has_a_column_for_every_value(tmp_path):
    log = Log(csv_path=str(tmp_path / "out.csv"))
    case = Case("k", "c", {"n": 1, "t": (1, 2)})
    log.add(record("time", case, {"ms": 2.0}, label="measured", command="x"))
    log.add(record("aot", case, {"bundles": 3}, label="static", command="y", chip="v5e"))
    log.close()
    first, second = csv.DictReader((tmp_path / "out.csv").open())
    assert first["values.ms"] == "2.0" and first["values.bundles"] == "" and first["chip"] == ""
    assert second["values.bundles"] == "3" and second["params.t"] == "[1, 2]"


def test_json_lines_are_in_the_file_before_the_run_ends(tmp_path):
    path = tmp_path / "out.jsonl"
    log = Log(json_path=str(path))
    log.add(record("time", Case("k", "c", {}), {}, label="measured", command="x"))
    assert len(read(path)) == 1
    log.close()


def test_time_calls_warms_up_waits_and_stops():
    events = []

    class Result:
        def block_until_ready(self):
            events.append("wait")

    def function():
        events.append("call")
        return Result()

    found = time_calls(function, [()], budget=0.0, least=3)
    assert events == ["call", "wait"] * 4 and found.calls == 3 and found.clock == "wall"
    assert found.best <= found.median <= found.worst


def test_inputs_take_turns():
    seen = []
    time_calls(seen.append, [(1,), (2,)], budget=0.0, least=3)
    assert seen == [1, 2, 1, 2]


PROFILE = """
planes { name: "/host:CPU" lines { name: "XLA Modules" events { duration_ps: 9000000 } } }
planes { name: "/device:TPU:0"
  lines { name: "XLA Ops" events { duration_ps: 1000000 } }
  lines { name: "XLA Modules"
    events { duration_ps: 5000000 }
    events { duration_ps: 8000000 }
    events { duration_ps: 6000000 } }
}
planes { name: "/device:TPU:1" lines { name: "XLA Modules" events { duration_ps: 2000000 } } }
"""


def test_on_a_tpu_the_clock_is_the_device(monkeypatch):
    """A profile made by hand, of a machine that is not there."""
    profile = ProfileData.from_text_proto(PROFILE)
    assert timing.runs(profile) == pytest.approx([5e-6, 8e-6, 6e-6])
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(timing, "_profiled", lambda once, calls: timing.runs(profile))
    found = time_calls(lambda: jnp.ones(8), [()], budget=0.0, least=2)
    assert (found.clock, found.calls) == ("device", 3)
    assert (found.best, found.median, found.worst) == pytest.approx((5e-6, 6e-6, 8e-6))


def test_a_profile_is_taken_and_read():
    """Of this machine, so that it has no TPU."""
    calls = []
    assert timing._profiled(lambda: calls.append(1) or 0.0, 3) == [] and len(calls) == 3


def test_every_kernel_with_cases_is_a_package_of_this_library():
    for kernel in cases.kernels():
        assert (ROOT / kernel / "__init__.py").exists()


def test_records_of_a_report_are_json(tmp_path):
    report = aot.static_report("tests.microbench.fake:build", "v5e", rows=64, fault="none")
    assert json.loads(json.dumps(static.tree(report)))["kernels"][0]["name"].startswith("double")
