"""drift.png: aggregation error and client drift per round of every experiment that has them.

The error has a logarithmic axis, for exact methods stand seven orders of magnitude below the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.reporting.drawing import FAINT, clip, experiment_colours, house_style, png_bytes
from fedlora.reporting.findings import Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEGEND_COLUMNS = 4


def draw_drift(findings: Findings) -> bytes:
    """Aggregation error on the left, the mean cosine of a client's change to the mean change on the right."""
    with house_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11.5, 4.2), layout="constrained")
        error, cosine = figure.subplots(1, 2)
        _draw_lines(error, findings, "aggregation_error", "Aggregation error")
        _draw_lines(cosine, findings, "drift_cosine_mean", "Cosine of a client's change to the mean")
        if error.lines:
            error.set_yscale("log")
        if cosine.lines:
            cosine.set_ylim(top=1.02)
        lines = error.lines if len(error.lines) > len(cosine.lines) else cosine.lines
        figure.legend(handles=list(lines), loc="outside lower left", ncols=_LEGEND_COLUMNS)
        return png_bytes(figure)


def _draw_lines(axes: Axes, findings: Findings, kind: str, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    colours = experiment_colours(findings)
    for name, curves in findings.drift.items():
        # an error of exactly zero has no place on a logarithmic axis
        points = [(number, value) for number, value in curves[kind] if value > 0 or kind != "aggregation_error"]
        if points:
            rounds, values = zip(*points, strict=True)
            marker = "o" if len(points) <= 30 else ""
            label = clip(findings.titles[name])
            axes.plot(rounds, values, color=colours[name], linewidth=2, marker=marker, markersize=5, label=label)
    axes.set_title(title, loc="left")
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", linewidth=0.8)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color=FAINT)
        axes.set_yticks([])
