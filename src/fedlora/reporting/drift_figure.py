"""drift.png: aggregation error and client drift per round of every experiment that has them.

The error has a logarithmic axis where exact methods are among the others, for they stand seven orders of magnitude
below them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedlora.reporting.drawing import add_legend, house_style, new_figure, png_bytes, say_nothing_measured
from fedlora.reporting.findings import Findings
from fedlora.reporting.marks import draw_line, legend_lines, looks_of, set_decades, whole_rounds
from fedlora.reporting.model_labels import experiment_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_drift(findings: Findings) -> bytes:
    """Aggregation error on the left, the mean cosine of a client's change to the mean change on the right."""
    with house_style():
        figure = new_figure(11.5, 4.2)
        error, cosine = figure.subplots(1, 2)
        place = set_decades(error, "y", (value for _, value in _points(findings, "aggregation_error")))
        _draw_lines(error, findings, "aggregation_error", place)
        error.set_title("Aggregation error", loc="left")
        error.set_ylabel("distance / length of the exact mean")
        _draw_lines(cosine, findings, "drift_cosine_mean", float)
        cosine.set_title("Cosine of a client's change to the mean change", loc="left")
        cosine.set_ylabel("cosine (1: the same direction)")
        cosine.margins(y=0.08)
        add_legend(figure, legend_lines(error, cosine))
        return png_bytes(figure)


def _points(findings: Findings, kind: str) -> list[tuple[int, float]]:
    return [point for curves in findings.drift.values() for point in curves[kind]]


def _draw_lines(axes: Axes, findings: Findings, kind: str, place: Callable[[float], float]) -> None:
    looks = looks_of({name: (findings.runs[name]["mode"], False) for name in findings.curves})
    labels = experiment_labels(findings)
    for name, curves in findings.drift.items():
        if points := [(number, place(value)) for number, value in curves[kind]]:
            draw_line(axes, points, looks[name], labels[name])
    axes.grid(axis="y", linewidth=0.8)
    if not axes.lines:
        say_nothing_measured(axes)
        return
    axes.set_xlabel("round")
    whole_rounds(axes, (number for number, _ in _points(findings, kind)))
