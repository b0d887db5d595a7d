"""The table of chips against JAX's own."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from tpukit import chips, errors


def described(name):
    """What JAX says of a chip, in the table's terms."""
    entry = chips.chip(name)
    devices = topologies.get_topology_desc(entry.topology, platform="tpu").devices
    with jax.sharding.use_abstract_mesh(Mesh(np.array(devices[:1]), ("x",)).abstract_mesh):
        info = pltpu.get_tpu_info()
    sparse = info.sparse_core and chips.SparseCores(
        cores=info.sparse_core.num_cores,
        subcores=info.sparse_core.num_subcores,
        lanes=info.sparse_core.num_lanes,
        vmem_bytes=info.sparse_core.vmem_capacity_bytes,
    )
    granule = info.sparse_core.dma_granule_size_bytes if info.sparse_core else 32
    return {
        "jax_version": str(info.chip_version),
        "devices": len(devices),
        "cores": info.chip_version.num_physical_tensor_cores_per_chip,
        "cores_per_device": info.num_cores,
        "bf16_tflops": info.bf16_ops_per_second / 1e12,
        "int8_tops": info.int8_ops_per_second / 1e12,
        "fp8_tflops": info.fp8_ops_per_second / 1e12,
        "hbm_gb_per_s": info.mem_bw_bytes_per_second / 1e9,
        "hbm_bytes": info.hbm_capacity_bytes,
        "vmem_bytes": info.vmem_capacity_bytes,
        "smem_bytes": info.smem_capacity_bytes,
        "mxus": info.num_mxus,
        "mxu_side": info.mxu_column_size,
        "dma_granule_bytes": granule,
        "sparse": sparse,
    }


@pytest.mark.parametrize("name", chips.CHIPS)
def test_table_is_jaxs(name):
    mine = dataclasses.asdict(chips.chip(name))
    theirs = described(name)
    theirs["sparse"] = theirs["sparse"] and dataclasses.asdict(theirs["sparse"])
    assert {key: mine[key] for key in theirs} == theirs


@pytest.mark.parametrize(("name", "rows"), [("v5e", 1), ("v5p", 1), ("v6e", 2)])
def test_clock_follows_from_the_peak(name, rows):
    entry = chips.chip(name)
    operations_per_cycle = entry.mxus * entry.mxu_side**2 * 2 * rows
    clock = entry.bf16_tflops * 1e3 / operations_per_cycle
    assert clock == pytest.approx(entry.clock_ghz, rel=0.01)


def test_unknown_chip():
    with pytest.raises(errors.ArgumentError, match="'v4'; needs one of v5e, v5p, v6e, tpu7x"):
        chips.chip("v4")


def test_no_tpu_here():
    assert chips.current_chip() is None
