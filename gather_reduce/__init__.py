"""Weighted row gather and sum on the SparseCore, dense and ragged. Not written yet."""
