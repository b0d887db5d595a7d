"""Kernels of others that a user would take instead, as calls for a prediction.

JAX's own, with the block sizes that they choose on a tpu7x or, where they choose none, those their
users set; and tokamax's where that is installed, with its defaults. What they ask a device for is
passed to them, since none is here.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from microbench.case import Call

_JAX = "jax.experimental.pallas.ops.tpu"
_OPS = "tokamax._src.ops"
_BF16 = jnp.bfloat16
_BLOCK = 8 * 2**20  # bytes of 128 pages of one head
_VMEM = 60 * 2**20  # of the 64 MiB of a tpu7x
GroupedMatmul = Callable[..., jax.Array]  # of rows, weights, their scales or None, group sizes


def has_tokamax() -> bool:
    """Whether tokamax is installed."""
    return importlib.util.find_spec("tokamax") is not None


def _table(pages: Sequence[int], indices: Any, offsets: Any) -> np.ndarray:
    """[N, most pages of a request] pages of each request."""
    table = np.zeros((len(pages), max(pages)), np.int32)
    for row, count in enumerate(pages):
        table[row, :count] = indices[int(offsets[row]) : int(offsets[row]) + count]
    return table


def jax_ragged_paged_attention(shape: Any, args: Any) -> Call:
    """JAX's kernel for ragged batches; it reads a cache that has the new rows already.

    Its blocks are those that it chooses on a tpu7x, 128 pages and 32 queries, but pages of no more
    than 8 MiB: with those of many heads it would not compile.

    Args:
      shape: as the cases of `ragged_attention` define it, as for all that follows.
      args: their inputs.
    """
    kernel = importlib.import_module(f"{_JAX}.ragged_paged_attention")
    table = _table(shape.pages, args.page_indices, args.page_offsets)
    size = (shape.pool, shape.page_size, 2 * shape.kv_heads, shape.key_dim)
    pages = jax.ShapeDtypeStruct(size, jnp.dtype(shape.cache))
    steer = args.kv_lens, jnp.asarray(table), args.cu_q_lens, jnp.array([len(shape.pages)])
    fitting = max(1, _BLOCK // (math.prod(size[1:]) * pages.dtype.itemsize))

    def fn(q: Any, pages: Any, *steer: Any) -> jax.Array:
        return kernel.ragged_paged_attention(
            q,
            pages,
            *steer,
            sm_scale=shape.key_dim**-0.5,
            sliding_window=shape.window or None,
            num_kv_pages_per_block=min(max(shape.pages), 128, fitting),
            num_queries_per_block=min(shape.tokens, 32),
            vmem_limit_bytes=_VMEM,
        )

    return fn, (args.q, pages, *steer)


def jax_paged_attention(shape: Any, args: Any) -> Call:
    """JAX's kernel for one query per request; keys and values in pools of their own.

    It has no scale and no window, and its block of pages has to divide a request's.
    """
    kernel = importlib.import_module(f"{_JAX}.paged_attention")
    table = _table(shape.pages, args.page_indices, args.page_offsets)
    block = min(16, table.shape[1])
    table = np.pad(table, ((0, 0), (0, -table.shape[1] % block)))
    size = (shape.kv_heads, shape.pool, shape.page_size, shape.key_dim)
    pages = jax.ShapeDtypeStruct(size, jnp.dtype(shape.cache))

    def fn(q: Any, keys: Any, values: Any, *steer: Any) -> jax.Array:
        scaled = q * shape.key_dim**-0.5
        return kernel.paged_attention(scaled, keys, values, *steer, pages_per_compute_block=block)

    return fn, (args.q, pages, pages, args.kv_lens, jnp.asarray(table))


def tokamax_paged_attention(shape: Any, args: Any) -> Call:
    """The batched kernel of tokamax, which writes new keys and values too."""
    found = importlib.import_module(f"{_OPS}.batched_rpa.pallas_mosaic_tpu")
    wrapper = importlib.import_module(f"{_OPS}.batched_rpa.kernel.wrapper")
    op = found.PallasTpuBatchedRpa(config=found.Config(), bypass_device_check=True)
    dims = (shape.pool, shape.page_size, shape.kv_heads, shape.key_dim)
    cache = jax.ShapeDtypeStruct(wrapper.get_kv_cache_shape(*dims, _BF16), jnp.dtype(shape.cache))
    table = _table(shape.pages, args.page_indices, args.page_offsets).ravel()
    ones = sum(length == 1 for length in shape.q_lens)
    spread = jnp.array([ones, ones, len(shape.q_lens)], jnp.int32)
    steer = args.kv_lens, jnp.asarray(table), args.cu_q_lens, spread

    def fn(*arrays: Any) -> Any:
        window = shape.window or None
        return op(*arrays, sm_scale=shape.key_dim**-0.5, sliding_window=window)

    return jax.jit(fn, donate_argnums=3), (args.q, args.k, args.v, cache, *steer)


def ragged_dot(rows: Any, weights: Any, scales: Any, sizes: Any) -> jax.Array:
    """JAX's primitive, of which the compiler makes kernels of its own; of bfloat16 here."""
    del scales
    return lax.ragged_dot(rows, weights, sizes, preferred_element_type=_BF16)


