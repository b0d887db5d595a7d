"""Paged attention over ragged batches: GQA, MQA and MLA. Not written yet."""
