"""Expert-parallel mixture-of-experts layer in one Pallas kernel. Not written yet."""
