"""What XLA moves between kernels is found in the optimised program, and nothing else is."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpukit import aot
from tpukit.copies import moves

SHAPE = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
SIZE = 1024 * 512 * 2


def kernel(x, name="kernel", **options):
    """A Pallas kernel that adds one to an array in HBM."""

    def body(x, o):
        o[...] = x[...] + 1

    spec = pl.BlockSpec((256, x.shape[1]), lambda i: (i, 0))
    return pl.pallas_call(
        body,
        name=name,
        grid=(x.shape[0] // 256,),
        in_specs=[spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        **options,
    )(pltpu.with_memory_space_constraint(x, pltpu.HBM))


PROGRAMS = {
    "nothing": (lambda x: kernel(kernel(x)), 0),
    "a flat view": (lambda x: kernel(kernel(x).reshape(-1, 4, 512).reshape(x.shape)), 0),
    "arithmetic": (lambda x: kernel(jnp.square(kernel(x))), 0),
    "a transpose": (lambda x: kernel(kernel(x).T), SIZE),
    "heads as rows": (lambda x: kernel(kernel(x).reshape(4096, 128)), SIZE),
    "padding": (lambda x: kernel(jnp.pad(kernel(x), ((0, 256), (0, 0)))), SIZE * 5 // 4),
    "a join": (
        lambda x: kernel(jnp.concatenate([kernel(x)[:, :64], x[:, :64]], axis=1)),
        SIZE // 4,
    ),
    "halves": (lambda x: kernel(kernel(x)[:, 64:192]), SIZE // 4),
    "written in place, not given away": (lambda x: kernel(x, input_output_aliases={0: 0}), SIZE),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_moves_are_found(name):
    fn, size = PROGRAMS[name]  # the largest move there is
    compiled = aot.compile_for(fn, SHAPE, chip="tpu7x")
    found = moves(compiled.hlo, at_least=SIZE // 8)
    assert len(compiled.kernels) >= 1
    assert max((move.size for move in found), default=0) == size, [str(move) for move in found]
    assert not moves(compiled.hlo, at_least=3 * SIZE)


def test_a_move_says_what_it_is():
    compiled = aot.compile_for(PROGRAMS["a transpose"][0], SHAPE, chip="tpu7x")
    (found,) = moves(compiled.hlo, at_least=SIZE)
    assert found.opcode == "copy"
    assert found.shape.order == (0, 1)
    assert found.source.endswith("kernel/pallas_call")  # whose result it moves
    assert "bf16[" in str(found)
    assert "1.05 MB" in str(found)
