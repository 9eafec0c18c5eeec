"""clients.png: exact match of every model per category, as a map.

Its diagonal is what the clients of `none` learned, the rest of their columns what they never saw or forgot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedlora.reporting.drawing import FAINT, INK, clip, house_style, png_bytes, scored_rows
from fedlora.reporting.findings import Findings
from fedlora.reporting.main_table import short_label
from fedlora.reporting.summary import ModelRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FRAME = "#D55E00"
_NUMBERED_COLUMNS = 48
_DARK_SHARE = 0.55


def draw_categories(findings: Findings) -> bytes:
    """Exact match of every scored model (columns) per test category (rows); a frame marks what a client trained on."""
    with house_style():
        from matplotlib.figure import Figure

        rows, categories = scored_rows(findings), findings.categories
        size = min(24.0, max(6.4, 2.6 + 0.68 * len(rows))), max(3.2, 2.0 + 0.44 * len(categories))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        shares = [[row.categories.get(category, float("nan")) for row in rows] for category in categories]
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_title("Exact match per category", loc="left", pad=26)
        axes.set_title("framed: what that client was trained on", loc="right", pad=26, fontsize=9, fontweight="normal")
        axes.set_yticks(range(len(categories)), [clip(category or "(no category)") for category in categories])
        slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        small: dict[str, Any] = {"rotation": 90, "fontsize": 6}
        labels = [_column_label(row) for row in rows]
        axes.set_xticks(range(len(rows)), labels, **(slanted if len(rows) <= _NUMBERED_COLUMNS else small))
        axes.set_xticks([place - 0.5 for place in range(1, len(rows))], minor=True)
        axes.set_yticks([place - 0.5 for place in range(1, len(categories))], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        _write_shares(axes, rows, categories)
        _bracket_clients(figure, axes, findings, rows)
        bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04, ticks=[0, 0.5, 1])
        bar.ax.spines[:].set_visible(False)
        return png_bytes(figure)


def _write_shares(axes: Axes, rows: Sequence[ModelRow], categories: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    for column, row in enumerate(rows):
        for line, category in enumerate(categories):
            share = row.categories.get(category)
            if share is not None and len(rows) <= _NUMBERED_COLUMNS:
                colour = "white" if share > _DARK_SHARE else INK
                axes.text(column, line, f"{share:.2f}", ha="center", va="center", fontsize=9, color=colour)
            if category in row.own_categories:
                corner = (column - 0.45, line - 0.43)
                axes.add_patch(Rectangle(corner, 0.9, 0.86, fill=False, edgecolor=_FRAME, linewidth=1.8))


def _bracket_clients(figure: Figure, axes: Axes, findings: Findings, rows: Sequence[ModelRow]) -> None:
    """A line with the experiment's name above the columns of its clients and their mean."""
    from matplotlib.transforms import ScaledTranslation

    above = axes.get_xaxis_transform() + ScaledTranslation(0, 6 / 72, figure.dpi_scale_trans)
    for name, title in findings.titles.items():
        columns = [at for at, row in enumerate(rows) if row.experiment == name and row.subject in ("client", "mean")]
        if columns:
            ends = (columns[0] - 0.45, columns[-1] + 0.45)
            axes.plot(ends, (1, 1), color=FAINT, linewidth=1.2, clip_on=False, solid_capstyle="butt", transform=above)
            text = f"{clip(title)}: each client alone"
            style = {"ha": "center", "va": "bottom", "fontsize": 9, "color": INK}
            axes.annotate(text, (sum(ends) / 2, 1), (0, 9), axes.get_xaxis_transform(), "offset points", **style)
    # the lines above must not stretch the axes
    axes.set_xlim(-0.5, len(rows) - 0.5)


def _column_label(row: ModelRow) -> str:
    """Clients and means stand under the name of their experiment, so theirs can be short."""
    if row.subject == "client":
        return clip(row.client_name)
    return "mean" if row.subject == "mean" else clip(short_label(row))
