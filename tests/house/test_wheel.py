"""The wheel, as somebody gets it who has no checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.house import rules

ROOT = Path(__file__).parents[2]
DATA = [
    path.relative_to(ROOT).as_posix()
    for package in sorted(rules.PACKAGES)
    for pattern in ("*.csv", "*.json", "py.typed", "*.py")
    for path in sorted((ROOT / package).rglob(pattern))
    if "__pycache__" not in path.parts
]


def run(*command, cwd):
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder in which the wheel, and nothing else, is installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", str(folder), str(wheel), cwd=folder)
    return folder


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(DATA)


def test_the_wheel_carries_licence_command_and_plugin(wheel):
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    entries = archive.read(f"{info}/entry_points.txt").decode()
    assert "microbench = microbench.cli:run_and_exit" in entries
    assert "tpukit = tpukit.pytest_plugin" in entries
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "Requires-Python: >=3.12" in metadata


def test_every_package_imports_from_the_installed_wheel(installed):
    names = sorted(rules.PACKAGES)
    # -P keeps the current folder, and -s the user's, off the path; the dependencies' site stays.
    script = (
        "import importlib, pathlib, sys\n"
        f"sys.path.insert(0, {str(installed)!r})\n"
        f"for name in {names}:\n"
        "    print(pathlib.Path(importlib.import_module(name).__file__).parent.parent)\n"
    )
    places = run(sys.executable, "-P", "-s", "-c", script, cwd=installed).split("\n")[:-1]
    assert set(places) == {str(installed)} and len(places) == len(names)


def test_the_installed_command_line_runs(installed):
    script = f"import sys; sys.path.insert(0, {str(installed)!r}); " + (
        "from microbench.cli import main; sys.exit(main(['microbench', 'env']))"
    )
    out = run(sys.executable, "-P", "-s", "-c", script, cwd=installed)
    assert "commit               none" in out
