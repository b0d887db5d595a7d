"""The layers on several processes, as on several machines, give the numbers of one process."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.stack.process import FAULTS

ROOT = Path(__file__).parents[2]
DEVICES, TENSOR = 4, 2
SECONDS = 240.0
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",  # quick to compile
}


def free_port():
    """A port on which nobody listens now."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def run_together(commands, folder, seconds=SECONDS, environments=None):
    """Runs Python command lines side by side; none is left when one fails, or when time is up.

    Returns what each of them has written.
    """
    environments = environments or [{}] * len(commands)
    logs = [folder / f"{number}.log" for number in range(len(commands))]
    running = []
    try:
        for words, log, more in zip(commands, logs, environments, strict=True):
            with log.open("w") as out:
                running.append(
                    subprocess.Popen(
                        [sys.executable, *words],
                        cwd=ROOT,
                        env=os.environ | ENVIRONMENT | more,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        end = time.monotonic() + seconds
        while any(one.poll() is None for one in running):
            failed = any(one.poll() for one in running)
            if failed or time.monotonic() > end:
                break
            time.sleep(0.1)
        codes = [one.poll() for one in running]
    finally:
        for one in running:
            one.kill()
            one.wait()
    texts = [log.read_text() for log in logs]
    assert codes == [0] * len(commands), "\n".join([f"{codes}:", *(x[-2000:] for x in texts)])
    return texts


def results(folder, processes):
    """What every device has after both steps of the small model, by fault."""
    folder = folder / str(processes)
    folder.mkdir()
    words = ["-m", "tests.stack.process", f"localhost:{free_port()}"]
    result = str(folder / "result")
    commands = [
        [*words, *map(str, (processes, number, DEVICES, TENSOR)), result]
        for number in range(processes)
    ]
    run_together(commands, folder)
    found = {}
    for path in folder.glob("*.npz"):
        with np.load(path) as file:
            found[path.stem.removeprefix("result-")] = [file[name] for name in file.files]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results by number of processes; of one, which has all devices, those that are right."""
    folder = tmp_path_factory.mktemp("processes")
    return {processes: results(folder, processes) for processes in (1, 2, 4)}


def same(found, wanted):
    return [np.array_equal(x, y) for x, y in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_numbers_of_one(processes, found):
    alone = found[1]["none"]
    assert same(found[processes]["none"], alone) == [True] * len(alone)
    first, second, *_ = alone
    assert first.shape == second.shape
    assert not np.array_equal(first, second)
    assert np.isfinite(alone[:2]).all()


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_a_process_with_wrong_arrays_is_noticed(fault, found):
    assert not all(same(found[2][fault], found[1]["none"]))


def test_a_process_that_fails_ends_the_others(tmp_path):
    begin = time.monotonic()
    commands = [["-c", "import time; time.sleep(60)"], ["-c", "raise SystemExit(3)"]]
    with pytest.raises(AssertionError, match=r"\[None, 3\]"):
        run_together(commands, tmp_path)
    assert time.monotonic() - begin < 30


def test_processes_that_take_too_long_are_ended(tmp_path):
    with pytest.raises(AssertionError, match=r"\[None\]"):
        run_together([["-c", "import time; time.sleep(60)"]], tmp_path, seconds=0.5)


def test_the_program_of_the_page_runs_on_two_processes(tmp_path):
    page = (ROOT / "docs" / "multi-host.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    shared = {
        "COORDINATOR": f"localhost:{free_port()}",
        "PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    environments = [shared | {"PROCESS": str(number)} for number in range(2)]
    texts = run_together([["-c", code]] * 2, tmp_path, environments=environments)
    last = [text.strip().splitlines()[-1] for text in texts]
    assert last[0] == last[1]
    assert last[0].startswith("(32, 512) 2 ")
