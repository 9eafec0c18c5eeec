"""Adapters for other programs: found, written in their formats, described."""
