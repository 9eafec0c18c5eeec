"""Texts and tables that are written for Markdown, for a page that has its own marks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedlora.reporting.page.blocks import Cell, Table

MOST_LETTERS = 160
"""Of a sentence that may name many models."""
_NUMBER = re.compile(r"[+-]?[\d,]+(\.\d+)?(e[+-]?\d+)?")


def text_table(
    caption: str, table: tuple[Sequence[str], Sequence[Sequence[str]]], *, is_sortable: bool = False
) -> Table:
    """A table of heads and rows of text; a cell that begins with a number sorts by it."""
    heads, rows = table
    return Table(caption, heads, [[Cell(text, read_number(text)) for text in row] for row in rows], is_sortable)


def shorten(text: str) -> str:
    """A sentence of at most MOST_LETTERS, cut at a word."""
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS].rpartition(' ')[0]} \u2026"


def read_number(text: str) -> float | None:
    """The number that a cell begins with, such as that of `0.9 [0.8, 1.0]`; None where it is none."""
    found = _NUMBER.match(text)
    rest = text[found.end() :] if found else text
    return float(found[0].replace(",", "")) if found and (not rest or rest.startswith((" [", " (", "%"))) else None


def unmarked(text: str) -> list[str]:
    """Paragraphs without marks for bold text and code."""
    return [re.sub(r"\*\*|`", "", " ".join(part.split())) for part in text.split("\n\n")]


def read_terms(text: str) -> list[tuple[str, str]]:
    """(word, meaning) of a list of `- **word**: meaning`."""
    parts = re.split(r"^- \*\*(.+?)\*\*: ", text, flags=re.MULTILINE)[1:]
    return [(word, unmarked(meaning)[0]) for word, meaning in zip(parts[::2], parts[1::2], strict=True)]
