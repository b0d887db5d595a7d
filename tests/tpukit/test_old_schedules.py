"""Forms of operations that only older compilers write."""

import struct

import pytest

from tpukit import listing
from tpukit.predict import instructions


def test_a_number_with_a_point_is_its_bits():
    assert int(instructions.value("-30.0")) == struct.unpack("<I", struct.pack("<f", -30.0))[0]
    with pytest.raises(ValueError):
        instructions.value("-30.0.1")


def test_a_halt_may_name_a_register_behind_its_predicate():
    one = instructions._decode("f", 1, "shalt.err (!%p44209_p4) %s16", "")
    assert (one.opcode, one.predicate) == ("shalt.err", "(p[4] ^ True)")


def test_an_operation_may_have_a_dash_before_its_type():
    match = listing._OPERATION.match("%v1_v2 = vclamps-f32 %v477_v25, 448.0")
    assert match is not None and match[1] == "vclamps-f32"
    assert listing._OPERATION.match("%v1_v2 = vclamps-f64 %v477_v25") is None
