"""Quantised checkpoints read as if they were not: one file for each format, and a view that decodes one tensor at a time."""
