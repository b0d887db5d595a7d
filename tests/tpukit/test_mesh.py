"""Several devices replayed together: links by hand, a small kernel, and what must be refused."""

import numpy as np
import pytest
from jax import P

from tests.tpukit.mesh_targets import LANES, ROWS
from tpukit import aot, errors
from tpukit.predict import LINK_RATES, predict_mesh, rates, timeline
from tpukit.predict.links import Grid, Links, link_rates
from tpukit.predict.scalars import part_of

TARGET = "tests.tpukit.mesh_targets:ring"
SIZE = ROWS * LANES * 4
CLOCK = rates.rates("tpu7x").clock.value


def line(count, wraps):
    return Grid(tuple((i, 0, 0) for i in range(count)), (wraps,) * 3)


def test_routes_take_the_shorter_way():
    assert len(list(line(4, wraps=False).route(0, 3))) == 3
    assert list(line(4, wraps=True).route(0, 3)) == [((0, 0, 0), 0, -1)]
    assert len(list(line(4, wraps=True).route(0, 2))) == 2
    assert list(line(4, wraps=True).route(1, 1)) == []
    square = Grid(((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)), (True, True, True))
    assert list(square.route(0, 3)) == [((0, 0, 0), 0, 1), ((1, 0, 0), 1, 1)]


def test_pairs_half_way_round_take_both_ways():
    ways = {next(line(4, wraps=True).route(i, (i + 2) % 4))[2] for i in range(4)}
    assert ways == {1, -1}


def test_a_message_takes_its_bytes_and_its_hops():
    found = Links(line(4, wraps=False), LINK_RATES["tpu7x"], CLOCK)
    cycles = 90_000 * CLOCK / 90.0
    hop = 0.3e3 * CLOCK
    left, arrival = found.send(0, 2, 90_000, 100.0)
    assert left == pytest.approx(100 + cycles)
    assert arrival == pytest.approx(100 + 2 * hop + cycles)
    # the next one has to wait for the first on every link
    left, arrival = found.send(0, 1, 90_000, 100.0)
    assert left == pytest.approx(100 + 2 * cycles)
    assert sum(found.busy.values()) == pytest.approx(3 * cycles)


def test_devices_of_one_chip_do_not_use_links():
    grid = Grid(((0, 0, 0), (0, 0, 0), (1, 0, 0)), (False,) * 3)
    found = Links(grid, LINK_RATES["tpu7x"], CLOCK)
    left, arrival = found.send(0, 1, 54_000, 0.0)
    assert left == arrival == pytest.approx(54_000 * CLOCK / 540)
    assert found.send(0, 2, 90_000, 0.0)[0] == pytest.approx(90_000 * CLOCK / 90)


def test_unknown_links_are_refused():
    with pytest.raises(errors.UnsupportedError, match="links"):
        link_rates("v5p")


def test_parts_of_arrays():
    whole = np.arange(24).reshape(6, 4)
    place, sizes = {"a": 1, "b": 0}, {"a": 3, "b": 2}
    np.testing.assert_array_equal(part_of(whole, P("a"), sizes, place), whole[2:4])
    np.testing.assert_array_equal(part_of(whole, P(("a", "b")), sizes, place), whole[2:3])
    np.testing.assert_array_equal(part_of(whole, P(None, "b"), sizes, place), whole[:, :2])
    np.testing.assert_array_equal(part_of(whole, P(), sizes, place), whole)


@pytest.fixture(scope="module")
def beside():
    """Each device sends to its neighbour: every other one is on the same chip."""
    return predict_mesh(TARGET, "tpu7x", {"sends": 4})


def test_bytes_and_time_of_a_ring(beside):
    assert len(beside.kernels) == 8
    for kernel in beside.kernels:
        assert kernel.moved["to other devices"] == 4 * SIZE
        assert kernel.transfers["to other devices"] == 4
    busiest = 4 * SIZE / 90e6
    assert beside.links_milliseconds == pytest.approx(busiest, rel=1e-3)
    assert busiest < beside.kernel_milliseconds < busiest + 0.01
    assert beside.hidden < 0.1  # nothing is computed meanwhile
    assert beside.alone_milliseconds < beside.kernel_milliseconds / 2
    assert beside.binds == "links"
    assert "hidden" in beside.text()


def test_scalars_of_each_device_steer_it():
    few = predict_mesh(TARGET, "tpu7x", {"sends": 1})
    assert {kernel.moved["to other devices"] for kernel in few.kernels} == {SIZE}


def test_kernels_beside_it_are_replayed_where_they_take_longest():
    arguments = {"lengths": [4] * 7 + [20], "sends": [2]}
    found = predict_mesh("tests.tpukit.mesh_targets:layers", "tpu7x", arguments)
    (local,) = found.others
    (short,) = predict_mesh(
        "tests.tpukit.mesh_targets:layers", "tpu7x", {"lengths": [4], "sends": [2]}
    ).others
    assert local.name.startswith("local")
    assert local.cycles > 2 * short.cycles
    assert {kernel.moved["to other devices"] for kernel in found.kernels} == {2 * SIZE}
    parts = local.milliseconds + found.kernel_milliseconds + found.glue_milliseconds
    assert found.milliseconds == pytest.approx(parts)
    assert any(op.source.endswith("cos") for op in found.glue)
    assert found.argument_bytes > found.output_bytes >= SIZE


def test_two_kernels_with_messages_are_refused():
    with pytest.raises(errors.ArgumentError, match="2 of whose 3 kernels"):
        predict_mesh("tests.tpukit.mesh_targets:layers", "tpu7x", {"sends": [2, 2]})


def test_wraps_shorten_the_way():
    arguments = {"devices": 32, "ways": 16, "topology": "tpu7x:2x2x4"}
    mesh = predict_mesh(TARGET, "tpu7x", arguments)
    torus = predict_mesh(TARGET, "tpu7x", arguments, wraps=True)
    assert torus.links_milliseconds < 0.6 * mesh.links_milliseconds


def test_one_core_per_chip():
    found = predict_mesh(TARGET, "v6e", {"devices": 4, "sends": 2})
    assert {kernel.moved["to other devices"] for kernel in found.kernels} == {2 * SIZE}


def test_a_timeline_shows_messages():
    found = predict_mesh(TARGET, "tpu7x", {"sends": 2}, spans=(0,))
    kernel = found.kernels[0]
    assert sum(span.what == "to other devices" for span in kernel.spans) == 2
    assert sum(span.what == "from other devices" for span in kernel.spans) == 2
    assert not found.kernels[1].spans
    with pytest.raises(errors.ArgumentError, match="spans"):
        timeline.trace_events(found)


def test_devices_that_wait_for_ever_are_an_error():
    with pytest.raises(errors.ReplayError, match=r"wait for one another|for ever"):
        predict_mesh(TARGET, "tpu7x", {"waits": False})


def test_programs_without_a_mesh_are_refused():
    with pytest.raises(errors.ArgumentError, match="mesh_axes"):
        predict_mesh("tests.tpukit.mesh_targets:alone", "tpu7x", {})


def test_devices_of_a_topology_have_places():
    assert len(aot.devices("tpu7x")) == 8
    assert len({tuple(device.coords) for device in aot.devices("tpu7x")}) == 4
