"""Predictions against times that others have published."""