def megablox(rows: Any, weights: Any, scales: Any, sizes: Any) -> jax.Array:
    """JAX's grouped matmul, of bfloat16 alone; tiles of 128 or 512 rows, and of 1,024 or less."""
    del scales
    kernel = importlib.import_module(f"{_JAX}.megablox")
    count, inner, outer = weights.shape
    tile = 512 if len(rows) > 128 * count else 128
    tiling = (math.gcd(tile, len(rows)), min(inner, 1024), min(outer, 1024))
    return kernel.gmm(rows, weights, sizes, _BF16, tiling)


def tokamax_grouped(rows: Any, weights: Any, scales: Any, sizes: Any) -> jax.Array:
    """The second grouped matmul of tokamax, which takes narrow weights and narrows rows itself."""
    kernel = importlib.import_module(f"{_OPS}.gmm_v2.gmm_v2")
    config = importlib.import_module("tokamax._src.config")
    scales = None if scales is None else scales[:, :, None]
    with config.disable_multi_core_mode(True):  # one core is what a prediction is of
        return kernel.gmm_v2(rows, weights, sizes, scales, preferred_element_type=_BF16)


def widened(weights: Any) -> Any:
    """Shapes of weights that are bfloat16 from the start."""
    wide = (jax.ShapeDtypeStruct(x.shape, _BF16) for x in (weights.gate, weights.up, weights.down))
    return type(weights)(*wide)


def grouped_moe(matmul: GroupedMatmul, args: Any) -> Call:
    """A gated layer of experts on one device: rows sorted by expert, and three grouped matmuls.

    Args:
      matmul: the grouped matmul.
      args: inputs of a case of `fused_moe`, ids being values.
    """

    def fn(tokens: Any, routed: Any, ids: Any, expert_weights: Any) -> jax.Array:
        flat = ids.reshape(-1)
        order = jnp.argsort(flat)
        sizes = jnp.bincount(flat, length=len(routed.gate)).astype(jnp.int32)
        rows = tokens[order // ids.shape[1]]
        gate = matmul(rows, routed.gate, routed.gate_scale, sizes)
        up = matmul(rows, routed.up, routed.up_scale, sizes)
        inner = (jax.nn.silu(gate.astype(jnp.float32)) * up).astype(_BF16)
        found = matmul(inner, routed.down, routed.down_scale, sizes)
        found = found[jnp.argsort(order)].reshape(*ids.shape, -1)
        return jnp.einsum("tkh,tk->th", found.astype(jnp.float32), expert_weights).astype(_BF16)

    return fn, (args.tokens, args.routed, args.ids, args.expert_weights)


def tokamax_kda(shape: Any) -> Call:
    """Kimi Delta Attention of tokamax, of whole sequences of one length.

    Args:
      shape: as the cases of `gla` define it.
    """
    found = importlib.import_module(f"{_OPS}.kda.pallas_mosaic_tpu")
    op = found.PallasMosaicTpuKimiDeltaAttention(config=found.Config(), bypass_device_check=True)
    count, length = len(shape.lengths), shape.lengths[0]

    def array(*dims: int, dtype: Any = _BF16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.heads, count, length, *dims), dtype)

    keys, gate = array(shape.key_dim), array(shape.key_dim, dtype=jnp.float32)
    beta = array(dtype=jnp.float32)

    def fn(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
        return op(query=q, key=k, value=v, gate=g, beta=beta, output_final_state=True)

    return fn, (keys, keys, array(shape.value_dim), gate, beta)


def tokamax_delta_rule(shape: Any, args: Any) -> Call:
    """Gated DeltaNet of tokamax, ragged and with states in a pool; 4 taps of convolution before it.

    Args:
      shape: as the cases of `gla` define it.
      args: their inputs.
    """
    found = importlib.import_module(f"{_OPS}.causal_conv1d_gated_delta_rule.pallas_mosaic_tpu")
    op = found.PallasMosaicTpuCausalConv1dGatedDeltaRule(bypass_device_check=True)
    taps, heads, count = 4, shape.heads, len(shape.lengths)
    width = heads * (2 * shape.key_dim + shape.value_dim)

    def array(*dims: int, dtype: Any = _BF16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    rows = array(shape.tokens, width), array(shape.tokens, heads), array(shape.tokens, heads)
    states = array(shape.slots, taps - 1, width), args.pool
    weights = array(width, 1, taps), array(width), array(heads, dtype=jnp.float32), array(heads)
    spread = jnp.array([shape.decodes, count, count], jnp.int32)
    contexts = jnp.array(shape.lengths, jnp.int32) + args.has_state  # longer: from a state
    steer = args.cu_seqlens, args.slot_ids, spread, contexts
    sizes = {"n_kq": heads, "n_v": heads, "d_k": shape.key_dim, "d_v": shape.value_dim}

    def fn(*arrays: Any) -> Any:
        return op(*arrays, **sizes, kernel_size=taps)

    return jax.jit(fn, donate_argnums=(3, 4)), (*rows, *states, *weights, *steer)
