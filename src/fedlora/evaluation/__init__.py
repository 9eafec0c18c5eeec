"""Scores and verdicts over predictions."""
