"""Differential privacy: the mechanism, its secret randomness, and what it costs."""
