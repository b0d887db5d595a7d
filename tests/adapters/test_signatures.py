"""Names, order and defaults of arguments are those of the stacks' public functions."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from adapters import sglang_jax, tpu_inference

# As they are in sgl-project/sglang-jax at cddbf6f1cc33cbdd453bd8f36ff7051cf46ca176 and in
# vllm-project/tpu-inference at b8692ff01fa191343836996c27a39dc95f008b88; "*" is where arguments
# become keywords only.
SGLANG_JAX = {
    "simple_gla_fwd": (
        "q k v * g=None g_gamma=None scale=None h0=None use_ht=False cu_seqlens_cpu=None "
        "cu_seqlens_dev=None chunk_size=64 mode=FUSED_CHUNK"
    ),
    "decode_simple_gla_fused": (
        "q k v recurrent_buffer recurrent_indices has_initial_state * g_gamma scale=None"
    ),
    "fused_ep_moe_v2": (
        "mesh tokens w1 w2 w3 topk_weights topk_ids top_k * act_fn='silu' swiglu_limit=None "
        "shared_swiglu_limit=None enable_bt_scatter_overlap=True w1_shared=None w2_shared=None "
        "w3_shared=None w1_shared_scale=None w2_shared_scale=None w3_shared_scale=None "
        "quant_block_k=None w1_scale=None w2_scale=None w3_scale=None block_config=None "
        "direct_scaled_dot=False cross_expert_prefetch_mode='full' interleave_bt=True "
        "enable_act_quant=False kernel_ablation_mode='full' dp_axis_name='data' "
        "tp_axis_name='tensor'"
    ),
    "ragged_paged_attention": (
        "queries keys values kv_cache_fused kv_lens page_indices cu_q_lens cu_kv_lens distribution "
        "custom_mask attention_sink=None * causal=1 sm_scale=1.0 sliding_window=None soft_cap=None "
        "mask_value=DEFAULT_MASK_VALUE q_scale=None k_scale=None v_scale=None "
        "xai_temperature_len=None softmax_dtype=None chunk_prefill_size=None d_block_sizes=None "
        "p_block_sizes=None m_block_sizes=None vmem_limit_bytes=None out_dtype=None "
        "skip_kv_mask=False disable_semaphore_checks=True debug_mode=False "
        "mask_aligned_to_cu_kv=False"
    ),
    "mla_ragged_paged_attention": (
        "ql_nope q_pe new_kv_c new_k_pe cache_kv kv_lens page_indices cu_q_lens cu_kv_lens "
        "distribution * sm_scale=1.0 sliding_window=None soft_cap=None "
        "mask_value=DEFAULT_MASK_VALUE q_scale=None k_scale=None v_scale=None "
        "chunk_prefill_size=None num_kv_pages_per_block=None num_queries_per_block=None "
        "vmem_limit_bytes=None decode_batch_size=1 debug_mode=False"
    ),
}
TPU_INFERENCE = {
    "dense_gather_reduce": "x indices topk_weights reduce_group_size topk_wgt_zero_nan=False",
    "ragged_gather_reduce": "x indices topk_weights valid_rows_mask reduce_group_size",
    "ragged_paged_attention": (
        "queries keys values kv_cache kv_lens page_indices cu_q_lens distribution "
        "* use_causal_mask=True update_kv_cache=True skip_kv_mask=False sm_scale=1.0 "
        "sliding_window=None soft_cap=None out_dtype=None mask_value=None q_scale=None "
        "k_scale=None v_scale=None chunk_prefill_size=None d_block_sizes=None p_block_sizes=None "
        "m_block_sizes=None vmem_limit_bytes=None debug_mode=False disable_bounds_checks=True "
        "disable_semaphore_checks=True"
    ),
    "mla_ragged_paged_attention": (
        "ql_nope q_pe new_kv_c new_k_pe cache_kv kv_lens page_indices cu_q_lens distribution "
        "* sm_scale=1.0 sliding_window=None soft_cap=None mask_value=None q_scale=None "
        "k_scale=None v_scale=None chunk_prefill_size=None num_kv_pages_per_block=None "
        "num_queries_per_block=None vmem_limit_bytes=None decode_batch_size=1 mixed_q_split=1 "
        "s_dtype=jnp.bfloat16 transpose_kv_cache=False two_step_flash_attention=True "
        "p_same_dtype_as_v=True debug_mode=False"
    ),
}
# Defaults that are objects of the stacks, and what stands for them here.
OBJECTS = {
    "FUSED_CHUNK": None,  # a member of an enum that nothing reads
    "DEFAULT_MASK_VALUE": -0.7 * float(np.finfo(np.float32).max),
    "jnp.bfloat16": jnp.bfloat16,
}
FUNCTIONS = [
    (stack, name, signature)
    for stack, functions in ((sglang_jax, SGLANG_JAX), (tpu_inference, TPU_INFERENCE))
    for name, signature in functions.items()
]


def described(function):
    """A signature as the tables above write it."""
    words, keywords = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            keywords = True
            words.append("*")
        if parameter.default is parameter.empty:
            words.append(parameter.name)
        else:
            words.append(f"{parameter.name}={parameter.default!r}")
    return words


def expected(signature):
    words = [word.partition("=") for word in signature.split()]
    return [
        f"{name}={OBJECTS[value]!r}" if value in OBJECTS else f"{name}{equals}{value}"
        for name, equals, value in words
    ]


@pytest.mark.parametrize(("stack", "name", "signature"), FUNCTIONS, ids=lambda x: str(x)[:40])
def test_a_function_has_the_signature_of_the_stack(stack, name, signature):
    assert described(getattr(stack, name)) == expected(signature)


@pytest.mark.parametrize("stack", [sglang_jax, tpu_inference])
def test_every_function_is_pinned_or_allocates_a_cache(stack):
    pinned = {name for of, name, _ in FUNCTIONS if of is stack}
    assert {name for name in stack.__all__ if not name.startswith("new_")} == pinned


@pytest.mark.parametrize(
    "signature",
    [
        "q k recurrent_buffer v recurrent_indices has_initial_state * g_gamma scale=None",
        "q k v recurrent_buffer recurrent_indices has_initial_state * g_gamma scale=1.0",
        "q k v recurrent_buffer recurrent_indices has_initial_state g_gamma scale=None",
        "q k v recurrent_buffer recurrent_indices has_initial_state * g_gamma",
    ],
)
def test_another_name_order_kind_or_default_is_caught(signature):
    assert described(sglang_jax.decode_simple_gla_fused) != expected(signature)
