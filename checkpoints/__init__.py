"""Checkpoints in the published layout: reading, naming, loading, quantizing, writing."""
