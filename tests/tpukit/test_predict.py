"""The replay of final schedules: on stored dumps counted by hand, and on seeded faults."""

import dataclasses
import functools
import json
import re
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from tests.tpukit import aot_targets
from tpukit import chips, dumps
from tpukit.errors import ListingError, ReplayError, UnsupportedError
from tpukit.predict import api, hlo, instructions, predict, program, timeline, values
from tpukit.predict.machine import Machine, Operand
from tpukit.predict.rates import rates
from tpukit.predict.scalars import kernel_calls

DATA = Path(__file__).parent / "data"
LENGTHS = np.array([3, 0, 64, 1, 0, 0, 7, 64, 2, 0, 5, 1, 1, 33, 0, 8], np.uint32)
ARRAY = 16 * 512 * 128 * 4  # bytes of x and of o
CHIPS = ("v5e", "v6e", "tpu7x")


@pytest.fixture
def dump(tmp_path):
    """Unpacks the dumps of `aot_targets.ragged`, with one edit of the schedule."""

    def unpack(chip, edit=None):
        with zipfile.ZipFile(DATA / f"ragged_{chip}.zip") as archive:
            archive.extractall(tmp_path)
        if edit is not None:
            (path,) = tmp_path.glob("*final_bundles.txt")
            text, count = re.subn(edit[0], edit[1], path.read_text(), count=1)
            assert count == 1, "the edit changes nothing"
            path.write_text(text)
        return tmp_path

    return unpack


def operands(lengths=LENGTHS):
    return {0: Operand(512, np.asarray(lengths, np.uint32)), 1: Operand(ARRAY), 2: Operand(ARRAY)}


def load(folder, chip):
    return program.load(dumps.read(folder, "ragged.1", chips.chip(chip)))


def replayed(folder, chip, lengths=LENGTHS, **changes):
    constants = dataclasses.replace(rates(chip), **changes)
    machine = Machine(load(folder, chip), constants, operands(lengths))
    machine.spans = []
    machine.run()
    return machine


@pytest.mark.parametrize("chip", CHIPS)
def test_transfers_are_those_of_the_hand_written_trace(dump, chip):
    machine = replayed(dump(chip), chip)
    busy = LENGTHS[LENGTHS > 0]
    size = int(busy.sum()) * 8 * 128 * 4
    assert machine.totals.moved["hbm_to_vmem"] == machine.totals.moved["vmem_to_hbm"] == size
    assert machine.totals.transfers["hbm_to_vmem"] == len(busy)
    found = [span.detail for span in machine.spans if span.what == "vmem_to_hbm"]
    assert [int(detail.split()[0]) for detail in found] == [int(n) * 4096 for n in busy]


def test_bundles_are_those_counted_by_hand(dump):
    """From the listing for tpu7x: what a group, a request and a skipped request issue."""
    folder = dump("tpu7x")

    def bundles(lengths):
        machine = replayed(folder, "tpu7x", lengths)
        segments = machine.program.segments
        visits = machine.totals.visits
        return sum(n * x.cycles for n, x in zip(visits, segments, strict=True))

    none = bundles([0] * 16)
    # Skipped: 0x0d to 0x16 with the branch's delay, then 0x40 to 0x42 and six cycles of delay.
    head_and_tail = 0x0D + (0x4C - 0x44)
    assert none == head_and_tail + 16 * (10 + 9)
    one = bundles([1] + [0] * 15)
    # On the way: 0x17 to 0x26, six cycles of delay, 0x28 to 0x33, 0x34 to 0x3f.
    assert one - none == (0x27 - 0x17) + 6 + 12 + 12
    assert bundles([64] + [0] * 15) - one == 63 * 12


def test_time_of_transfers_is_the_model_s(dump):
    """One request: two transfers that nothing overlaps, each its bytes and one latency."""
    lengths = [64] + [0] * 15
    slow = dataclasses.replace(rates("tpu7x").bandwidth, value=100.0)
    folder = dump("tpu7x")
    fast = replayed(folder, "tpu7x", lengths)
    slowed = replayed(folder, "tpu7x", lengths, bandwidth=slow)
    size, clock = 64 * 4096, rates("tpu7x").clock.value
    more = 2 * size * clock * (1 / 100.0 - 1 / rates("tpu7x").bandwidth.value)
    assert slowed.now - fast.now == pytest.approx(more, abs=2)
    late = dataclasses.replace(rates("tpu7x").latency, value=rates("tpu7x").latency.value + 1.0)
    assert replayed(folder, "tpu7x", lengths, latency=late).now - fast.now == pytest.approx(
        2 * 1e3 * clock, abs=2
    )


