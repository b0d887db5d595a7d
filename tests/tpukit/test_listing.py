"""The parser of compiler dumps, on stored dumps counted by hand.

`nested` is `aot_targets.nested` with small operands, which XLA keeps in VMEM on tpu7x; there the
transfer in the outer loop became a loop of vector copies. `branches` is a loop around a `lax.cond`,
a `lax.switch` and two nested `pl.when`.
"""

import re
import zipfile
from pathlib import Path

import pytest

from tpukit import listing
from tpukit.chips import chip
from tpukit.errors import ListingError

DATA = Path(__file__).parent / "data"
SCHEDULE, SLOTS, BUFFERS = "02-final_bundles", "01-final_hlo", "00-pre-finalize"


def unpack(name, folder, edit=None):
    """Stored dumps with one edit: (part of a file's name, pattern, replacement)."""
    with zipfile.ZipFile(DATA / f"{name}.zip") as archive:
        archive.extractall(folder)
    if edit is not None:
        part, pattern, replacement = edit
        (path,) = (path for path in folder.iterdir() if part in path.name)
        text, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE)
        assert count == 1, "the edit changes nothing"
        path.write_text(text)


@pytest.fixture
def parse(tmp_path):
    def parse(name, edit=None, kernel=None):
        stem, _, target = name.rpartition("_")
        unpack(name, tmp_path, edit)
        kernels = [kernel or f"{stem}.1"]
        (found,) = listing.parse_directory(tmp_path, kernels, chip(target))
        return found

    return parse


def test_v5e_loops_by_hand(parse):
    kernel = parse("nested_v5e")
    assert kernel.bundles == 214  # 0x0 to 0xd5
    assert [(x.path, x.depth, x.start, x.end) for x in kernel.loops] == [
        ("0", 1, 0x0A, 0xCF),
        ("0/0", 2, 0x3B, 0xB4),
        ("0/0/0", 3, 0x4E, 0xAD),
    ]
    grid, outer, inner = kernel.loops
    assert (inner.bundles, inner.nested_bundles) == (95, 0)
    assert (outer.bundles, outer.nested_bundles) == (26, 95)
    assert (grid.bundles, grid.nested_bundles) == (76, 26 + 95)
    assert [(r.start, r.end, r.guards) for r in inner.regions] == [
        (0x4E, 0x6C, ()),
        (0x6C, 0xA6, ("!%p568_p13",)),  # the matmul; the branch at 0x67 has four delay slots
        (0xA6, 0xAD, ()),
    ]
    assert inner.always_bundles == 30 + 7
    assert [(r.start, r.end) for r in kernel.outside] == [(0, 0x0A), (0xCF, 0xD6)]


def test_v5e_operations_by_hand(parse):
    kernel = parse("nested_v5e")
    assert kernel.loop("0/0/0").ops.matmuls == 8
    assert kernel.loop("0/0/0").ops.matpushes == 32
    assert kernel.loop("0/0/0").ops.eup == 16
    assert [x.ops.dma_starts for x in kernel.loops] == [2, 1, 0]
    assert kernel.ops == listing.Ops(
        mxu=72,
        valu=98,
        vpop=32,
        eup=16,
        vload=111,
        vstore=64,
        salu=105,
        matmuls=8,
        matpushes=32,
        dma_starts=4,
        dma_waits=4,
    )


def test_v5e_buffers_by_hand(parse):
    kernel = parse("nested_v5e")
    assert [b.size for b in kernel.buffers if b.space == "vmem"] == [
        36864,  # the compiler's own scratch
        65536,
        65536,
        2 * 65536,  # a double-buffered window
        65536,
    ]
    assert kernel.vmem_bytes == 36864 + 5 * 65536
    assert kernel.smem_bytes == 512


def test_tpu7x_unfolds_delay_slots(parse):
    kernel = parse("nested_tpu7x")
    assert [(x.path, x.depth) for x in kernel.loops] == [
        ("0", 1),
        ("0/0", 2),
        ("0/0/0", 3),
        ("0/0/1", 3),
    ]
    # 0x38 to 0x3d: the last line stands for the last four of the branch's six slots.
    assert kernel.loop("0/0/0").bundles == 5 + 4
    # 0x45 to 0x8b: the last line stands for six.
    assert kernel.loop("0/0/1").bundles == 70 + 6
    # The branch at 0x60 is followed by six full slots: nothing is folded.
    assert kernel.loop("0/0/1").regions[0].end == 0x67
    assert kernel.loop("0/0/1").ops.matmuls == 4
    assert kernel.loop("0/0/1").ops.matpushes == 16


def test_conditional_in_a_conditional(parse):
    regions = {region.start: region for region in parse("nested_tpu7x").loop("0").regions}
    assert regions[0x15].guards == ("!%p1144_p9",)
    assert regions[0x1C].guards == ("!%p1144_p9", "%p36_p8")
    assert regions[0x29].guards == ()


