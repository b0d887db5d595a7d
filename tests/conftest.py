"""Environment and Hypothesis profiles of every test; nothing below may import JAX before this."""

import os
import sys

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two test processes compile at once
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
}
if "jax" in sys.modules:  # a pytest plugin was quicker, and JAX has read its environment by now
    raise RuntimeError("jax was imported before tests/conftest.py could set its environment")
os.environ.update(ENVIRONMENT)

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from tpukit import versions  # noqa: E402  (it imports no JAX)

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough",
    deadline=None,
    database=None,
    print_blob=True,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci")  # --hypothesis-profile=thorough takes precedence


def pytest_configure(config: pytest.Config) -> None:
    """Loads the library's own plugin where the project is not installed."""
    if not config.pluginmanager.hasplugin("tpukit"):
        config.pluginmanager.import_plugin("tpukit.pytest_plugin")
    config.addinivalue_line("markers", "needs(name): a row of tpukit.versions.CAPABILITIES")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what this JAX cannot do, and says why."""
    for mark in item.iter_markers("needs"):
        if not versions.has(mark.args[0]):
            pytest.skip(versions.lack(mark.args[0]))