def test_a_replay_repeats_itself(dump):
    folder = dump("v5e")
    assert replayed(folder, "v5e").now == replayed(folder, "v5e").now


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        ((r"sshll\.u32", "sfrobnicate.u32"), ListingError, "sfrobnicate"),
        ((r"vexp2\.f32", "vfrob.f32"), ListingError, "vfrob"),
        ((r"= dma\.hbm_to_vmem", "= dma.ici_to_vmem"), ListingError, "dma.ici_to_vmem"),
        ((r"%45 = dma\.hbm_to_vmem [^}]*", ""), ReplayError, "for ever"),
        ((r"%219 = dma\.done\.wait[^}]*", ""), ReplayError, "a check fired: .*nonzero value upon"),
        (
            (r"(%45 = dma.*?granules=\*/)%s257_s16", r"\g<1>4000000000"),
            ReplayError,
            "a transfer of",
        ),
        (
            (r"%s20_s0 = sld \[smem:\[#allocation5 \+ %s224_s14\]\]", "%s20_s0 = spop %7"),
            ReplayError,
            "control depends on data",
        ),
        (
            (
                r"%s158_s22 = scalar_lea\.hbm \(!%p113_p5\), %s27_s19, %s257_s16",
                "%s158_s22 = scalar_lea.hbm (!%p113_p5), %s27_s19, 99999999",
            ),
            ReplayError,
            "BoundsCheck 1",
        ),
        ((r"s224_s14 = sphi %s250_s14", "s224_s14 = sphi %s250_s15"), ListingError, "a phi"),
    ],
)
def test_strictness(dump, edit, error, words):
    with pytest.raises(error, match=words):
        replayed(dump("tpu7x", edit), "tpu7x")


def test_a_loop_without_end_stops(dump):
    with pytest.raises(ReplayError, match="more than 1000 cycles"):
        Machine(load(dump("v5e"), "v5e"), rates("v5e"), operands()).run(limit=1000)


def test_unknown_lengths_are_an_error(dump):
    unknown = {**operands(), 0: Operand(512)}
    with pytest.raises(ReplayError, match="control depends on data"):
        Machine(load(dump("v5e"), "v5e"), rates("v5e"), unknown).run()


def test_a_missing_operand_is_an_error(dump):
    with pytest.raises(ReplayError, match=r"operand 2 .* is missing"):
        Machine(load(dump("v5e"), "v5e"), rates("v5e"), {0: Operand(512), 1: Operand(ARRAY)})


def test_scalars_in_memory_are_known_until_they_are_overwritten(dump):
    machine = Machine(load(dump("tpu7x"), "tpu7x"), rates("tpu7x"), operands())
    start = min(machine.words)
    words = [word for place in sorted(machine.words) for word in machine.words[place]]
    machine.transfer("dma.vmem_to_smem", 0, start, 2, 7000, 3)
    assert [machine.mem.get(7000 + i) for i in range(17)] == [*words, None]
    machine.transfer("dma.hbm_to_vmem", 0, 1 << 25, 1, start + 1, 3)
    assert set(machine.words) == {start}
    machine.transfer("dma.vmem_to_smem", 0, start, 2, 7000, 3)
    assert [machine.mem.get(7000 + i) for i in (0, 7, 8)] == [words[0], words[7], None]


def test_scalars_move_within_memory_unless_they_are_strided(dump):
    machine = Machine(load(dump("tpu7x"), "tpu7x"), rates("tpu7x"), operands())
    start = min(machine.words)
    contents = machine.words[start]
    there, further = min(machine.ends), min(machine.ends) + 8
    machine.transfer("dma.hbm_to_hbm", 0, start, 1, there, 3)
    assert machine.words[there] == contents
    machine.transfer("dma.hbm_to_hbm", 0, start, 1, further, 3, 128, 1)
    assert further not in machine.words


def matmul_program(chip, cycles):
    """A program of one segment that starts a product on unit 0 at each of the cycles."""
    segment = program.Segment(0, 100, 100, tuple((cycle, 0, "bf16") for cycle in cycles))
    return program.Program("p", (), (), (segment,), (), 0, 0), rates(chip)


def test_matrix_units_by_hand():
    """v5e: 16 cycles an operation, two held; the third of three at once waits for the first."""
    machine = Machine(*matmul_program("v5e", [0, 1, 2]), {})
    machine.step(0)
    # Busy till 16, 32; the third comes at 2, waits till 16, is done at 48; nothing else stalls.
    assert machine.now == 100 + 14
    assert machine.totals.stalls["mxu", 0] == 14
    assert machine.totals.mxu_busy == 48
    free = Machine(*matmul_program("v6e", [0, 8, 16]), {})
    free.step(0)
    assert free.now == 100


