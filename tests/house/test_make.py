"""The commands of the Makefile: they set themselves up, or say what is missing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTER = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}  # of the make that runs these tests

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*words):
    environment = {key: value for key, value in os.environ.items() if key not in OUTER}
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize("target", ["bench", "test", "lint"])
def test_every_command_sets_up_first_and_then_runs_in_the_environment(target, tmp_path):
    done = make("-n", target, f"VENV={tmp_path}/venv")
    assert done.returncode == 0, done.stderr
    setup, run = done.stdout.index("pip install"), done.stdout.rindex(f"{tmp_path}/venv/bin/python")
    assert setup < run


def test_a_ready_environment_is_not_set_up_again(tmp_path):
    (tmp_path / ".ready").touch()
    done = make("-n", "test", f"VENV={tmp_path}")
    assert done.returncode == 0 and "pip install" not in done.stdout


@pytest.mark.parametrize("version", [None, "3.11.2"])
def test_without_a_fitting_python_it_says_what_is_missing(tmp_path, version):
    python = tmp_path / "python"
    if version:
        script = f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}"\n'
        python.write_text(script)
        python.chmod(0o755)
    done = make("test", f"VENV={tmp_path}/venv", f"PYTHON={python}")
    assert done.returncode != 0
    assert "No Python >= 3.12 with venv and ensurepip was found" in done.stderr
    assert f"{python}: {f'Python {version}' if version else 'not found'}" in done.stderr
    assert "make test PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_lint_tests_and_a_benchmark():
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in script
    for target in ("lint", "test", "bench"):
        assert f"make {target}" in script
