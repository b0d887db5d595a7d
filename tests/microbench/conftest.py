"""The command line on the fake suite."""

import pytest

from microbench import cases, cli, environment, stages
from microbench.timing import time_calls
from tests.microbench import fake


@pytest.fixture
def microbench(monkeypatch, capsys):
    """Runs a command line on the fake suite; returns its exit status, output and error output."""
    monkeypatch.setattr(cases, "kernels", lambda: ("fake",))
    monkeypatch.setattr(cases, "load", lambda kernel: fake)
    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setattr(
        stages, "time_calls", lambda fn, args: time_calls(fn, args, budget=0, least=2)
    )

    def run(*words):
        status = cli.main(["microbench", *words])
        return status, *capsys.readouterr()

    return run