@pytest.mark.parametrize(
    ("chip", "dtype", "cycles"),
    [
        ("v5e", "bf16", 16),
        ("v5e", "f32", 8),
        ("v5e", "s8", 16),  # 32 rows at twice the rate
        ("v6e", "bf16", 8),
        ("v6e", "s8", 8),
        ("v6e", "f8e4m3b11", 16),  # 32 rows at the rate of bf16
        ("tpu7x", "f8e4m3fn", 8),
    ],
)
def test_rates_of_matrix_types(chip, dtype, cycles):
    assert rates(chip).matmul_cycles(dtype) == cycles


@pytest.mark.parametrize(("chip", "dtype"), [("v5e", "f8e4m3b11"), ("tpu7x", "s8"), ("v6e", "s4")])
def test_matrix_types_without_a_rate(chip, dtype):
    with pytest.raises(UnsupportedError, match="no rate is published"):
        rates(chip).matmul_cycles(dtype)


def test_matrix_backlog_crosses_segments():
    machine = Machine(*matmul_program("v5e", [0, 98, 99]), {})
    machine.step(0)
    assert machine.now == 100  # done at 16, 114, 130
    machine.step(0)  # the first of the next pass comes at 100, with two held until 114
    assert machine.totals.stalls["mxu", 0] >= 14


def test_values():
    u = values.UNKNOWN
    assert values.signed(0xFFFFFFFF) == -1
    assert values.shift_signed(0x80000000, 4) == 0xF8000000
    assert values.shift_left(1, 32) == 0
    assert values.shift_left_ones(0, 3) == 7
    assert values.shift_left_ones(4, 2) == 19
    assert values.shift_left_ones(0, 32) == values.shift_left_ones(9, 40) == 0xFFFFFFFF
    assert values.shift_right(0x80000000, 31) == 1
    assert values.signed_minimum(0xFFFFFFFF, 1) == 0xFFFFFFFF
    assert values.minimum(0xFFFFFFFF, 1) == 1
    assert values.divide(0xFFFFFFF9, 2, False, True) == (-3 & 0xFFFFFFFF)
    assert values.divide(0xFFFFFFF9, 2, True, True) == (-1 & 0xFFFFFFFF)
    assert values.divide(7, 2, True, False) == 1
    assert (u & False) is False
    assert (False & u) is False
    assert (u | True) is True
    assert (u & True) is u
    assert (u + 1) is u
    assert (1 - u) is u
    assert (u > 3) is u
    assert values.select(u, 1, 2) is u
    with pytest.raises(values.Unpredictable):
        bool(u == 3)
    with pytest.raises(values.Unpredictable, match="division by 0"):
        values.divide(1, 0, False, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%s1_s2 = sadd.s32 4294967295, %s3_s4", ("s[2]", "", ("4294967295", "s[4]"))),
        ("%s1_s2 = smov (!%p5_p6, %s3_s4), 7", ("s[2]", "(p[6] ^ True)", ("7",))),
        ("%p1_p2 = scmp.lt.s32.totalorder (%p3_p4), %s5_s6, 0", ("p[2]", "p[4]", ("s[6]", "0"))),
        ("%s1_s2 = scalar_lea.smem %s3_s4, 1 [#allocation4]", ("s[2]", "", ("s[4]", "1"))),
        (
            "%9 = dma.done.wait (0), [#allocation3 + $0x2], 48",
            ("", "0", ("(allocation3 + 2)", "48")),
        ),
        ("%9 = vsyncadd %s1_s2, 4294967248", ("", "", ("s[2]", "4294967248"))),
    ],
)
def test_grammar(text, expected):
    bundle = dumps.Bundle(1, frozenset(), 0, [], [text], [""])
    (found,) = instructions.decode("f", bundle)
    assert (found.target, found.predicate, found.operands) == expected


