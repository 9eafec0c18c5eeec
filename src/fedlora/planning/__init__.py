"""Forecast a run before it is trained."""
