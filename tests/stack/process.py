"""One process of several that run a small model together; see `test_processes`.

    python -m tests.stack.process ADDRESS PROCESSES PROCESS DEVICES TENSOR RESULT

joins the others, if there are any, runs the model on all devices, and, if it is the first process,
leaves what every device has in RESULT, a file for each fault that the last process then makes.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tests.stack import small

FAULTS = ("none", "experts swapped", "states swapped")


def main(address, processes, process, devices, tensor, result):
    """Runs the model without and, with two processes, with each fault."""
    jax.config.update("jax_num_cpu_devices", devices // processes)
    if processes > 1:
        jax.distributed.initialize(address, processes, process, initialization_timeout=60)
    assert jax.process_count() == processes
    assert len(jax.devices()) == devices
    mesh = jax.make_mesh((devices // tensor, tensor), ("data", "tensor"))
    run = small.program(small.config(devices // tensor, tensor), mesh)
    for fault in FAULTS if processes == 2 else FAULTS[:1]:
        found = run(putter(mesh, fault, last=process == processes - 1))
        if processes > 1:
            found = multihost_utils.process_allgather(found, tiled=True)
        if process == 0:
            leaves = (np.asarray(x) for x in jax.tree.leaves(found))
            wide = (x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for x in leaves)
            np.savez(f"{result}-{fault}.npz", **{str(i): x for i, x in enumerate(wide)})


def putter(mesh, fault, last):
    """What puts a host array on the devices; the last process makes the fault."""

    def put(name, value, spec):
        value = np.asarray(value)
        swapped = (fault, last) == ("experts swapped", True) and name.endswith(".experts.gate")
        swapped |= (fault, last) == ("states swapped", True) and name == ".stores[1]"
        held = value[::-1] if swapped else value
        return jax.make_array_from_callback(
            value.shape, jax.NamedSharding(mesh, spec), held.__getitem__
        )

    return put


if __name__ == "__main__":
    words = sys.argv[1:]
    main(words[0], *map(int, words[1:5]), words[5])
