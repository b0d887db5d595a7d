"""The lists that steer `lax.ragged_dot`: against rows one by one, and the compiler's own kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tpukit.errors import ListingError, ReplayError
from tpukit.predict import api, predict, ragged

ROWS, INNER, OUTER = 1024, 256, 256
TILES = {"v5e": 128, "v6e": 256, "tpu7x": 256}  # rows that the compiler takes at once of these
TILE = TILES["tpu7x"]
SIZES = {
    "even": (128,) * 8,
    "some empty": (0, 300, 0, 0, 500, 1, 223, 0),
    "at the ends of tiles": (256, 0, 512, 0, 0, 0, 0, 256),
    "one": (0, 0, 0, 1024, 0, 0, 0, 0),
    "short of the rows": (10, 0, 20, 0, 30, 0, 0, 1),
}


def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


def dot(rows, weights, sizes):
    return lax.ragged_dot(rows, weights, sizes, preferred_element_type=jnp.bfloat16)


def predicted(sizes, chip="tpu7x", fn=dot):
    arrays = shape(ROWS, INNER), shape(len(SIZES["even"]), INNER, OUTER)
    return predict(fn, *arrays, sizes, chip=chip)


def by_rows(sizes):
    """Pairs of tile and group, each once, in the order of the rows."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    return list(dict.fromkeys((row // TILE, group) for row, group in enumerate(groups)))


def visits(sizes, chip="tpu7x"):
    return ragged.visits(np.array(sizes), ROWS, ROWS // TILES[chip] + len(sizes) - 1)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_visits_are_the_tiles_that_a_group_has_rows_in(sizes):
    offsets, groups, tiles, count = visits(sizes)
    assert list(offsets) == [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    assert list(zip(tiles, groups, strict=True))[: count[0]] == by_rows(sizes)
    assert len(groups) == len(tiles) and set(groups[count[0] :]) <= {len(sizes) - 1}
    assert set(tiles[count[0] :]) <= {ROWS // TILE - 1}


def scratch(monkeypatch, sizes, chip):
    """What the compiler's kernel leaves in SMEM when its schedule is replayed."""
    machines = []

    class Kept(api.Machine):
        def __init__(self, *args):
            super().__init__(*args)
            machines.append(self)

    monkeypatch.setattr(api, "Machine", Kept)
    predicted(jnp.array(sizes, jnp.int32), chip)
    monkeypatch.undo()
    memory = machines[0].mem  # of the first kernel
    return [memory.get(place, -1) for place in range(min(memory), max(memory) + 1)]


def holds(memory, values):
    """Whether the words lie somewhere, one after the other."""
    values = list(map(int, values))
    places = range(len(memory) - len(values) + 1)
    return any(memory[place : place + len(values)] == values for place in places)


@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize("name", ["some empty", "at the ends of tiles", "short of the rows"])
def test_the_kernel_of_the_compiler_makes_the_same_lists(monkeypatch, name, chip):
    memory = scratch(monkeypatch, SIZES[name], chip)
    assert all(holds(memory, one) for one in visits(SIZES[name], chip))


def test_lists_with_a_fault_are_not_found(monkeypatch):
    sizes = SIZES["some empty"]
    memory = scratch(monkeypatch, sizes, "tpu7x")
    _, groups, tiles, count = visits(sizes)
    assert holds(memory, groups) and holds(memory, tiles)
    assert not holds(memory, np.roll(groups, 1)) and not holds(memory, np.roll(tiles, 1))
    end = int(count[0])
    assert end < len(groups) and not holds(memory, np.append(groups[: end - 1], groups[end:]))


@pytest.mark.parametrize("filled", [32, 5])
def test_weights_of_groups_without_rows_are_not_fetched(filled):
    sizes = np.zeros(32, np.int32)
    sizes[-filled:] = ROWS // filled
    arrays = shape(ROWS, 2048), shape(32, 2048, 768)  # too many to be in VMEM before the kernel
    lists, dots = predict(dot, *arrays, jnp.asarray(sizes), chip="tpu7x").kernels
    assert lists.name.startswith("ragged-dot-metadata") and "hbm_to_vmem" not in lists.moved
    weights, rows = filled * 2048 * 768 * 2, ROWS * 2048 * 2
    assert weights <= dots.moved["hbm_to_vmem"] <= weights + rows


def test_sizes_may_be_computed_by_the_program():
    def fn(rows, weights, ids):
        return dot(rows, weights, jnp.bincount(ids, length=len(weights)).astype(jnp.int32))

    sizes = SIZES["some empty"]
    given = predicted(jnp.array(sizes, jnp.int32)).kernels
    ids = jnp.array(np.repeat(np.arange(len(sizes)), sizes), jnp.int32)
    computed = predicted(ids, fn=fn).kernels
    assert [one.cycles for one in computed] == [one.cycles for one in given]


def test_sizes_that_are_not_known_are_refused():
    with pytest.raises(ReplayError):
        predicted(shape(8, dtype=jnp.int32))


def test_two_dots_with_other_sizes_are_refused():
    def fn(rows, weights, sizes):
        return dot(dot(rows, weights, sizes), weights, sizes[::-1])

    with pytest.raises(ListingError, match="2 ragged dots of 8 groups"):
        predicted(jnp.array(SIZES["some empty"], jnp.int32), fn=fn)


def test_a_dot_in_a_loop_is_refused():
    def fn(rows, weights, sizes):
        return lax.fori_loop(0, 3, lambda i, x: dot(x, weights, jnp.roll(sizes, i)), rows)

    with pytest.raises(ListingError, match="a loop around a kernel"):
        predicted(jnp.array(SIZES["some empty"], jnp.int32), fn=fn)


def test_two_dots_with_the_same_sizes_are_two_kernels():
    def fn(rows, weights, sizes):
        return dot(dot(rows, weights, sizes), weights, sizes)

    names = [one.name for one in predicted(jnp.array(SIZES["even"], jnp.int32), fn=fn).kernels]
    assert sum("none" in name for name in names) == 2
