"""Rows before a model sees them: readers and the built-in data."""
