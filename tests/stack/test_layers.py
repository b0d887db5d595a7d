"""Layers at real sizes, compiled for slices of several hosts: what XLA puts between kernels."""

import pytest

import gla
from microbench.stack import layer, run, steps
from tpukit import aot
from tpukit.copies import moves


def compiled(chip, model, kinds, step, mesh=None):
    """A step of some layers, and what it moves."""
    fn, args, options = steps.build(chip, model, kinds, step, mesh=mesh)
    found = aot.compile_for(fn, *args, chip=chip, **options)
    config = steps.CONFIGS[model]
    return found, moves(found.hlo, run.least_move(config, steps.step_of(step, config)))


def hosts(chip, topology):
    return len({device.process_index for device in aot.devices(chip, topology)})


def beside_stores(found):
    """Bytes of results that are not caches and states, written in place."""
    return found.output_bytes - found.executable.memory_analysis().alias_size_in_bytes


@pytest.fixture(scope="module")
def decode():
    """A layer of each kind of Ling-2.6-1T on 32 devices of four hosts."""
    return compiled("tpu7x", "ling-2.6-1t", steps.KINDS, "decode")


# What XLA moves around the kernels, by the operation it belongs to, and why.
KNOWN = {
    "dot_general": "queries of latent attention: products by head, then by token",
    "convert_element_type": "the same, before they are rounded",
    "concatenate": "cosines beside sines, and latents beside rotated keys, padded to whole lanes",
    "broadcast_in_dim": "latents beside rotated keys",
    "pad": "16 tokens of a device, for blocks of 32",
    "reshape": "the router's scores by group",
    "split": "halves of the rotated lanes of queries",
}


def test_nothing_else_is_moved_between_kernels(decode):
    _, found = decode
    assert {move.source.rsplit("/", 1)[-1] for move in found} <= set(KNOWN), list(map(str, found))
    config, step = (
        steps.CONFIGS["ling-2.6-1t"],
        steps.step_of("decode", steps.CONFIGS["ling-2.6-1t"]),
    )
    width = config.kv_rank + config.rope
    queries = step.tokens * config.heads // config.tensor * 2 * (width + 64)  # to whole lanes
    assert max(move.size for move in found) <= queries
    assert all(move.size < queries / 2 for move in found if "dot_general" not in move.source)


def test_kernels_of_several_hosts_fit_and_write_in_place(decode):
    found, _ = decode
    assert hosts("tpu7x", steps.TOPOLOGIES["tpu7x", 32]) == 4
    names = sorted(name.split(".")[0] for name in found.kernels)
    assert names == ["fused_moe", "fused_moe", "gla", "ragged_attention"]
    assert beside_stores(found) < 1e4
    assert found.temp_bytes < 0.06e9
    assert found.argument_bytes < 1.5e9


def test_a_step_with_prompts_on_several_hosts_of_v6e():
    assert hosts("v6e", steps.TOPOLOGIES["v6e", 16]) == 4
    found, moved = compiled("v6e", "ling-2.6-flash", ["lightning"], "prompts", mesh=(4, 4))
    assert {name.split(".")[0] for name in found.kernels} == {"fused_moe", "gla"}
    # cosines beside sines, and a device's 512 tokens, for whole tiles of that chip
    assert [move.shape.dims for move in moved] == [(2048, 128), (576, 4096)]


def test_latents_on_several_hosts_of_v6e():
    found, moved = compiled("v6e", "ling-2.6-flash", ["mla"], "decode", mesh=(4, 4))
    assert {name.split(".")[0] for name in found.kernels} == {"fused_moe", "ragged_attention"}
    assert {move.source.rsplit("/", 1)[-1] for move in moved} <= set(KNOWN), list(map(str, moved))
    queries = 64 * 8 * 640 * 2  # tokens, heads and whole lanes of a device
    assert max(move.size for move in moved) <= queries
    assert beside_stores(found) < 1e4


def test_states_kept_transposed_are_noticed(monkeypatch):
    whole = gla.gla

    def transposed(q, k, v, states, *args, **options):
        o, states = whole(q, k, v, states.swapaxes(2, 3), *args, **options)
        return o, states.swapaxes(2, 3)

    monkeypatch.setattr(layer.gla, "gla", transposed)
    found, moved = compiled("tpu7x", "ling-2.6-flash", ["lightning"], "decode")
    states = 4 * 128 * 8 * 128 * 128
    assert [move.size for move in moved].count(states) == 2
    assert found.temp_bytes > states
