"""The reader of SparseCore programs, on stored dumps of `aot_targets.sparse` counted by hand."""

import re
import zipfile
from pathlib import Path

import pytest

from tpukit import sparse_listing
from tpukit.errors import ListingError
from tpukit.sparse_listing import Stream

DATA = Path(__file__).parent / "data"


@pytest.fixture
def parse(tmp_path):
    def parse(chip, edit=None):
        with zipfile.ZipFile(DATA / f"sparse_{chip}.zip") as archive:
            archive.extractall(tmp_path)
        if edit is not None:
            (path,) = tmp_path.iterdir()
            text, count = re.subn(edit[0], edit[1], path.read_text(), count=1, flags=re.MULTILINE)
            assert count == 1, "the edit changes nothing"
            path.write_text(text)
        (kernel,) = sparse_listing.parse_directory(tmp_path, ["sparse.6"])
        return kernel

    return parse


@pytest.mark.parametrize(("chip", "end"), [("tpu7x", 0x1A), ("v6e", 0x19)])
def test_the_gather_by_hand(parse, chip, end):
    sequencer, subcores = parse(chip).sections
    assert (sequencer.name, subcores.name) == ("sequencer", "subcores")
    assert not sequencer.loops
    (loop,) = subcores.loops
    assert (loop.start, loop.end, loop.depth, loop.bundles) == (0x0F, end, 1, end - 0x0F)
    assert loop.trips is None  # the number of cores decides
    assert loop.streams == (
        Stream(0x0F, "linear", "gather", 32 * 4),  # the indices
        Stream(0x13, "indirect", "gather", 32 * 128 * 4, 128 * 4),  # the rows
        Stream(0x18, "linear", "scatter", 32 * 128 * 4),
    )


def test_a_strided_stream_says_its_whole_size(parse):
    edit = (r"linear\.scatter (.*) \$0x1000, \$0x38", r"strided.scatter \1 $0x1000, s9, s11, $0x38")
    stream = parse("tpu7x", edit).sections[1].streams[2]
    assert stream == Stream(0x18, "strided", "scatter", 32 * 128 * 4)


def test_a_stream_of_some_lanes_says_the_size_of_a_row(parse):
    edit = (r"indirect\.gather (.*) s9, s11, \$0xb8", r"indirect_vreg.gather \1 v1, vm0, $0xb8")
    stream = parse("tpu7x", edit).sections[1].streams[1]
    assert stream == Stream(0x13, "indirect_vreg", "gather", None, 128 * 4)


COUNTED = """tec
execute0_lowered:
0x0: {  \ts8 =\tsimm.s32 $%s  }
.LBB2_1:
0x1: {  \t%s  }
.Ltmp0:
0x2: {  \t%s;
\t(pc) =\tsbr.rel %s .LBB2_1-.Ltmp0  }
0x3: {  \t_ =\tsnop  }
"""


@pytest.mark.parametrize(
    ("first", "one", "other", "branch", "trips"),
    [
        ("0x5", "p0 =\tsne.s32 s8, $0x1", "s8 =\tsadd.s32 $0xFFFFFFFF, s8", "@p0", 5),
        ("0xFFFFFFFB", "s8 =\tsadd.s32 $0x1, s8", "p0 =\tseq.s32 s8, $0x0", "@!p0", 5),
        ("0x0", "s8 =\tsadd.s32 s8, $0x4", "p0 =\tsne.s32 s8, $0x40", "@p0", 16),
        ("0x0", "s8 =\tsadd.s32 s8, $0x3", "p0 =\tsne.s32 s8, $0x40", "@p0", None),
        ("0x0", "s8 =\tsadd.s32 s8, s9", "p0 =\tsne.s32 s8, $0x40", "@p0", None),
        ("0x0", "s8 =\tsadd.s32 s8, $0x4", "p0 =\tslt.s32 s8, $0x40", "@p0", None),
    ],
)
def test_counted_loops(tmp_path, first, one, other, branch, trips):
    path = tmp_path / "x.call-start_1_bundles.txt"
    path.write_text(COUNTED % (first, one, other, branch))
    ((section,),) = (sparse_listing.parse(path),)
    assert [(x.start, x.end, x.bundles, x.trips) for x in section.loops] == [(1, 4, 3, trips)]


def test_a_register_that_may_change_gives_no_size(parse):
    edit = (r"\[sflag:s10\] =\tssyncadd.s32 \$0xFFFFFFE0", r"s11 =\tsadd.s32 s11, $0x1;\n\t\g<0>")
    sizes = [stream.size for stream in parse("tpu7x", edit).sections[1].loops[0].streams]
    assert sizes == [128, None, 16384]


@pytest.mark.parametrize(
    ("edit", "words"),
    [((r"^tec$", "xyz"), "line 'xyz'"), ((r"^\.LBB2_1:$", ".LBB2_9:"), "no label .LBB2_1")],
)
def test_what_is_not_understood_is_an_error(parse, edit, words):
    with pytest.raises(ListingError, match=re.escape(words)):
        parse("tpu7x", edit)


def test_a_missing_dump_is_an_error(tmp_path):
    with pytest.raises(ListingError, match="no SparseCore dump of other"):
        sparse_listing.parse_directory(tmp_path, ["other.1"])
