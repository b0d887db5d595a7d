"""The grammar of the final schedule: from the text of an operation to an `Instruction`.

Scalar code, transfers and semaphores are understood in full, since they decide what runs when.
Vector operations only take up the bundle they are in, but their names must be known too: an
operation that this file does not know is an error, never a guess.
"""

from __future__ import annotations

import dataclasses
import re
import struct

from tpukit.dumps import Bundle
from tpukit.errors import ListingError

_REGISTER = re.compile(r"^(!?)%[a-z]+\d+_([sp])(\d+)$")
_NAME = re.compile(r"^#allocation\d+(?:_spill)?$")
_TOKEN = re.compile(r"^%\d+$")
_NUMBER = re.compile(r"^\$?(?:0x[0-9a-f]+|\d+)$")
_SMEM = re.compile(r"^\[smem:\[([^\]]+)\]\](?: |, |$)")
_NOTE = re.compile(r"^\[resolvable:\$\w+\] |(?<!,) \[#allocation\d+(?:_spill)?\]$")
_OPERATION = re.compile(r"^(?:(%\S+) = )?([a-z_][\w.\-]*(?:\[\d+\][\w.]*)*(?:<[\w ]+>)?) ?(.*)$")
_THREAD = re.compile(r"^\[thread:\$\d+\] *")
# A predicate without a comma, and numbers with a point: before libtpu 0.0.50.
_PREDICATE = re.compile(r"^\((!?(?:%\w+|[01]))(?:, (%\w+))?\)(?:,? |$)")
_FLOAT = re.compile(r"^-?\d+\.\d+(?:e[+-]?\d+)?$")
_MATMUL = re.compile(r"^vmatmul\..*?\b(bf16|f32|s8|u8|s4|u4|f8e4m3\w*|f8e5m2\w*|f8)\b.*mxu(\d)$")

