"""A table in Markdown, for trackers that show text."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Heads and rows; what would end a cell or a line is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
