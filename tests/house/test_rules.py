"""The import arrows, sizes and wording of the whole checkout; and that each rule can fail."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.house import rules

ROOT = Path(__file__).parents[2]
STDLIB = frozenset(sys.stdlib_module_names)
TEXT_SUFFIXES = {".py", ".md", ".toml", ".json", ".txt", ".cfg", ".yml", ".yaml", ""}


def sources(*folders):
    """(path in the checkout, text) of the Python files below the folders."""
    for folder in sorted(folders):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def texts():
    """(path, text) of every text file of the checkout."""
    top = [path for path in ROOT.iterdir() if path.is_file()]
    folders = [ROOT / folder for folder in (*sorted(rules.HOUSE), ".ci")]
    below = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    for path in sorted(top + below):
        # .git is a file in a worktree, and names a place on this machine
        if path.suffix in TEXT_SUFFIXES and path.name != ".git" and "__pycache__" not in path.parts:
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def test_every_folder_with_code_is_known_to_the_rules():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == rules.HOUSE


def test_imports_follow_the_arrows():
    found = [
        violation
        for path, source in sources(*rules.PACKAGES)
        for violation in rules.import_violations(path, source, STDLIB)
    ]
    assert not found, "\n".join(found)


def test_private_jax_is_used_in_one_file():
    found = [
        violation
        for path, source in sources(*rules.HOUSE)
        for violation in rules.private_jax_violations(path, source)
    ]
    assert not found, "\n".join(found)


def test_files_and_functions_fit_a_reader():
    found = [
        violation
        for path, source in sources(*rules.HOUSE)
        for violation in rules.size_violations(path, source)
    ]
    assert not found, "\n".join(found)


def test_no_text_belongs_to_one_machine_or_day():
    found = [
        violation
        for path, text in texts()
        if not path.startswith("tests/house/")
        for violation in rules.text_violations(path, text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", sorted(rules.HOUSE))
def test_top_level_names_resolve_inside_the_checkout(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin) == ROOT / name / "__init__.py"


def test_every_folder_of_tests_is_a_package():
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [f for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_every_package_is_typed_and_described():
    for package in rules.PACKAGES:
        assert (ROOT / package / "py.typed").exists(), package
        assert (ROOT / package / "__init__.py").read_text().startswith('"""'), package


# Each rule catches what it is for.


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("reference/x.py", "import tpukit"),
        ("reference/x.py", "from gla import gla"),
        ("reference/x.py", "import absl"),
        ("tpukit/x.py", "import reference.gla"),
        ("tpukit/x.py", "from gla.plan import Plan"),
        ("tpukit/x.py", "import pytest"),
        ("gla/x.py", "def f():\n  import fused_moe"),
        ("gla/x.py", "from gather_reduce import x"),
        ("gla/x.py", "import microbench"),
        ("gla/x.py", "import importlib\nimportlib.import_module('tests.gla')"),
        ("gla/x.py", "__import__('microbench')"),
        ("gather_reduce/x.py", "import fused_moe"),
        ("adapters/x.py", "import microbench"),
        ("gla/x.py", "from adapters import sglang_jax"),
        ("microbench/x.py", "from adapters import sglang_jax"),
        ("microbench/x.py", "from tests import house"),
        ("microbench/x.py", "import torch"),
    ],
)
def test_an_import_against_the_arrows_is_caught(path, source):
    assert rules.import_violations(path, source, STDLIB)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("reference/x.py", "import jax, math\nfrom reference import y\nfrom . import z"),
        ("gla/x.py", "import reference.gla\nfrom tpukit import buffers"),
        ("fused_moe/x.py", "import gather_reduce"),
        ("tpukit/pytest_plugin.py", "import pytest"),
        ("adapters/x.py", "import gla, ragged_attention, reference.gla, tpukit.errors"),
        ("microbench/x.py", "import gla, absl.flags"),
    ],
)
def test_an_import_along_the_arrows_is_not_caught(path, source):
    assert not rules.import_violations(path, source, STDLIB)


@pytest.mark.parametrize(
    "source",
    [
        "import jax._src.core",
        "from jax._src import core",
        "from jax import _src",
        "from jax.experimental.pallas import _x",
        "import jax\njax._src.core.f()",
        "from jax.experimental import pallas as pl\ndef f():\n  pl.core._y()",
        "import jaxlib._jax",
        "import importlib\nimportlib.import_module('jax._src.core')",
    ],
)
def test_private_jax_is_caught(source):
    assert rules.private_jax_violations("gla/x.py", source)
    assert not rules.private_jax_violations(rules.PRIVATE_JAX, source)


def test_public_jax_and_own_private_names_are_not_caught():
    source = "import jax\nfrom gla import _x\n_x._y()\njax.__version__\nself._z"
    assert not rules.private_jax_violations("gla/x.py", source)


def nested(depth):
    return (
        "def f():\n" + "".join(" " * i + "if x:\n" for i in range(1, depth + 1)) + " " * 9 + "y\n"
    )


def test_what_does_not_fit_a_reader_is_caught():
    assert rules.size_violations("x.py", "x = 1\n" * 501)
    assert not rules.size_violations("x.py", "x = 1\n" * 500)
    assert rules.size_violations("x.py", "def f():\n" + "  x = 1\n" * 100)
    assert not rules.size_violations("x.py", "def f():\n" + "  x = 1\n" * 99)
    assert rules.size_violations("x.py", nested(5))
    assert not rules.size_violations("x.py", nested(4))


def test_an_elif_is_no_deeper_than_its_if():
    chain = "def f():\n if a:\n  b\n" + " elif a:\n  b\n" * 9
    assert not rules.size_violations("x.py", chain)


@pytest.mark.parametrize(
    "line",
    [
        "see /work/shared/notes.md",
        "open('/home/me/x')",
        "as asked for in issue 2",
        "left for the next session",
        "written by helper B.",
    ],
)
def test_local_text_is_caught(line):
    assert rules.text_violations("README.md", line)


@pytest.mark.parametrize(
    "line",
    [
        '@pytest.fixture(scope="session")',
        "https://example.com/work/x",
        "a helper of the kernel",
        "bundles issue in order",
    ],
)
def test_other_text_is_not_caught(line):
    assert not rules.text_violations("README.md", line)
