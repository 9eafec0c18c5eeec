"""What a page is made of, before it is HTML: sections of tables, charts, lists and answers.

Every text here may come from data or models; the template escapes all of it, and no block holds markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedlora.plain_text import NOTHING
from fedlora.reporting.page.markers import marker_path
from fedlora.reporting.palette import Marker, Style


@dataclass(frozen=True)
class Mark:
    """A value and its interval as a line beside the number; all places are per cent of the column's width."""

    low: float
    value: float
    high: float
    zero: float | None = None
    """Where 0 lies, in a column of differences."""
    series: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, what it sorts by, and how it looks."""

    text: str
    value: float | None = None
    """What it sorts by; None where the text does."""
    mark: Mark | None = None
    shade: str = ""
    """Class of the background: `q0` to `q10`, or `d-5` to `d5`."""
    is_strong: bool = False
    below: str = ""
    """A second line, smaller: the interval of a mean."""
    note: str = ""
    """What a look says and a screen reader would miss."""
    series: str = ""
    """Class of the colour of the swatch before the text."""


@dataclass(frozen=True)
class Table:
    """Rows under heads; the first cell of a row is its head. `caption` says what the table shows."""

    kind: ClassVar[str] = "table"
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    is_sortable: bool = False
    is_matrix: bool = False
    details: frozenset[int] = frozenset()
    """Places of rows that are folded away where they are many: those of single clients."""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, and stand to the right."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.heads)
        return [
            any(cell.value is not None for cell in column)
            and all(cell.value is not None or cell.text == NOTHING for cell in column)
            for column in columns
        ]


@dataclass(frozen=True)
class Series:
    """Points of one name under the class of its look. `marker` is the form of a point, `swatch` that of its key."""

    label: str
    look: str
    marker: Marker
    points: Sequence[tuple[float, float]] = ()

    @property
    def swatch(self) -> str:
        return marker_path(self.marker, 14, 5)


@dataclass(frozen=True)
class Line:
    """A series in a chart's units: its line and its points as SVG paths."""

    series: Series
    path: str
    points: str


@dataclass(frozen=True)
class Chart:
    """Lines over rounds or steps, with what the pointer shows and the same numbers as a table."""

    title: str
    unit: str
    across: str
    """What the horizontal axis counts."""
    size: tuple[int, int]
    frame: tuple[float, float, float, float]
    """Left, top, right and bottom of the plot."""
    across_ticks: Sequence[tuple[float, str]]
    up_ticks: Sequence[tuple[float, str]]
    lines: Sequence[Line]
    hover: Mapping[str, Any]
    numbers: Table


@dataclass(frozen=True)
class Charts:
    """Charts side by side that share a legend."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]
    legend: Sequence[Series]


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    kind: ClassVar[str] = "items"
    items: Sequence[str]


@dataclass(frozen=True)
class Terms:
    """What words mean: (word, meaning)."""

    kind: ClassVar[str] = "terms"
    terms: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Commands:
    """Commands to paste, under what they are for."""

    kind: ClassVar[str] = "commands"
    title: str
    commands: Sequence[str]


@dataclass(frozen=True)
class Texts:
    """Answers side by side, as JSON values: `models`, `rows`, and what was left out."""

    kind: ClassVar[str] = "texts"
    content: Mapping[str, Any]


Block = Table | Charts | Items | Terms | Commands | Texts


@dataclass(frozen=True)
class Section:
    """A heading with its paragraphs and blocks; `name` is its anchor."""

    name: str
    title: str
    intro: Sequence[str] = ()
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Page:
    """The whole page. `answer` are the sentences on top, `figures` the numbers beside them: (number, what it is)."""

    kind: str
    title: str
    facts: Sequence[str]
    answer: Sequence[str]
    figures: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    sections: Sequence[Section]
    styles: Sequence[Style] = ()
    """Those of the classes `s0`, `s1`, ..."""
