"""Which models and situations have cases."""

import dataclasses
import itertools

import pytest

from microbench import cases
from microbench.cases import fused_moe, gla, ragged_attention
from tests.microbench import fake

SITUATIONS = ("decode", "chunked", "mixed", "long", "speculative")
WITH_ATTENTION = ("deepseek-v3", "gpt-oss-120b", "llama-3-70b", "qwen3-235b", "qwen3-coder-480b")
WITH_EXPERTS = (
    *("ling-2.6-1t", "ling-2.6-flash", "deepseek-v3", "deepseek-v4-flash", "deepseek-v4-pro"),
    *("qwen3-235b", "qwen3-coder-480b", "gpt-oss-120b"),
)
LINEAR = ("prefill", "step", "decode", "mixed", "chunked", "verify", "tree", "snapshots")


def names(suite):
    return [case.name for case in (*suite.CASES, *suite.MORE)]


def test_every_model_has_its_situations():
    attention = {f"{m}/{s}" for m in ("ling-2.6", *WITH_ATTENTION) for s in SITUATIONS}
    assert attention <= set(names(ragged_attention))
    experts = {f"{m}/{s}" for m in WITH_EXPERTS for s in ("prefill", "decode")}
    assert experts <= set(names(fused_moe))
    linear = {f"{m}/{s}" for m in ("ling-2.6-1t", "ling-2.6-flash") for s in LINEAR}
    assert linear <= set(names(gla))


@pytest.mark.parametrize("kernel", cases.kernels())
def test_names_are_unique_and_chips_are_there(kernel):
    suite = cases.load(kernel)
    assert len(set(names(suite))) == len(names(suite))
    for case in suite.MORE:
        assert case.kernel == kernel and "tpu7x" in suite.chips(case)
        assert str(suite.explain(case, "tpu7x"))


def test_situations_are_what_they_are_called():
    shapes = {case.name: ragged_attention.Shape(**case.params) for case in ragged_attention.MORE}
    for (name, shape), small in itertools.product(shapes.items(), (False, True)):
        shape = shape.reduced() if small else shape
        kind, q_lens = name.split("/")[1], shape.q_lens
        assert all(0 < q <= k for q, k in zip(q_lens, shape.kv_lens, strict=True))
        assert (max(q_lens) == 1) == (kind in ("decode", "long"))
        assert (len(set(q_lens)) > 1) == (kind == "mixed")
        assert not small or sum(shape.kv_lens) < 2000
    assert max(shapes["llama-3-70b/long"].kv_lens) >= 100_000
    chunked = shapes["llama-3-70b/chunked"]
    assert chunked.kv_lens[0] > chunked.q_lens[0]
    chunks = next(case for case in gla.MORE if case.name == "ling-2.6-1t/chunked")
    assert gla.Shape(**chunks.params).resumes().any()


def test_the_others_run_only_where_they_are_named(microbench, monkeypatch):
    extra = dataclasses.replace(fake.CASES[0], name="model/extra")
    monkeypatch.setattr(fake, "MORE", (extra,))
    assert microbench("list")[1].count("model/") == 3
    assert "extra" not in microbench("run")[1]
    assert "extra" in microbench("run", "--case", "model/extra")[1]
