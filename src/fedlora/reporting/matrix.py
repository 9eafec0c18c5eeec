"""A matrix as a picture: a row for each model, a column for each category or client, and every number readable."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedlora.reporting.drawing import add_legend, house_style, name_columns, new_figure, png_bytes
from fedlora.reporting.palette import FRAME, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_MOST_WIDE, _MOST_HIGH = 26.0, 40.0
"""Inches, without labels."""
_READABLE = 0.36
"""Inches of a column that a number needs."""


@dataclass(frozen=True)
class Matrix:
    """Values of rows by columns, NaN where nothing was measured; an empty row name is no label.

    `unit` is what the values are; `frames` are the (row, column) of marked cells, and `frame_meaning` says of what.
    """

    title: str
    unit: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    limits: tuple[float, float]
    colours: str
    form: str
    frames: Collection[tuple[int, int]] = ()
    frame_meaning: str = ""


def draw_matrix(matrix: Matrix) -> bytes:
    """The matrix as PNG, at a size at which its numbers are readable, up to 40 inches."""
    with house_style():
        from matplotlib.patches import Patch, Rectangle

        wide = min(0.62, _MOST_WIDE / len(matrix.columns))
        high = min(0.34, _MOST_HIGH / len(matrix.rows))
        size = wide * len(matrix.columns), high * len(matrix.rows)
        figure = new_figure(max(6.0, size[0] + 4.2), max(3.0, size[1] + 2.0))
        axes = figure.add_subplot()
        low, most = matrix.limits
        image = axes.imshow(matrix.values, cmap=matrix.colours, vmin=low, vmax=most, aspect="auto")
        figure.suptitle(matrix.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        named = [(place, name) for place, name in enumerate(matrix.rows) if name]
        fitting = min(10.0, high * 72 / 1.3)
        axes.set_yticks([place for place, _ in named], [name for _, name in named], fontsize=max(4.0, fitting))
        name_columns(figure, axes, matrix.columns, wide)
        axes.set_xticks([place - 0.5 for place in range(1, len(matrix.columns))], minor=True)
        axes.set_yticks([place - 0.5 for place in range(1, len(matrix.rows))], minor=True)
        axes.grid(which="minor", color="white", linewidth=min(1.5, 4 * high))
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        if wide >= _READABLE and high >= 0.15:
            _write_values(axes, image, matrix, min(9.0, fitting))
        for row, column in sorted(matrix.frames):
            corner = (column - 0.45, row - 0.42)
            axes.add_patch(Rectangle(corner, 0.9, 0.84, fill=False, edgecolor=FRAME, linewidth=min(1.8, 6 * high)))
        high_bar = min(5.0, size[1])
        bar = figure.colorbar(
            image, ax=axes, pad=0.015, shrink=high_bar / size[1], aspect=high_bar / 0.18, anchor=(0.0, 1.0)
        )
        bar.set_label(matrix.unit)
        bar.ax.spines[:].set_visible(False)
        if matrix.frames:
            add_legend(figure, [Patch(fill=False, edgecolor=FRAME, linewidth=1.8, label=matrix.frame_meaning)])
        return png_bytes(figure)


def _write_values(axes: Axes, image: AxesImage, matrix: Matrix, size: float) -> None:
    colours = image.to_rgba(np.array(matrix.values, dtype=float))
    for row, line in enumerate(matrix.values):
        for column, value in enumerate(line):
            known = math.isfinite(value)
            text = format(value, matrix.form) if known else "–"
            dark = known and _luminance(colours[row, column].tolist()) < 0.3
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if dark else INK)


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour of shares, in 0..1."""
    red, green, blue = (((one + 0.055) / 1.055) ** 2.4 if one > 0.04045 else one / 12.92 for one in colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
