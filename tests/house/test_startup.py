"""Importing costs little and starts nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import rules

ROOT = Path(__file__).parents[2]


def run(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)


def test_importing_every_package_initialises_no_backend():
    names = ", ".join(sorted(rules.PACKAGES))
    script = (
        f"import {names}, reference.gla, tpukit.aot, sys\n"
        "import jax\n"
        "jax.config.update('jax_platforms', 'no_such_platform')\n"
        "try:\n"
        "    jax.devices()\n"
        "except RuntimeError:\n"
        "    sys.exit(0)\n"
        "sys.exit('a backend was initialised by an import')\n"
    )
    done = run(script)
    assert done.returncode == 0, done.stderr


def test_the_backend_check_can_fail():
    script = (
        "import jax\njax.devices()\n"
        "jax.config.update('jax_platforms', 'no_such_platform')\njax.devices()"
    )
    assert run(script).returncode == 0


@pytest.mark.parametrize(
    "module", ["tpukit", "tpukit.pytest_plugin", "tpukit.errors", "microbench"]
)
def test_light_modules_import_no_jax(module):
    script = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    done = run(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kernel", sorted(rules.KERNELS | {"reference.gla"}))
def test_a_kernel_loads_nothing_that_jax_does_not(kernel):
    def loaded(names):
        script = f"import sys, {names}; print(*{{name.split('.')[0] for name in sys.modules}})"
        done = run(script)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    more = loaded(kernel) - loaded("jax.experimental.pallas.tpu")
    assert more <= rules.PACKAGES | sys.stdlib_module_names
