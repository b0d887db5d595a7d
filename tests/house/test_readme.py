"""Every block of the README does what it says."""

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


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run(number, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[number]],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_bash_blocks_hold_commands_that_exist():
    assert commands()
    found = {" ".join(words): problem(words) for words in commands()}
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
    assert set(re.findall(r"^```(\w*)$", README, re.MULTILINE)) <= {"python", "bash", "text", ""}
    assert len(blocks("python")) >= 1


def test_relative_links_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


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
