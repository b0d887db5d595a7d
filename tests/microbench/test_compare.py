"""The command `compare`, `--plan` and `--resume`."""

import json
import subprocess

import pytest

from microbench import cli, compare, environment, stages
from microbench.case import Case, planned
from microbench.record import record
from tests.microbench import fake


def made(case, us, chip="tpu7x", kind="predict"):
    values = {} if us is None else {compare.FIGURES[kind][0]: us}
    entry = record(kind, Case("fake", case, {"n": (1, 2)}), values, label="", command="", chip=chip)
    return json.loads(json.dumps(entry))


def test_changes_by_hand():
    before = [made("a", 100.0), made("b", 100.0), made("c", 100.0), made("d", 9.0), made("e", None)]
    after = [made("a", 100.4), made("b", 120.0), made("c", 50.0), made("e", 7.0), made("f", 1.0)]
    found = {
        change.case: (change.verdict, change.percent) for change in compare.changes(before, after)
    }
    assert found == {
        "a": ("same", pytest.approx(0.4)),
        "b": ("slower", pytest.approx(20)),
        "c": ("faster", pytest.approx(-50)),
        "d": ("gone", None),
        "e": ("new", None),
        "f": ("new", None),
    }


def test_other_chips_and_other_parameters_are_other_figures():
    other = made("a", 50.0)
    other["params"]["n"] = [3]
    before, after = [made("a", 100.0)], [made("a", 50.0, chip="v6e"), other]
    assert [change.verdict for change in compare.changes(before, after)] == ["gone", "new", "new"]


def test_wall_clocks_may_differ_more_than_schedules():
    before = [made("a", 100.0, kind="time"), made("a", 100.0, kind="aot")]
    after = [made("a", 109.0, kind="time"), made("a", 101.0, kind="aot")]
    assert [change.verdict for change in compare.changes(before, after)] == ["same", "slower"]


def test_two_files(microbench, tmp_path):
    paths = [tmp_path / "before", tmp_path / "after"]
    for path, us in zip(paths, (10.0, 11.0), strict=True):
        path.write_text(json.dumps(made("a", us)) + "\n")
    status, out, _ = microbench("compare", *map(str, paths))
    assert status == 1 and "slower" in out and "1 figures, 1 worse" in out
    status, out, _ = microbench("compare", str(paths[1]), str(paths[0]))
    assert status == 0 and "faster" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "no-such-thing"], "neither a file nor a revision"),
        (["compare", __file__], "not a file of records"),
        (["compare", "a", "b", "c"], "unknown command 'compare a b c'"),
        (["predict", "--plan", "block"], "--plan needs key=value"),
        (["predict", "--chip", "v6e", "--plan", "blocks=8"], "no field 'blocks'; they have block"),
        (["run", "--resume"], "--resume needs --json"),
    ],
)
def test_bad_command_lines_are_refused_with_the_reason(microbench, words, message):
    status, _, err = microbench(*words)
    assert status == 2 and message in err and "Traceback" not in err


def test_what_is_not_replayed_is_compared_by_static_figures(tmp_path, monkeypatch):
    """Of SparseCores those of a subcore; a kernel that is predicted is not compiled again."""
    asked = []

    def run_command(command, root, scratch, options):
        asked.append((command, options.kernels))
        predicted, sparse = made("a", 5.0), made("b", None)
        if command == "predict":
            sparse["values"], sparse["kernel"] = {"note": "not replayed"}, "sparse"
            return [predicted, sparse]
        entry = made("b", 0, kind="aot") | {"kernel": "sparse"}
        entry["values"]["bundles/subcore"] = 40 + len(asked)
        return [entry]

    monkeypatch.setattr(compare, "_run_command", run_command)
    runs = [compare._predict(tmp_path, tmp_path, cli.Options()) for _ in range(2)]
    assert asked == [("predict", ()), ("aot", ("sparse",))] * 2
    same, worse = compare.changes(*runs)
    assert (same.case, same.verdict) == ("a", "same")
    assert (worse.figure, worse.before, worse.after) == ("bundles/subcore", 42, 44)
    assert worse.verdict == "slower"