def test_scalars_follow_the_program():
    def fn(lengths, x):
        sorted_lengths = jax.jit(jnp.sort)(lengths)
        chosen = jax.lax.cond(lengths[0] > 2, lambda n: n // 2, lambda n: n, sorted_lengths)
        return aot_targets.ragged_call(chosen, x)

    x = jax.ShapeDtypeStruct((16 * 512, 128), jnp.float32)
    closed = jax.make_jaxpr(fn)(LENGTHS.astype(np.int32), x)
    (call,) = kernel_calls(closed, [LENGTHS.astype(np.int32), x])
    assert call.name == "ragged"
    np.testing.assert_array_equal(call.operands[0](), np.sort(LENGTHS) // 2)
    assert call.operands[1]() is None


def test_a_kernel_in_a_loop_is_refused():
    def fn(n, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: aot_targets.ragged_call(n, x), x)

    x = jax.ShapeDtypeStruct((16 * 512, 128), jnp.float32)
    closed = jax.make_jaxpr(fn)(LENGTHS.astype(np.int32), x)
    with pytest.raises(UnsupportedError, match="a kernel in a loop"):
        kernel_calls(closed, [LENGTHS.astype(np.int32), x])


def test_two_equal_kernels_without_a_name():
    """The compiler compiles them once; both are replayed, each with its own operands."""

    def body(n_ref, x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2.0

        def again(_, __):
            o_ref[...] = jnp.exp(o_ref[...])

        jax.lax.fori_loop(0, n_ref[0], again, None)

    def call(n, x):
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(64,),
            in_specs=[pl.BlockSpec((128, 128), lambda i, n: (i, 0))],
            out_specs=pl.BlockSpec((128, 128), lambda i, n: (i, 0)),
        )
        out = jax.ShapeDtypeStruct((8192, 128), jnp.float32)
        return pl.pallas_call(body, grid_spec=grid, out_shape=out)(n, x)

    def fn(n, x):
        return call(n + 40, call(n, x))

    x = jax.ShapeDtypeStruct((8192, 128), jnp.float32)
    few, many = predict(fn, jnp.zeros(1, jnp.int32), x, chip="tpu7x").kernels
    assert many.bundles > 3 * few.bundles
    assert many.use["eup"] > 0 == few.use["eup"]


def test_layouts_of_scalar_operands():
    (shape,) = hlo.shapes("s32[3,200]{1,0:T(1,128)S(1)}")
    words = shape.words(np.arange(600, dtype=np.int32).reshape(3, 200))
    assert shape.on_chip
    assert shape.size == 3 * 256 * 4
    assert (words[128], words[200], words[256]) == (128, 0, 200)
    (tiled,) = hlo.shapes("s32[9,130]{1,0:T(8,128)}")
    words = tiled.words(np.arange(9 * 130, dtype=np.int32).reshape(9, 130))
    assert (words[128], words[8 * 128], words[16 * 128]) == (130, 128, 8 * 130)
    with pytest.raises(ListingError, match="float64"):
        shape.words(np.zeros((3, 200)))


PROGRAM = """HloModule jit_f, is_scheduled=true

ENTRY %main.1 (a.1: f32[64,128]) -> f32[64,128] {
  %a.1 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %slice-start = (f32[64,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) slice-start(%a.1)
  %slice-done = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %b = bf16[64,3]{1,0:T(8,128)(2,1)} fusion(%a.1, %slice-done), calls=%c
  ROOT %copy.1 = f32[64,128]{1,0:T(8,128)} copy(%a.1)
}
"""


def test_bytes_of_operations_by_hand():
    ops = {op.name: op for op in hlo.parse(PROGRAM)}
    assert list(ops) == ["slice-start", "b", "copy.1"]
    assert ops["slice-start"].hbm_bytes == 8 * 128 * 4  # read, and kept on the chip
    assert ops["b"].hbm_bytes == 64 * 128 * 4 + 64 * 128 * 2  # padded to a tile
    assert ops["copy.1"].hbm_bytes == 2 * 64 * 128 * 4


def test_a_program_without_entry_is_an_error():
    with pytest.raises(ListingError, match="no entry"):
        hlo.parse("HloModule m\n")


@pytest.fixture(scope="module")
def prediction():
    x = jax.ShapeDtypeStruct((16 * 512, 128), jnp.float32)
    call = jax.jit(aot_targets.ragged_call)
    return predict(call, LENGTHS.astype(np.int32), x, chip="tpu7x", spans=True)


def test_predict(prediction):
    (kernel,) = prediction.kernels
    assert kernel.hbm_bytes == 2 * int(LENGTHS.sum()) * 4096
    assert 0 < kernel.floor_milliseconds < kernel.milliseconds
    assert kernel.milliseconds == pytest.approx(kernel.cycles / 1e6 / rates("tpu7x").clock.value)
    assert kernel.binds == "latency"
    assert kernel.band[0] < kernel.milliseconds <= kernel.band[1]
    assert kernel.cycles == kernel.bundles + sum(stall.cycles for stall in kernel.stalls)
    assert prediction.milliseconds >= kernel.milliseconds
    assert "predicted for tpu7x" in prediction.text()


def test_loops_add_up(prediction):
    (kernel,) = prediction.kernels
    assert sum(loop.issued + loop.stalled for loop in kernel.loops) == kernel.cycles


def test_donation_survives():
    """A pool that is updated in place costs no copy."""

    def fn(pool):
        return pool.at[0].set(1.0)

    pool = jax.ShapeDtypeStruct((1024, 1024, 128), jnp.float32)
    kept = predict(jax.jit(fn), pool, chip="tpu7x").milliseconds
    given = predict(jax.jit(fn, donate_argnums=0), pool, chip="tpu7x").milliseconds
    assert given < kept / 20


def test_a_chip_without_constants():
    with pytest.raises(UnsupportedError, match="v5p"):
        predict(lambda x: x, jnp.ones(3), chip="v5p")


def test_nothing_is_faster_than_the_roofline(dump):
    constants = rates("tpu7x")
    quick = dataclasses.replace(
        constants,
        clock=dataclasses.replace(constants.clock, value=100.0),
        bandwidth=dataclasses.replace(constants.bandwidth, value=1e6),
        latency=dataclasses.replace(constants.latency, value=0.0),
    )
    with pytest.raises(ReplayError, match="faster than the roofline"):
        api.replay(dump("tpu7x"), "ragged.1", operands([64] * 16), quick)


def test_trace_is_trace_event_json(prediction, tmp_path):
    path = tmp_path / "trace.json"
    timeline.write_trace(prediction, path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert {"waits", "hbm_to_vmem", "vmem_to_hbm"} <= names
    spans = [e for e in events if e["ph"] == "X"]
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in spans)
    end = max(e["ts"] + e["dur"] for e in spans)
    assert end <= prediction.kernels[0].milliseconds * 1e3 * 1.001
    reads = [e for e in spans if e["name"].endswith("bytes at 0x21")]
    assert len(reads) == np.count_nonzero(LENGTHS)


def test_picture(prediction, tmp_path):
    pytest.importorskip("matplotlib")
    timeline.draw(prediction, tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_two_million_bundles_a_second(dump):
    """On the worst kind of program: loops of twelve bundles."""
    translated = load(dump("tpu7x"), "tpu7x")
    best = 0.0
    for _ in range(5):
        machine = Machine(translated, rates("tpu7x"), operands([64] * 16))
        begin = time.process_time()
        machine.run()
        seconds = time.process_time() - begin
        pairs = zip(machine.totals.visits, translated.segments, strict=True)
        best = max(best, sum(n * segment.cycles for n, segment in pairs) / seconds)
    assert best > 2e6


def paged_attention(q_lens, kv_lens, page=16, heads=8, kv_heads=2, dim=128):
    """JAX's own kernel on a batch of these lengths."""
    pages = [-(-length // page) for length in kv_lens]
    table = np.zeros((len(kv_lens), max(pages)), np.int32)
    for row, first, count in zip(table, np.cumsum([0, *pages]), pages, strict=False):
        row[:count] = first + np.arange(count)
    fn = functools.partial(
        ragged_paged_attention,
        num_kv_pages_per_block=4,
        num_queries_per_block=16,
        vmem_limit_bytes=64 * 2**20,
    )
    q = jax.ShapeDtypeStruct((sum(q_lens), heads, dim), jnp.bfloat16)
    # Large enough that XLA leaves it in HBM.
    kv = jax.ShapeDtypeStruct((max(sum(pages), 8192), page, 2 * kv_heads, dim), jnp.bfloat16)
    lengths, starts = jnp.asarray(kv_lens), jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32)
    steer = lengths, jnp.asarray(table), starts, jnp.asarray([len(kv_lens)])
    prediction = predict(jax.jit(fn), q, kv, *steer, chip="v6e")
    kernel = max(prediction.kernels, key=lambda kernel: kernel.cycles)
    return kernel, sum(pages) * page * 2 * kv_heads * dim * 2


@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [([1] * 16, [512] * 16), ([1, 1, 1, 48, 33, 1], [64, 700, 33, 48, 128, 1999])],
    ids=["uniform", "mixed"],
)
def test_jax_s_ragged_paged_attention(q_lens, kv_lens):
    kernel, kv_bytes = paged_attention(q_lens, kv_lens)
    assert kernel.name.startswith("ragged_paged_attention")
    read = kernel.moved["hbm_to_vmem"]
    blocks = sum(-(-length // 64) * 64 * 2 * 2 * 128 * 2 for length in kv_lens)
    again = sum(-(-q // 16) for q in q_lens) - len(q_lens)  # a request's blocks, per block of rows
    assert kv_bytes <= read <= (blocks + sum(q_lens) * 8 * 128 * 2 * 4) * (1 + again)
