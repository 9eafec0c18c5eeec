"""Federated methods as pure tensor functions."""
