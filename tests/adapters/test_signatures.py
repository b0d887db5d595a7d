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
}
TPU_INFERENCE = {
    "dense_gather_reduce": "x indices topk_weights reduce_group_size topk_wgt_zero_nan=False",
    "ragged_gather_reduce": "x indices topk_weights valid_rows_mask reduce_group_size",
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
