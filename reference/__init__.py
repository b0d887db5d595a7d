"""The specifications: a pure-JAX module per kernel, simple enough to be believed by reading."""
