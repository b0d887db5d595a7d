"""What a figure was obtained with: versions, commit, machine."""

from __future__ import annotations

import functools
import glob
import importlib.metadata
import os
import pathlib
import platform
import subprocess

from tpukit.versions import missing

PACKAGES = ("tpu-serving-kernels", "jax", "jaxlib", "libtpu", "numpy", "ml_dtypes")
ROOT = pathlib.Path(__file__).resolve().parent.parent


def prepare() -> None:
    """Keeps JAX from looking for a TPU where there is none. Has to come before JAX is imported."""
    if has_tpu():
        return
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)


def has_tpu() -> bool:
    """Whether this machine has a TPU, by its device files, so without loading anything."""
    return bool(glob.glob("/dev/accel[0-9]*") or _vfio_tpu())


def _vfio_tpu() -> bool:
    google = glob.glob("/sys/bus/pci/devices/*/vendor") if glob.glob("/dev/vfio/[0-9]*") else []
    return any(pathlib.Path(vendor).read_text().strip() == "0x1ae0" for vendor in google)


@functools.cache
def commit() -> str:
    """Commit of the checkout, with "+changes" where files differ; "none" outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")) != ROOT:
            return "none"  # installed below somebody else's checkout
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "-s") else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide a figure, Python's included."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe() -> dict[str, str]:
    """Everything `microbench env` prints."""
    return {
        **versions(),
        "commit": commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "TPU": "present" if has_tpu() else "none: kernels are interpreted and compiled, not timed",
        **{f"without {row.name}": f"{row.why}: {row.instead}" for row in missing()},
    }
