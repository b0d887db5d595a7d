"""The functions of serving stacks, by their names and arguments, on the kernels of this library.

`adapters.sglang_jax` and `adapters.tpu_inference`: in a stack, the import of a kernel is the one
line that changes. What is mapped, ignored and refused: `docs/adapters.md`.
"""
