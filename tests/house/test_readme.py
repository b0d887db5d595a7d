"""Every block of the README and of the other pages does what it says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from microbench.cli import Options, parse
from tests.house import rules

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
CHEAP = {"list", "env"}  # benchmark commands that take no time


def blocks(language, text=README):
    """The fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text=README):
    """The command lines of all bash blocks, comments left out."""
    lines = [
        shlex.split(line, comments=True) for b in blocks("bash", text) for line in b.split("\n")
    ]
    return [words for words in lines if words]


def programs():
    """Every block of the README by itself; the blocks of any other page are one program."""
    found = {f"README.md {i}": block for i, block in enumerate(blocks("python"))}
    for page in PAGES[1:]:
        if code := "\n".join(blocks("python", page.read_text())):
            found[page.name] = code
    return found


PROGRAMS = programs()


def problem(words):
    """What is wrong with a command of the README, or None."""
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        unknown = [
            t for t in targets if not re.search(rf"^{re.escape(t)}:", MAKEFILE, re.MULTILINE)
        ]
        if unknown:
            return f"no target {unknown[0]}"
        arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
        if "bench" in targets and arguments:
            return problem(["python", "-m", "microbench", *shlex.split(arguments[0])])
        return None
    if words[:3] == ["python", "-m", "microbench"]:
        try:
            options = parse(words[2:])
        except ValueError as error:
            return str(error)
        unknown = set(options.kernels) - rules.KERNELS if isinstance(options, Options) else set()
        return f"no kernel {unknown.pop()}" if unknown else None
    if words[:2] == ["pip", "install"]:
        return None
    return f"not a command of this project: {words[0]}"


@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS)
def test_python_blocks_run(code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_bash_blocks_hold_commands_that_exist():
    every = [words for page in PAGES for words in commands(page.read_text())]
    assert len(every) > len(commands()) > 0
    found = {" ".join(words): problem(words) for words in every}
    assert not {command: why for command, why in found.items() if why}


def test_cheap_commands_run():
    cheap = [w for w in commands() if w[:3] == ["python", "-m", "microbench"] and CHEAP & set(w)]
    assert cheap
    for words in cheap:
        done = subprocess.run(
            [sys.executable, *words[1:]], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr


def test_every_block_has_a_language_that_is_tested():
    for page in PAGES:
        languages = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
        assert set(languages) <= {"python", "bash", "text", ""}, page
    assert len(blocks("python")) >= 1


def test_relative_links_exist():
    for page in PAGES:
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page


def test_every_package_is_mentioned():
    assert [name for name in rules.PACKAGES if f"`{name}" not in README] == []


@pytest.mark.parametrize(
    "line",
    [
        "make dance",
        "make bench ARGS='dance'",
        "make bench ARGS='aot --nothing'",
        "python -m microbench run --kernel tango",
        "python -m microbench fly",
        "curl example.com",
    ],
)
def test_a_command_that_does_not_exist_is_caught(line):
    ((*words,),) = commands(f"```bash\n{line}  # comment\n```\n")
    assert problem(words)
