"""The GLA cases: what they describe, and that their check can fail."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gla
from microbench.cases import gla as cases
from tpukit.predict import predict

BY_NAME = {case.name: case for case in cases.CASES}
DECODE = BY_NAME["ling-2.6-flash/decode"]


def test_batches_are_the_production_ones():
    lengths = {name: cases.Shape(**case.params).lengths for name, case in BY_NAME.items()}
    for model in ("ling-2.6-1t", "ling-2.6-flash"):
        assert lengths[f"{model}/prefill"] == (8192,)
        assert len(lengths[f"{model}/step"]) == 32 and sum(lengths[f"{model}/step"]) == 2048
        assert lengths[f"{model}/decode"] == (1,) * 64
        assert lengths[f"{model}/mixed"] == (1,) * 32 + (512, 512)


def test_ragged_lengths_differ_and_are_not_sorted():
    lengths = cases.ragged(2048, 32)
    assert min(lengths) > 1 and len(set(lengths)) > 16
    assert list(lengths) != sorted(lengths) and list(lengths) != sorted(lengths)[::-1]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_reduced_batches_stay_small_and_of_their_kind(case):
    full, small = cases.Shape(**case.params), cases.Shape(**case.params).reduced()
    assert 0 < small.tokens <= 310
    assert bool(small.decodes) == bool(full.decodes)
    assert bool(small.prefills) == bool(full.prefills)
    assert (small.heads, small.key_dim) == (full.heads, full.key_dim)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_inputs_have_the_shapes_that_are_compiled(case):
    _, arguments = cases.aot_target(case)
    _, specs = cases.build("v5e", **json.loads(json.dumps(arguments)))
    if "prefill" in case.name:
        return  # 8,192 tokens of random numbers take a second and show nothing more
    inputs = cases.inputs(case, seed=0)
    found, wanted = jax.tree.leaves(inputs), jax.tree.leaves(tuple(specs))
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in wanted]
    assert len(set(np.asarray(inputs.slot_ids))) == len(inputs.slot_ids)
    assert np.asarray(inputs.cu_seqlens)[-1] == inputs.q.shape[0]


def test_cost_counts_states_once_and_rows_once():
    state_bytes = 8 * 128 * 128 * 4
    cost = cases.cost(DECODE)
    assert cost.flops == 64 * 8 * 4 * 128 * 128
    assert cost.hbm_bytes == 64 * (2 * state_bytes + 8 * 4 * 128 * 2)
    prefill = cases.cost(BY_NAME["ling-2.6-flash/prefill"])
    assert prefill.hbm_bytes == 8192 * 8 * 4 * 128 * 2 + state_bytes  # starts without a state


def test_plan_says_where_it_comes_from():
    for case in cases.CASES:
        assert "VMEM" in str(cases.explain(case, "tpu7x")) and "heads=" in str(
            cases.explain(case, "v5e")
        )


@pytest.mark.parametrize(
    "fault", [None, "nothing", "output", "one token", "state", "other slot", "nan"]
)
def test_check_is_green_on_the_kernel_and_red_on_each_fault(monkeypatch, fault):
    real = gla.gla

    def faulty(*args, implementation, **options):
        assert implementation == "interpret"
        # The arithmetic of the reference stands in for the kernel's where a fault is planted.
        o, pool = real(*args, implementation="reference" if fault else implementation, **options)
        match fault:
            case "output":
                o = o * jnp.asarray(1.01, o.dtype)
            case "one token":
                o = o.at[2].set(o[1])
            case "state":
                pool = pool.at[args[4][1]].mul(1.001)
            case "other slot":
                pool = pool.at[0, 0, 0, 0].set(7.0)
            case "nan":
                o = o.at[0, 0, 0].set(jnp.nan)
        return o, pool

    monkeypatch.setattr(gla, "gla", faulty)
    checks = cases.check(DECODE, seed=1)
    assert all(check.ok for check in checks) == (fault in (None, "nothing"))


@pytest.mark.parametrize("batch", ["prefill", "decode"])
def test_the_replayed_schedule_moves_no_byte_more_than_it_must(batch):
    """Inputs, outputs and states, once each, counted transfer by transfer."""
    case = BY_NAME[f"ling-2.6-flash/{batch}"]
    fn, args = cases.steered(case, 0)
    (kernel,) = predict(fn, *args, chip="tpu7x").kernels
    assert kernel.hbm_bytes == cases.cost(case).hbm_bytes
