"""How a method looks in every picture and on every page: its colour, the dash of its line and its marker.

The style follows from the method's name alone, never from what else is drawn, so a method looks the same everywhere.
There are fewer colours than methods: methods of one colour differ in dash and marker. The first four colours are those
of Okabe and Ito. All are readable on white and on dark pages (contrast of 3 or more), and differ for readers with
protanopia, deuteranopia and tritanopia; `tests/reporting/test_palette.py` computes both.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

from fedlora.methods.table import METHODS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8440FF", "#2B95FF", "#DD2253")
BASE_COLOUR = "#808080"
"""The base model, which no method trained."""
INK = "#333333"
"""Text on a white page, and the mean over clients where clients are lines."""
FAINT = "#767676"
"""Axes, and what belongs to no method."""
FRAME = "#B45F06"
"""The frame around what a client was trained on."""

Marker = Literal["circle", "square", "triangle", "diamond", "triangle down", "plus", "cross"]
_MARKERS: tuple[Marker, ...] = ("circle", "square", "triangle", "diamond", "triangle down", "plus", "cross")
_DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (4.0, 1.5),
    (1.0, 1.2),
    (6.0, 1.5, 1.0, 1.5),
    (3.0, 1.0, 1.0, 1.0, 1.0, 1.0),
)
_OUTSIDE = 5
"""The first marker of methods from outside: those of the table have the ones before it."""


@dataclass(frozen=True)
class Style:
    """`colour` as #rrggbb; `dash` as lengths of ink and gap in widths of the line, empty for a solid one."""

    colour: str
    dash: tuple[float, ...]
    marker: Marker


def style_of(method: str, variant: int = 0) -> Style:
    """The style of a method by its recorded name (`federation_mode`), or of `base`.

    `variant` numbers several lines of one method in one picture (runs of one method): they share its colour and
    marker and differ in dash.
    """
    if method == "base":
        return Style(BASE_COLOUR, (1.0, 1.2), "circle")
    colour, marker = _place_of(method)
    return Style(COLOURS[colour], _DASHES[(marker + variant) % len(_DASHES)], _MARKERS[marker])


def colour_of(method: str) -> str:
    """The colour of a method, or of `base`, as #rrggbb."""
    return style_of(method).colour


def client_style(index: int) -> Style:
    """The style of the client at this place of a list, for pictures whose lines are clients and not methods."""
    marker = index // len(COLOURS)
    return Style(COLOURS[index % len(COLOURS)], _DASHES[marker % len(_DASHES)], _MARKERS[marker % len(_MARKERS)])


def _place_of(method: str) -> tuple[int, int]:
    """Places of its colour and marker: by the order of the table, or by a hash of the name of a method from outside."""
    if method in METHODS:
        place = list(METHODS).index(method)
        return place % len(COLOURS), place // len(COLOURS)
    # the file's folder differs from machine to machine
    drawn = zlib.crc32(method.rpartition("/")[2].encode())
    return drawn % len(COLOURS), _OUTSIDE + drawn // len(COLOURS) % (len(_MARKERS) - _OUTSIDE)
