"""The specifications: one pure-JAX module per kernel, each simple enough to be believed by reading."""
