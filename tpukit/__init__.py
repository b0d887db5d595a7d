"""The TPU as this library knows it.

`chips` holds the machine's figures, `errors` and `checks` the way bad calls are refused, `tuning`
the block-size tables, `aot` compiling for a chip that is not present and reading what the compiler
made, `interpret` running kernels strictly on a CPU, `buffers` multi-buffering.

Nothing is imported here, so that a module costs only what it needs.
"""
