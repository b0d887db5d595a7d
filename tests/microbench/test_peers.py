"""What stands beside the kernels in `compare` computes the same."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from microbench import peers
from microbench.cases import fused_moe, gla, ragged_attention
from tests.microbench import fake


def shape_of(suite, name):
    (case,) = (case for case in suite.CASES if case.name == name)
    return suite.Shape(**case.params)


def error(found, wanted):
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_one_step_for_xla_is_the_reference():
    shape = shape_of(gla, "ling-2.6-flash/decode").reduced()
    case = dataclasses.replace(gla.CASES[0], params=dataclasses.asdict(shape))
    args = gla.inputs(case, 0)
    o, pool = jax.jit(gla._step(shape))(*args)
    wanted, states = gla.reference_fn(case)(*args)
    assert error(o, wanted) < 0.005 and error(pool, states) < 1e-5


def test_sorted_rows_and_grouped_matmuls_are_the_layer():
    full = shape_of(fused_moe, "qwen3-30b/one device")
    shape = dataclasses.replace(full.reduced(1), dtype="bfloat16", rows="bfloat16")
    case = dataclasses.replace(fused_moe.CASES[0], params=dataclasses.asdict(shape))
    args = fused_moe.inputs(case, 0)

    assert args.routed.gate_scale is None
    fn, ours = peers.grouped_moe(peers.ragged_dot, args)
    wanted = fused_moe.reference_fn(case)(*args)
    assert error(jax.jit(fn)(*ours), wanted) < 0.006


@pytest.mark.parametrize("name", ["decode/mean-1.5k", "decode/2k", "prefill/2k"])
def test_jax_kernels_are_given_the_pages_of_each_request(name):
    shape = shape_of(ragged_attention, name)
    case = dataclasses.replace(ragged_attention.CASES[0], params=dataclasses.asdict(shape))
    found = ragged_attention.peers(case, 0)
    args = ragged_attention.Inputs(*ragged_attention.steered(case, 0)[1])
    kernels = {name: call for name, call in found.items() if name.startswith("JAX's")}
    assert len(kernels) == 1 + (max(shape.q_lens) == 1)
    for name, (_, arrays) in kernels.items():
        first = 2 if "ragged" in name else 3  # after one array of pages, or one each
        lens, table = arrays[first : first + 2]
        assert list(lens) == list(shape.kv_lens)
        for row, count in enumerate(shape.pages):
            begin = int(args.page_offsets[row])
            assert list(table[row][:count]) == list(args.page_indices[begin : begin + count])


def test_tokamax_delta_rule_is_given_the_requests_and_their_states(monkeypatch):
    class Op:
        """Stands for tokamax's, which is not installed here."""

        def __init__(self, bypass_device_check):
            assert bypass_device_check

        def __call__(self, qkv, b, a, convolved, pool, weight, bias, *rest, **sizes):
            assert b.shape == a.shape == (len(qkv), sizes["n_v"]) and bias.shape == qkv.shape[1:]
            assert weight.shape == (qkv.shape[1], 1, sizes["kernel_size"])
            assert convolved.shape == (len(pool), sizes["kernel_size"] - 1, qkv.shape[1])
            assert pool.shape[1:] == (sizes["n_v"], sizes["d_k"], sizes["d_v"])
            *_, begins, slots, spread, contexts = rest
            return (convolved, pool), (qkv, begins, slots, spread, contexts)

    module = types.SimpleNamespace(PallasMosaicTpuCausalConv1dGatedDeltaRule=Op)
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: module)
    shape = dataclasses.replace(shape_of(gla, "gated-deltanet/decode"), decodes=3, prefills=(7, 9))
    case = dataclasses.replace(gla.CASES[0], params=dataclasses.asdict(shape))
    args = gla.Inputs(*gla.steered(case, 0)[1])
    fn, arrays = peers.tokamax_delta_rule(shape, args)
    jax.eval_shape(fn, *arrays)
    begins, slots, spread, contexts = arrays[-4:]
    assert list(begins) == [0, 1, 2, 3, 10, 19] and list(slots) == list(args.slot_ids)
    assert list(spread) == [3, 5, 5]
    lengths = np.asarray(shape.lengths)
    assert list(contexts > lengths) == list(args.has_state) and any(args.has_state)


def test_whatever_a_peer_raises_is_its_line(microbench, monkeypatch):
    def broken(*args):
        raise NotImplementedError("it knows its own devices only\nand says so")

    monkeypatch.setattr(fake, "peers", lambda case, seed: {"theirs": (broken, ())})
    status, out, _ = microbench("compare", "--case", "right", "--chip", "v6e")
    assert status == 0 and "NotImplementedError: it knows its own devices only" in out
    assert "and says so" not in out and "this kernel" in out