def test_empty_bundles_that_are_no_folded_tail(parse):
    regions = {region.start: region for region in parse("branches_tpu7x").loop("0").regions}
    # The branch at 0x26 has six slots, the one at 0x2a empty; 0x2d is empty but comes after them.
    assert (regions[0x11].end, regions[0x11].bundles) == (0x2D, 28)
    assert (regions[0x2D].end, regions[0x2D].bundles) == (0x46, 25)
    # The branch at 0x6f: two lines for six slots. The one at 0x72: five lines for six.
    assert (regions[0x68].end, regions[0x68].bundles) == (0x72, 8 + 6)
    assert (regions[0x72].end, regions[0x72].bundles) == (0x78, 1 + 6)


def test_tail_is_where_the_next_region_begins(parse):
    # The branch at 0x33 folds its slots into 0x34; a loop begins after it. Empty 0x36, in reach.
    empty = (SCHEDULE, r"^  0x36   : .*$", "  0x36   :  {}")
    kernel = parse("nested_tpu7x", empty)
    (region,) = [x for x in kernel.loop("0").regions if x.start == 0x33]
    assert (region.end, region.bundles) == (0x35, 1 + 6)


def test_tail_is_the_last_empty_bundle(parse):
    # The branch at 0x72 folds its last slots into 0x77. Empty 0x75 as well.
    empty = (SCHEDULE, r"^  0x75   : .*$", "  0x75   :  {}")
    regions = {x.start: x for x in parse("branches_tpu7x", empty).loop("0").regions}
    assert (regions[0x72].end, regions[0x72].bundles) == (0x78, 1 + 6)


def test_guards_of_alternatives(parse):
    guards = {region.start: region.guards for region in parse("branches_tpu7x").loop("0").regions}
    assert guards[0x2D] == ("!%p900_p5",)  # n > 5
    assert guards[0x4D] == ("!%p50_p4",)  # else
    assert guards[0x78] == ("!%p906_p9", "!%p908_p11")  # not case 0, case 2
    assert guards[0xFC] == ("!%p909_p12", "!%p911_p13")  # when in when
    assert guards[0x12C] == ()


def test_unknown_loop(parse):
    with pytest.raises(KeyError, match="no loop '1'"):
        parse("nested_v5e").loop("1")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ((SCHEDULE, r" LB: >>> \{", " LX: >>> {"), "label 'LX'"),
        ((SCHEDULE, r"   : (>>> \{)", r" LB: \1"), "loop label with no branch"),
        ((SCHEDULE, r" LB: >>> \{", "   : >>> {"), "loop label with no branch"),
        ((SCHEDULE, r" LB: >>> \{", " LB: >> {"), "not nested"),
        ((SCHEDULE, r"dma\.hbm_to_vmem \[", "dma.hbm_to_moon ["), "transfer 'dma.hbm_to_moon'"),
        ((SCHEDULE, r"dma\.done\.wait", "dma.done.poll"), "transfer 'dma.done.poll'"),
        ((SCHEDULE, r"sbr\.rel \(", "sbr.abs ("), "branch '"),
        ((SCHEDULE, r"target = \$region50", "target = $region999"), "no start of region 999"),
        ((SCHEDULE, r"target = \$region50", "target = %s3_s3"), "branch '"),
        ((SCHEDULE, r"^  0x6a .*\n", ""), "bundle "),
        ((SCHEDULE, r"\{ %v", "[ %v"), "bundle "),
        ((SCHEDULE, r"= vmatmul\.", "= ?matmul."), r"operation '.*\?matmul"),
        ((SCHEDULE, r"(?s).*", ""), "no bundles"),
        ((SLOTS, r"^MXU, XLU", "MXU, YLU"), "columns other than"),
        ((SLOTS, r"^0 0 0 0 0 0 0 0 0 2\n", ""), "213 rows for the 214 bundles"),
        ((SLOTS, r"^0 0 0 0 0 0 0 0 0 2$", "0 0 0 0 0 0 0 0 2"), "row '0 0"),
        ((SLOTS, r"^0 0 0 0 0 0 0 0 0 2$", "0 0 0 0 0 0 0 0 0 -2"), "row '0 0"),
        ((BUFFERS, r"space=vmem, size", "space=vmem, bytes"), "allocation .#allocation2 "),
    ],
)
def test_unknown_grammar_is_an_error(parse, edit, message):
    with pytest.raises(ListingError, match=message):
        parse("nested_v5e", edit)


def test_missing_dump(parse):
    with pytest.raises(ListingError, match="no dump final_bundles of other"):
        parse("nested_v5e", kernel="other")
