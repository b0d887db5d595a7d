"""The TPU chips this library knows, with the figures that plans and rooflines are made of.

All figures are per TensorCore unless they say otherwise, as in JAX's own `pltpu.get_tpu_info`, with
which a test compares this table. It exists because plans must be made for chips that are absent.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from tpukit.errors import ArgumentError

_MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class SparseCores:
    """The SparseCores of a chip.

    Attributes:
      cores: per TensorCore device.
      subcores: vector subcores of each.
      lanes: 32-bit lanes of a subcore.
      vmem_bytes: of each subcore.
    """

    cores: int
    subcores: int
    lanes: int
    vmem_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of TPU.

    Attributes:
      name: as used throughout this library: "v5e", "v5p", "v6e", "tpu7x".
      jax_version: JAX's name of it, `str(pltpu.get_tpu_info().chip_version)`.
      topology: the smallest topology that the compiler accepts for all its features.
      devices: JAX devices in that topology.
      cores: TensorCores in a chip.
      cores_per_device: TensorCores behind one JAX device (2 where they act as one, "megacore").
      clock_ghz: TensorCore clock, as far as it is known; it turns bundles into time.
      bf16_tflops, int8_tops, fp8_tflops: peak matrix rates; 0 where not native.
      hbm_gb_per_s: peak HBM bandwidth, 1e9 bytes per second.
      hbm_bytes: HBM capacity.
      vmem_bytes, smem_bytes: capacities.
      scoped_vmem_bytes: what one kernel may use unless `vmem_limit_bytes` asks for more.
      mxus, mxu_side: matrix units, and rows (= columns) of each.
      dma_granule_bytes: smallest unit that a DMA moves.
      branch_delay: bundles that are issued after a branch before it takes effect.
      hbm_address_bytes: unit of HBM addresses in its schedules.
      folds_delay: the compiler writes a trailing run of empty delay slots as one empty bundle.
      sparse: the SparseCores, or None.
    """

    name: str
    jax_version: str
    topology: str
    devices: int
    cores: int
    cores_per_device: int
    clock_ghz: float
    bf16_tflops: float
    int8_tops: float
    fp8_tflops: float
    hbm_gb_per_s: float
    hbm_bytes: int
    vmem_bytes: int
    scoped_vmem_bytes: int
    mxus: int
    mxu_side: int
    smem_bytes: int = _MIB
    dma_granule_bytes: int = 32
    branch_delay: int = 4
    hbm_address_bytes: int = 32
    folds_delay: bool = False
    sparse: SparseCores | None = None


# Sources. Rates, bandwidths, capacities, matrix units and SparseCores: JAX's table of TPUs (the
# vendor's peaks), checked by a test. Scoped VMEM: where libtpu 0.0.50 begins to refuse a kernel.
# Clock: peak rate / (matrix units x side^2 x 2 operations, twice that from v6e on). That gives 2.2
# GHz for tpu7x, but replayed schedules agree with published times at an effective 1.75 GHz, which
# stands here. Branch delays: seen in final schedules.
_TABLE = (
    Chip(
        name="v5e",
        jax_version="v5e",
        topology="v5e:2x2",
        devices=4,
        cores=1,
        cores_per_device=1,
        clock_ghz=1.5,
        bf16_tflops=197.0,
        int8_tops=394.0,
        fp8_tflops=0.0,
        hbm_address_bytes=512,
        hbm_gb_per_s=820.0,
        hbm_bytes=17_200_000_000,
        vmem_bytes=128 * _MIB,
        scoped_vmem_bytes=16 * _MIB,
        mxus=4,
        mxu_side=128,
    ),
    Chip(
        name="v5p",
        jax_version="v5p",
        topology="v5p:2x2x1",
        devices=4,
        cores=2,
        cores_per_device=2,
        clock_ghz=1.75,
        bf16_tflops=229.5,
        int8_tops=459.0,
        fp8_tflops=0.0,
        hbm_address_bytes=512,
        hbm_gb_per_s=1230.0,
        hbm_bytes=51_500_000_000,
        vmem_bytes=64 * _MIB,
        scoped_vmem_bytes=16 * _MIB,
        mxus=4,
        mxu_side=128,
        sparse=SparseCores(cores=4, subcores=16, lanes=8, vmem_bytes=_MIB // 2),
    ),
    Chip(
        name="v6e",
        jax_version="v6e",
        topology="v6e:2x2",
        devices=4,
        cores=1,
        cores_per_device=1,
        clock_ghz=1.75,
        bf16_tflops=920.0,
        int8_tops=1840.0,
        fp8_tflops=920.0,
        hbm_gb_per_s=1640.0,
        hbm_bytes=34_400_000_000,
        vmem_bytes=128 * _MIB,
        scoped_vmem_bytes=32 * _MIB,
        mxus=2,
        mxu_side=256,
        sparse=SparseCores(cores=2, subcores=16, lanes=8, vmem_bytes=_MIB // 4),
    ),
    Chip(
        name="tpu7x",
        jax_version="7x",
        topology="tpu7x:2x2x1",
        devices=8,
        cores=2,
        cores_per_device=1,
        clock_ghz=1.75,
        bf16_tflops=1155.0,
        int8_tops=0.0,
        fp8_tflops=2300.0,
        hbm_gb_per_s=3700.0,
        hbm_bytes=103_000_000_000,
        vmem_bytes=64 * _MIB,
        scoped_vmem_bytes=32 * _MIB,
        mxus=2,
        mxu_side=256,
        branch_delay=6,
        folds_delay=True,
        sparse=SparseCores(cores=2, subcores=16, lanes=16, vmem_bytes=_MIB // 2),
    ),
)

CHIPS = MappingProxyType({entry.name: entry for entry in _TABLE})


def chip(name: str) -> Chip:
    """Returns the chip called `name`.

    Raises:
      ArgumentError: no chip is called that.
    """
    try:
        return CHIPS[name]
    except KeyError:
        known = ", ".join(CHIPS)
        raise ArgumentError(
            where="chip", argument="name", got=f"is {name!r}", expected=f"one of {known}"
        ) from None


def current_chip() -> Chip | None:
    """Returns the TPU that JAX compiles for here, or None where that is no TPU known here.

    Under `jax.sharding.use_abstract_mesh` that is the mesh's TPU, so that code which plans while it
    is traced makes the same plan ahead of time as on the chip.
    """
    from jax.experimental.pallas import tpu as pltpu  # noqa: PLC0415  (chips must import quickly)

    try:
        version = str(pltpu.get_tpu_info().chip_version)
    except ValueError:
        return None
    return next((entry for entry in _TABLE if entry.jax_version == version), None)
