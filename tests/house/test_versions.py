"""The page of versions says what the table says, and so do the pins."""

import re
import tomllib
from pathlib import Path

import pytest

from microbench import environment
from tpukit import versions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "versions.md").read_text()


def rows(heading, page=PAGE):
    """The cells of the table below a heading, its own heading and rule left out."""
    text = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def problems(page):
    """Where a page and the table differ."""
    told = [tuple(row) for row in rows("What is missing", page)]
    table = [
        (row.name, ".".join(map(str, row.needs)), row.why, row.instead)
        for row in versions.CAPABILITIES
    ]
    return set(told) ^ set(table)


def test_the_page_is_the_table():
    assert problems(PAGE) == set()


def test_a_row_left_out_or_changed_is_seen():
    assert problems(PAGE.replace("| pinned operands | 0.12.0", "| pinned operands | 0.11.0"))
    assert problems(re.sub(r"\| SparseCore fences .*\n", "", PAGE))


def test_versions_seen_begin_with_the_oldest_that_the_pins_allow():
    oldest = ".".join(map(str, versions.OLDEST))
    assert rows("What was seen")[0][0] == oldest
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [*project["dependencies"], *project["optional-dependencies"]["tpu"]]
    pins = [pin for pin in pins if pin.startswith("jax")]
    assert len(pins) == 2 and all(f">={oldest}," in pin for pin in pins)


def test_skips_of_tests_name_rows():
    used = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r'mark\.needs\("([^"]+)"\)', path.read_text())
    }
    assert used == {"interpreted faults", "SparseCore simulator"}
    assert used <= {row.name for row in versions.CAPABILITIES}


@pytest.mark.parametrize("version", [(0, 10, 2), (0, 11, 0)])
def test_the_environment_names_what_an_old_version_lacks(version, monkeypatch):
    monkeypatch.setattr(versions, "jax_version", lambda: version)
    told = environment.describe()
    for row in versions.CAPABILITIES:
        assert not versions.has(row.name)
        assert row.why in told[f"without {row.name}"]
        assert f"this is {'.'.join(map(str, version))}" in versions.lack(row.name)


def test_nothing_is_missing_from_the_newest(monkeypatch):
    monkeypatch.setattr(versions, "jax_version", lambda: (0, 12, 0))
    assert not [key for key in environment.describe() if key.startswith("without")]


def test_a_kernel_that_cannot_be_simulated_is_an_error_that_says_why(monkeypatch):
    from tests.tpukit import sparse_kernels
    from tpukit import sparsecore
    from tpukit.errors import UnsupportedError

    monkeypatch.setattr(versions, "jax_version", lambda: (0, 11, 0))
    run, _ = sparse_kernels.GOOD["gather"]
    with pytest.raises(UnsupportedError, match=r"needs JAX 0\.12\.0, this is 0\.11\.0"):
        sparsecore.simulate(run, *sparse_kernels.arrays())
