"""Tables and numbers as plain text: for a terminal, a log, a message.

A number that was not measured is shown as `-`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Self

from fedlora.console import printable

NOTHING = "-"


class Table(str):
    """A table as text that still knows its cells, for those who show it in another form."""

    def __new__(cls, text: str, heads: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int]) -> Self:
        return super().__new__(cls, text)

    def __init__(self, text: str, heads: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int]) -> None:
        self.heads = heads
        self.rows = rows
        self.left = left


def table_text(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    rules: Collection[int] = (0,),
) -> Table:
    """Aligned columns under their names: the columns `left` to the left, the others to the right.

    A line of dashes stands before each of the rows `rules`.
    """
    lines = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = []
    for number, line in enumerate(lines):
        if number - 1 in rules:
            shown.append("  ".join("-" * width for width in widths))
        cells = zip(line, widths, strict=True)
        shown.append("  ".join(_align(cell, width, index in left) for index, (cell, width) in enumerate(cells)))
    return Table("\n".join(line.rstrip() for line in shown), heads, rows, left)


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 file`, `2 files`, `1,400 rows`; `plural` where it is more than an s."""
    regular = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural or regular}"


def number_text(value: float | None, digits: int = 3) -> str:
    """A share or a loss; `-` when it was not measured."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def one_line(text: str) -> str:
    """`text` without line breaks, control characters escaped."""
    return " ".join(printable(text).split())


def size_text(num_bytes: float) -> str:
    """Bytes as `12 B`, `3.4 kB`, `5.6 MB` or `7.8 GB`, in thousands."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    for unit in ("kB", "MB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} GB"


def _align(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def natural_key(text: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts runs of digits as numbers, so that 2 is before 10; the text itself breaks ties, so the order is total."""
    pieces = re.split(r"(\d+)", text)
    # Python makes no number of thousands of digits
    return [(int(piece), "") if piece.isdecimal() and len(piece) < 100 else (-1, piece) for piece in pieces], text
