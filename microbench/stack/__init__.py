"""Layers of a model that serves, written with the kernels: what XLA puts between them, and time."""
