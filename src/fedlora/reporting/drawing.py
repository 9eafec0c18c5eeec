"""What all pictures share: their look, their fonts, and how they become bytes.

Drawn without pyplot and from matplotlib's own defaults, so that neither a user's style file nor other plots of the
process change them; on one machine equal findings give equal bytes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.console import say
from fedlora.plain_text import one_line
from fedlora.reporting.palette import FAINT, INK

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

_MAX_LABEL = 30
_LEGEND_LINE = 0.21
"""Inches."""

_BUNDLED_FONT = "DejaVu Sans"
_MORE_FONTS = (
    *(
        "Noto Sans CJK SC",
        "Noto Sans CJK JP",
        "Noto Sans CJK TC",
        "Noto Sans CJK KR",
        "Noto Sans SC",
        "Source Han Sans SC",
    ),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Heiti TC"),
    *("Microsoft YaHei", "SimHei", "SimSun", "Yu Gothic", "MS Gothic", "Malgun Gothic", "IPAGothic", "NanumGothic"),
    *("Arial Unicode MS", "Unifont", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai"),
)
"""Fonts of systems with characters that the bundled one lacks, in the order in which they are tried."""

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    # a dollar sign in a name is a dollar sign; so matplotlib's labels of logarithmic axes, which are formulas, are
    # replaced by `set_decades`
    "text.parse_math": False,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 150,
}


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Everything drawn and saved inside looks alike, whatever the user's own style is."""
    matplotlib = _import_matplotlib()
    with matplotlib.rc_context(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "font.family": _find_fonts()})
        # it would report that a font of another script has no bold
        logging.getLogger("matplotlib.font_manager").addFilter(_drop)
        try:
            yield
        finally:
            logging.getLogger("matplotlib.font_manager").removeFilter(_drop)
    for warning in caught:
        if "missing from font" in str(warning.message):
            _say_missing()
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _drop(record: logging.LogRecord) -> bool:
    return False


def _import_matplotlib() -> Any:
    """matplotlib, also where the environment names a backend that is not installed, as that of a notebook may be for a
    command started there: nothing here needs a backend."""
    if (loaded := sys.modules.get("matplotlib")) is not None:
        return loaded
    named = os.environ.pop("MPLBACKEND", "")
    try:
        import matplotlib
    finally:
        if named:
            os.environ["MPLBACKEND"] = named
    with contextlib.suppress(ValueError):
        if named:
            matplotlib.rcParams["backend"] = named
    return matplotlib


def _find_fonts() -> list[str]:
    """The fonts in which every character is looked for, one after another."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [_BUNDLED_FONT, *(name for name in _MORE_FONTS if name in installed)]


@functools.cache
def _say_missing() -> None:
    """Said once in a process."""
    say(
        "some labels of the pictures show boxes: no known font of this machine has their characters. The tables have "
        "these names in full; a font such as Noto Sans CJK brings them into the pictures"
    )


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, whose parts can be measured before it is saved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """`figure` as PNG; no version number in it, so that equal pictures are equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def clip(text: str, width: int = _MAX_LABEL) -> str:
    """A name from data or users as a label: one line of at most `width` columns, a Chinese character counting for two.

    The middle is left out, for long names often differ at their ends.
    """
    line = one_line(text)
    if _columns(line) <= width:
        return line
    end = (width - 1) // 2
    return f"{_cut(line, width - 1 - end)}\u2026{_cut(line[::-1], end)[::-1]}"


def _cut(line: str, width: int) -> str:
    line = line[:width]
    while _columns(line) > width:
        line = line[:-1]
    return line


def _columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


def add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend below everything, in as many columns as fit; the figure grows by its height."""
    if not handles:
        return
    columns = len(handles)
    while True:
        legend = figure.legend(handles=list(handles), loc="outside lower left", ncols=columns)
        if columns == 1 or _size_of(figure, legend)[0] <= figure.get_figwidth() - 0.3:
            break
        legend.remove()
        columns -= 1
    lines = math.ceil(len(handles) / columns)
    figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + lines * _LEGEND_LINE)


def name_columns(figure: Figure, axes: Axes, labels: Sequence[str], width: float) -> None:
    """Labels below columns that are `width` inches wide: upright where they fit side by side, else slanted."""
    axes.set_xticks(range(len(labels)), labels)
    texts = axes.get_xticklabels()
    if all(_size_of(figure, text)[0] < 0.9 * width for text in texts):
        return
    # slanted lines of text lie sin 40 of a column apart
    size = min(10.0, width * math.sin(math.radians(40)) * 72 / 1.4)
    for text in texts:
        text.set(rotation=40, ha="right", rotation_mode="anchor", fontsize=size)


def say_nothing_measured(axes: Axes, what: str = "not measured") -> None:
    """Say in the middle of empty axes why they are empty."""
    axes.text(0.5, 0.5, what, ha="center", va="center", transform=axes.transAxes, color=FAINT)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _size_of(figure: Figure, part: Artist | Text) -> tuple[float, float]:
    """Width and height in inches, before the layout is made."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    box = part.get_window_extent(canvas.get_renderer())
    return box.width / figure.dpi, box.height / figure.dpi