# Scalar arithmetic: the Python expression of the result, of 32-bit unsigned values.
ARITHMETIC = {
    "smov": "{0}",
    "sadd.s32": "({0} + {1}) & M",
    "sadd.u32": "({0} + {1}) & M",
    "ssub.s32": "({0} - {1}) & M",
    "ssub.u32": "({0} - {1}) & M",
    "smul.u32": "({0} * {1}) & M",
    "smul.s32": "({0} * {1}) & M",
    "smulhi.u32": "shift_right({0} * {1}, 32, 64)",
    "sand.u32": "{0} & {1}",
    "sor.u32": "{0} | {1}",
    "sxor.u32": "{0} ^ {1}",
    "sshll.u32": "shift_left({0}, {1})",
    "sshllo.u32": "shift_left_ones({0}, {1})",
    "sshrl.u32": "shift_right({0}, {1})",
    "sshra.s32": "shift_signed({0}, {1})",
    "smin.u32": "minimum({0}, {1})",
    "smax.u32": "maximum({0}, {1})",
    "smin.s32": "signed_minimum({0}, {1})",
    "smax.s32": "signed_maximum({0}, {1})",
    "sclz": "leading_zeros({0})",
    "scalar_select": "select({0}, {1}, {2})",
    "scalar_lea.hbm": "({0} + {1}) & M",
    "scalar_lea.vmem": "({0} + {1}) & M",
    "scalar_lea.smem": "({0} + {1}) & M",
    "scalar_lea.sflag": "({0} + {1}) & M",
    "int_to_ptr.hbm": "{0}",
    "int_to_ptr.vmem": "{0}",
    "int_to_ptr.smem": "{0}",
    "int_to_ptr.sflag": "{0}",
    "pnand": "({0} & {1}) ^ True",
    "por": "{0} | {1}",
    "pand": "{0} & {1}",
    "pxor": "{0} ^ {1}",
    "pnor": "({0} | {1}) ^ True",
    "pneg": "{0} ^ True",
    "pmov": "{0}",
}
_COMPARES = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
ARITHMETIC |= {
    f"scmp.{name}.{kind}.totalorder": f"({{0}}{flip}) {sign} ({{1}}{flip})"
    for name, sign in _COMPARES.items()
    for kind, flip in (("u32", ""), ("s32", " ^ SIGN"))
}
# Scalars that this model does not compute: floats, and what vectors hand over.
UNKNOWN = re.compile(
    r"^(?:s(?:add|sub|mul|min|max|div|neg|abs)\.f32|scvt\.\S+|scmp\.\w+\.f32\.\w+|spop"
    r"|sfloor\.f32|sceil\.f32|sweird\.f32|sround\.\S+|srcp\.f32)$"
)
TRANSFERS = {
    "dma.hbm_to_vmem",
    "dma.vmem_to_hbm",
    "dma.hbm_to_smem",
    "dma.smem_to_hbm",
    "dma.vmem_to_smem",
    "dma.smem_to_vmem",
    "dma.vmem_to_vmem",
    "dma.hbm_to_hbm",
    "dma.general",
}
WAITS = {"dma.done.wait", "vwait.ge", "vwait.ge.trace"}
_SYNCHRONISATION = {*WAITS, "vsyncadd", "vsyncadd.remote", "vsyncpa", "vsyncset", "vsyncmov"}
_CONTROL = {"sbr.rel", "shalt.err", "sphi"}
DIVISION = {"sdivrem.u32", "sdivrem.s32"}
_NOTHING = {"sfence", "compiler-scheduling-barrier", "vdelay", "vnop", "snop", "strace", "vtrace"}
_DECLARATION = "inlined_call_operand."
# Families of vector operations, by the first word of the name.
_VECTOR_NAMES = (
    "vabs vadd vand vandn vbcast vc vceil vclampa vclamps vcmask vcmp vcombine vcvt vdwg vexp2 "
    "vfloor vlaneseq vld vllmr vlog2 vmac vmand vmatmul vmatprep vmatpush vmatpush1 vmatpush2 "
    "vmatpush3 vmatres vmax vmaxabs vmin vmmov vmneg vmor vmov vmovacc vmpackc vmul vmxor vnez vor "
    "vpack vperm vpop vpow2 vpush vrcp vreduce vrot vround vrsqrt vsel vset vshll vshra vshrl "
    "vsigshft vsort vst vstv vsub vtanh vtrunc vunpack vweird vxor vxpose"
)
_VECTOR = frozenset(_VECTOR_NAMES.split())
POPS = {"vpop.sfrf", "spop.drf"}
_SCALAR = {*ARITHMETIC, *TRANSFERS, *_SYNCHRONISATION, *_CONTROL, *DIVISION, *POPS, "sld", "sst"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An operation that the replay acts on. Values are Python expressions.

    Registers are `s[n]` and `p[n]`, allocations are names, all else are numbers.

    Attributes:
      opcode: its name.
      target: the register it writes, or "".
      token: the name of the value it hands to a later pop, or "".
      predicate: what must hold for it to act, or "".
      otherwise: where `predicate` chooses between two values, the other one, else "".
      address: of a scalar load or store, else "".
      operands: its inputs.
      comment: what the compiler remarks.
    """

    opcode: str
    target: str
    token: str
    predicate: str
    otherwise: str
    address: str
    operands: tuple[str, ...]
    comment: str


@dataclasses.dataclass(frozen=True)
class Declaration:
    """An operand of the kernel: the register that holds it, its number, space and shape."""

    register: str
    index: int
    space: str
    shape: str


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A matrix multiplication that is started: the matrix unit, and the type of its rows."""

    unit: int
    dtype: str


Decoded = Instruction | Declaration | Matmul


def decode(file: str, bundle: Bundle) -> list[Decoded]:
    """Returns what the replay must act on in a bundle, in the order of the text.

    Raises:
      ListingError: an operation is not known.
    """
    pairs = zip(bundle.operations, bundle.comments, strict=True)
    decoded = [_decode(file, bundle.line, text, comment) for text, comment in pairs]
    return [one for one in decoded if one is not None]


def _decode(file: str, line: int, text: str, comment: str) -> Decoded | None:
    match = _OPERATION.match(text)
    if match is None:
        raise ListingError(file=file, line=line, what=f"operation {text[:80]!r}")
    result, opcode, rest = match[1] or "", match[2], match[3]
    if opcode.startswith(_DECLARATION):
        return _declaration(file, line, result, opcode, rest)
    if opcode in _NOTHING or opcode.startswith("inlined_call"):
        return None
    if opcode.startswith("vmatmul"):
        return _matmul(file, line, opcode)
    if opcode in _SCALAR or UNKNOWN.match(opcode):
        return _instruction(file, line, result, opcode, rest, comment)
    if opcode.split(".")[0] in _VECTOR:
        if _REGISTER.match(result):
            what = f"a vector operation {opcode!r} that writes a scalar"
            raise ListingError(file=file, line=line, what=what)
        return None
    raise ListingError(file=file, line=line, what=f"unknown operation {opcode!r}")


def _matmul(file: str, line: int, opcode: str) -> Matmul:
    match = _MATMUL.match(opcode)
    if match is None:
        raise ListingError(file=file, line=line, what=f"matrix operation {opcode!r}")
    return Matmul(unit=int(match[2]), dtype=match[1])


def _declaration(file: str, line: int, result: str, opcode: str, rest: str) -> Declaration:
    fields = re.match(r"^\[shape: (.*?), index: (\d+), kind: \w+,", rest)
    space = {"hbm": "hbm", "vmem": "vmem", "smem": "smem", "<no memory space>": "value"}.get(
        opcode.removeprefix(_DECLARATION)
    )
    if fields is None or space is None or not _REGISTER.match(result):
        raise ListingError(file=file, line=line, what=f"operand {opcode} {rest[:80]!r}")
    return Declaration(value(result), int(fields[2]), space, fields[1])


def _instruction(
    file: str, line: int, result: str, opcode: str, rest: str, comment: str
) -> Instruction:
    rest, address, predicate, otherwise = _THREAD.sub("", rest), "", "", ""
    try:
        if opcode in ("sld", "sst"):
            where = _SMEM.match(rest)
            address = value(where[1] if where else rest)
            rest = rest[where.end() :] if where else ""
        guard = _PREDICATE.match(rest)
        if guard is not None:
            predicate = value(guard[1])
            otherwise = value(guard[2]) if guard[2] else ""
            rest = rest[guard.end() :]
        rest = _NOTE.sub("", rest)
        read = opcode not in ("sbr.rel", "shalt.err") and not UNKNOWN.match(opcode)
        operands = tuple(value(part) for part in rest.split(", ") if part) if read else ()
    except ValueError as error:
        what = f"operand {error} of {opcode}"
        raise ListingError(file=file, line=line, what=what) from error
    named = _REGISTER.match(result)
    return Instruction(
        opcode=opcode,
        target=value(result) if named else "",
        token="" if named else result,
        predicate=predicate,
        otherwise=otherwise,
        address=address,
        operands=operands,
        comment=comment,
    )


def value(text: str) -> str:
    """The Python expression of an operand."""
    register = _REGISTER.match(text)
    if register is not None:
        negated, kind, number = register.groups()
        return f"({kind}[{number}] ^ True)" if negated else f"{kind}[{number}]"
    if text.startswith("[#") and text.endswith("]"):
        return f"({value(text[1:-1])})"
    if " + " in text:
        return " + ".join(map(value, text.split(" + ")))
    if _NAME.match(text):
        return text.removeprefix("#")
    if _NUMBER.match(text):
        return str(int(text.removeprefix("$"), 0))
    if _FLOAT.match(text):
        return str(int.from_bytes(struct.pack("<f", float(text)), "little"))
    if _TOKEN.match(text):
        return repr(text)
    if text in ("!0", "!1"):
        return str(text == "!0")
    raise ValueError(repr(text))
