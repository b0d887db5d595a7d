"""The stacks' calls compile for a TPU into one kernel, with nothing of a cache's size beside it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from adapters import sglang_jax, tpu_inference
from tests.adapters import targets
from tpukit import aot

CHIP = "tpu7x"
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


def array(*shape, dtype=I32):
    return jax.ShapeDtypeStruct(shape, dtype)


def sizes(op):
    """Elements of each array that an operation gives."""
    for dims in re.findall(r"\w+\[([\d,]*)\]", op.shape):
        size = 1
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        yield size


def large(compiled, elements):
    """Operations beside the kernels whose results have so many elements, or more."""
    return [f"{op.name} {op.shape}" for op in compiled.other_ops if max(sizes(op)) >= elements]


def compiled(fn, *args, donate=(), kernels=1):
    found = aot.compile_for(jax.jit(fn, donate_argnums=donate), *args, chip=CHIP)
    assert len(found.kernels) == kernels, found.kernels
    return found


def decode(transposed=False):
    heads, dim, requests = 8, 128, 16
    x = array(requests, heads, dim, dtype=BF16)
    pool = array(64, heads, dim, dim, dtype=F32)
    slots, has = array(requests), array(requests, dtype=jnp.bool_)

    def fn(q, k, v, pool, slots, has, g_gamma):
        pool = pool.swapaxes(2, 3) if transposed else pool
        return sglang_jax.decode_simple_gla_fused(q, k, v, pool, slots, has, g_gamma=g_gamma)

    return compiled(fn, x, x, x, pool, slots, has, array(heads, dtype=F32), donate=3), pool.size


def test_simple_gla_decode_moves_no_pool():
    found, size = decode()
    assert large(found, size // 2) == []


def test_a_pool_that_is_moved_is_caught():
    found, size = decode(transposed=True)
    assert large(found, size // 2)


def test_simple_gla_prefill():
    x, states = array(1, 256, 8, 128, dtype=BF16), array(4, 8, 128, 128, dtype=F32)

    def fn(q, k, v, h0, bounds, g_gamma):
        return sglang_jax.simple_gla_fwd(
            q, k, v, g_gamma=g_gamma, h0=h0, use_ht=True, cu_seqlens_dev=bounds
        )

    compiled(fn, x, x, x, states, array(5), array(8, dtype=F32))


def test_gather_reduce(tmp_path):
    """In a process of its own: a bad SparseCore program can end the process."""
    found = aot.compile_and_dump(f"{targets.__name__}:sums", CHIP, tmp_path)
    assert len(found["sparse_kernels"]) == 2


REQUESTS, PAGES, PAGE = 16, 512, 128


def batch(stack):
    """kv_lens, pages, bounds, distribution, as a stack has them; a request has 32 pages."""
    shapes = {"tpu": (16, 16 * 32, 17, 3), "sgl": (16, 16 * 32, 17, 17, 3)}
    return [array(size) for size in shapes[stack]]


def attention(stack, cache):
    """The kernel of grouped queries, 8 heads to one, and the elements of its cache."""
    q, kv = array(REQUESTS, 8, 128, dtype=BF16), array(REQUESTS, 1, 128, dtype=BF16)
    fn, mask = tpu_inference.ragged_paged_attention, ()
    if stack == "sgl":
        fn, mask = sglang_jax.ragged_paged_attention, (None, None)
    options = {"sm_scale": 0.1, "sliding_window": 1024}
    size = sum(x.size for x in jax.tree.leaves(cache))
    args = (q, kv, kv, cache, *batch(stack), *mask)
    return compiled(lambda *args: fn(*args, **options), *args, donate=3), size


def own(allocate, *sizes):
    return jax.eval_shape(lambda: allocate(PAGES, PAGE, *sizes, BF16))


@pytest.mark.parametrize("stack", ["tpu", "sgl"])
def test_attention_moves_no_cache(stack):
    found, size = attention(stack, own(tpu_inference.new_kv_cache, 1, 128))
    assert large(found, size // 2) == []


@pytest.mark.parametrize("stack", ["tpu", "sgl"])
def test_latent_attention_moves_no_cache(stack):
    heads, rank, rope = 16, 512, 64
    q = [array(REQUESTS, heads, dim, dtype=BF16) for dim in (rank, rope)]
    if stack == "tpu":
        q[0] = array(heads, REQUESTS, rank, dtype=BF16)
    rows = [array(REQUESTS, dim, dtype=BF16) for dim in (rank, rope)]
    module = {"tpu": tpu_inference, "sgl": sglang_jax}[stack]
    cache = own(module.new_mla_cache, rank, rope)
    found = compiled(
        lambda *args: module.mla_ragged_paged_attention(*args, sm_scale=0.1),
        *(*q, *rows, cache, *batch(stack)),
        donate=4,
    )
    assert large(found, cache.words.size // 2) == []


def test_mixture_of_experts():
    """Of eight devices, with float8 weights and tokens; weights are not moved."""
    tokens, experts, hidden, inter, top_k, devices = 1024, 64, 2048, 512, 8, 8
    over = jax.sharding.Mesh(
        np.array(aot.devices(CHIP))[:devices].reshape(2, 4),
        ("data", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )
    weights = [
        array(experts, *sizes, dtype=jnp.float8_e4m3fn)
        for sizes in ((hidden, inter), (inter, hidden), (hidden, inter))
    ]
    scales = [array(experts, 1, 1, weight.shape[-1], dtype=F32) for weight in weights]
    routing = [array(tokens, top_k, dtype=dtype) for dtype in (F32, I32)]

    def fn(tokens, weights, scales, routing):
        names = ("w1_scale", "w2_scale", "w3_scale")
        return sglang_jax.fused_ep_moe_v2(
            over,
            tokens,
            *weights,
            *routing,
            top_k,
            enable_act_quant=True,
            direct_scaled_dot=True,
            **dict(zip(names, scales, strict=True)),
        )

    found = aot.compile_for(
        fn,
        array(tokens, hidden, dtype=BF16),
        weights,
        scales,
        routing,
        chip=CHIP,
        mesh_axes={"data": 2, "tensor": 4},
        in_specs=(PartitionSpec(("data", "tensor")),) * 4,
    )
    assert found.kernels == ("fused_moe.1",)
    assert large(found, weights[0].size // devices // 2) == []