def test_a_tree_that_predicts_but_does_not_compile_is_an_error(tmp_path):
    """What it predicted is not taken for static figures."""
    program = tmp_path / "microbench" / "__main__.py"
    program.parent.mkdir()
    (program.parent / "__init__.py").touch()
    line = json.dumps(made("a", None) | {"values": {"note": "not replayed"}})
    program.write_text(
        "import sys\nif sys.argv[1] == 'aot': sys.exit(7)\n"
        f"open(sys.argv[sys.argv.index('--json') + 1], 'w').write({line!r})\n"
    )
    with pytest.raises(cli.UsageError, match="aot ends with exit status 7"):
        compare._predict(tmp_path, tmp_path, cli.Options())


def test_a_revision_is_predicted_with_its_own_code(tmp_path, monkeypatch):
    """A repository whose one file writes what the command line asks for."""
    program = tmp_path / "microbench" / "__main__.py"
    program.parent.mkdir()
    (program.parent / "__init__.py").touch()
    script = (
        "import json, sys; path = sys.argv[sys.argv.index('--json') + 1];"
        "open(path, 'w').write(json.dumps({'kind': 'predict', 'kernel': 'fake', 'case': 'a',"
        "'params': {}, 'chip': sys.argv[sys.argv.index('--chip') + 1],"
        "'values': {'predicted us': US}}) + '\\n')"
    )
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(tmp_path)]
    program.write_text(script.replace("US", "5.0"))
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    program.write_text(script.replace("US", "6.0"))
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    (change,) = compare.two(["HEAD"], cli.Options(chips=("v6e",)))
    assert (change.before, change.after, change.verdict) == (5.0, 6.0, "slower")
    assert change.chip == "v6e"


def test_peers_are_predicted_beside_the_kernel_or_say_why_not(microbench, tmp_path):
    path = tmp_path / "records"
    words = ["--case", "right", "--chip", "v6e", "--json", str(path)]
    status, out, _ = microbench("compare", *words)
    ours, xla, nobody = (json.loads(line)["values"] for line in path.read_text().splitlines())
    assert status == 0 and "this kernel" in out and "XLA" in out
    assert xla["times as slow"] == pytest.approx(xla["predicted us"] / ours["predicted us"])
    assert "predicted us" not in nobody and "VMEM" in nobody["note"]


def test_a_plan_is_used_recorded_and_checked(microbench, tmp_path):
    path = tmp_path / "records"
    words = ["aot", "--case", "right", "--chip", "v6e", "--json", str(path)]
    status, *_ = microbench(*words, "--plan", "block=16")
    (entry,) = map(json.loads, path.read_text().splitlines())
    assert status == 0 and entry["plan_fields"] == {"block": 16}
    assert entry["plan"] == "rows of 16" and "--plan block=16" in entry["command"]
    status, out, _ = microbench(*words, "--plan", "block=12")
    assert status == 2 and "it is a test" in out
    with pytest.raises(ValueError, match="expected int"):
        planned(fake.CASES[0], fake.Plan(), {"block": "many"})


def test_what_a_file_has_is_not_done_again(microbench, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "commit", lambda: "abc")
    path, done = tmp_path / "records", []
    monkeypatch.setattr(fake, "check", lambda case, seed: done.append(case.name) or [])
    real = fake.check

    def check(case, seed):
        real(case, seed)
        return [stages.Check("output", 0.01, 0.1)]

    monkeypatch.setattr(fake, "check", check)
    words = ["run", "--json", str(path), "--resume"]
    assert microbench(*words, "--case", "right")[0] == 0
    assert done == ["model/right"]
    status, out, _ = microbench(*words)
    assert status == 0 and out.count("output") == 2
    assert done == ["model/right", "model/other"]
    assert len(path.read_text().splitlines()) == 4
    microbench(*words, "--set", "rows=8", "--case", "right")
    assert done[2:] == ["model/right"]
    monkeypatch.setattr(environment, "commit", lambda: "abd")
    microbench(*words, "--case", "right")
    assert len(done) == 4


def test_uncommitted_changes_are_never_resumed(microbench, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "commit", lambda: "abc+changes")
    path = tmp_path / "records"
    words = ["run", "--json", str(path), "--resume", "--case", "right"]
    microbench(*words)
    microbench(*words)
    assert len(path.read_text().splitlines()) == 2
