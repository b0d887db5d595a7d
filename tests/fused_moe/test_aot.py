"""Compiled by the real compiler, for every chip and model; and what its figures must be."""

import dataclasses

import pytest

import fused_moe
from microbench.case import planned
from microbench.cases import fused_moe as cases
from tpukit import aot, errors

BY_NAME = {case.name: case for case in (*cases.CASES, *cases.MORE)}
PAIRS = [(case.name, chip) for case in cases.CASES for chip in cases.chips(case)]


def compiled(case, chip, **changes):
    params = {**case.params, "plan": {}, **changes}
    fn, args, options = cases.build(chip, 0, **params)
    return aot.compile_for(fn, *args, chip=chip, describe="fused_moe", **options)


@pytest.mark.parametrize(("name", "chip"), PAIRS)
def test_published_models_compile_with_default_plans(name, chip):
    found = compiled(BY_NAME[name], chip)
    assert found.kernels == ("fused_moe.1",)
    assert found.compile_seconds < 30


def test_in_bulk_transfers_are_of_tiles():
    """A visit starts the rows to come, what they give, and weights; nothing by rows."""
    case = BY_NAME["qwen3-30b/prefill"]
    assert cases.explain(case, "tpu7x").plan.bulk
    target, arguments = cases.aot_target(case)
    report = aot.static_report(target, "tpu7x", **arguments)
    (visit,) = (x for x in report.kernel("fused_moe").loops if x.ops.matmuls)
    assert visit.depth == 1 and visit.ops.dma_starts == 2 + 3 * 2
    inside = [x for x in report.kernel("fused_moe").loops if x.depth > 1]
    assert not any(x.ops.dma_starts for x in inside)
    figures = cases.figures(case, report)
    assert figures["tile bundles"] <= 4_000 and figures["FFN1 MXU slots %"] >= 75


def test_headline_fits_where_it_must():
    found = compiled(BY_NAME["ling-2.6-1t/prefill"], "tpu7x")
    assert found.temp_bytes <= 0.3e9


ONE = {"devices": 1, "experts": 16}
SMALL = {"tile": 64, "inter_slice": 256, "hidden_slice": 1024}
BULK = {**SMALL, "bulk": 1}
KINDS = {
    "64 devices": ("tpu7x", {"devices": 64}),
    "one device": ("tpu7x", {**ONE, "plan": SMALL}),
    "in bulk": ("tpu7x", {**ONE, "plan": BULK, "activation": "gelu", "biased": True}),
    "in bulk, bfloat16": ("v5e", {**ONE, "plan": BULK, "dtype": "bfloat16", "rows": "bfloat16"}),
    "in bulk, blocks": ("v6e", {**ONE, "plan": BULK, "block": 128, "shared": 0}),
    "bfloat16": ("v5e", {"dtype": "bfloat16", "rows": "bfloat16"}),
    "float8 weights": ("v6e", {"rows": "bfloat16"}),
    "float8 back": ("tpu7x", {"back": "float8_e4m3fn"}),
    "blocks": ("v6e", {"block": 128}),
    "gelu and biases": ("tpu7x", {"activation": "gelu", "biased": True}),
    "no shared expert": ("tpu7x", {"shared": 0}),
}


@pytest.mark.parametrize(("chip", "changes"), KINDS.values(), ids=KINDS)
def test_kinds_compile(chip, changes):
    compiled(BY_NAME["ling-2.6-flash/decode"], chip, **changes)


@pytest.mark.parametrize("tokens", [512, 1024, 1184, 2048, 4096, 65536])
def test_any_number_of_tokens_has_a_plan(tokens):
    """What does not fit SMEM at once is split into calls that do."""
    case = BY_NAME["ling-2.6-1t/prefill"].override({"tokens": str(32 * tokens)})
    assert cases.explain(case, "tpu7x").plan.tile >= 64


def test_what_is_unsupported_says_so():
    with pytest.raises(errors.UnsupportedError, match="no float8"):
        compiled(BY_NAME["ling-2.6-flash/decode"], "v5e")
    with pytest.raises(errors.UnsupportedError, match="v5p"):
        fused_moe.explain(*_arguments(), chip="v5p", activation_dtype="float8_e4m3fn")


def _arguments():
    shape = cases._shape(BY_NAME["ling-2.6-flash/decode"])
    tokens, routed, shared, ids, weights = cases._specs(shape)
    return tokens, dataclasses.replace(routed, shared=shared), ids, weights


@pytest.mark.parametrize(("tile", "most"), [(160, 19_000), (256, 26_000)])
def test_tiles_take_few_bundles(tile, most):
    case = BY_NAME["ling-2.6-1t/prefill"]
    blocks = {"tile": str(tile), "inter_slice": "512", "depth": "2"}
    case = planned(case, cases.explain(case, "tpu7x").plan, blocks)
    target, arguments = cases.aot_target(case)
    report = aot.static_report(target, "tpu7x", **arguments)
    figures = cases.figures(case, report)
    assert figures["tile"] == tile
    assert figures["tile bundles"] <= most
    assert figures["FFN1 MXU slots %"] >= 80
