"""rounds.png: losses per round, and the exact match of every model.

The bar is exact match over all categories. Where a client's own categories go better or worse than that, a diamond at
the end of a thin line shows it: the length of the line is what a client alone does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedlora.reporting.drawing import add_legend, clip, house_style, new_figure, png_bytes, say_nothing_measured
from fedlora.reporting.findings import Findings
from fedlora.reporting.marks import draw_line, legend_lines, looks_of, whole_rounds
from fedlora.reporting.model_labels import experiment_labels, scored_rows, visible_labels
from fedlora.reporting.palette import FAINT, colour_of
from fedlora.reporting.summary import ModelRow

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_DIAMOND: dict[str, Any] = {"marker": "D", "markersize": 6, "markeredgecolor": "white"}
"""White around it, so that it is seen on a bar of its colour too."""
_CLIENT_HEIGHT = 0.62
_LABELLED_CLIENTS = 64
_LEAST_HEIGHT, _LOSSES_HEIGHT = 5.6, 8.0
"""Inches of the figure, and of both panels of losses together at most."""


def draw_rounds(findings: Findings) -> bytes:
    """Held-out and training loss per round of every experiment, and the exact match of every model."""
    with house_style():
        scored = scored_rows(findings)
        extent = sum(height + gap for gap, height in _bar_sizes(scored))
        high = max(_LEAST_HEIGHT, 1.2 + 0.34 * extent)
        figure = new_figure(12.5, high)
        # the panels of losses do not grow with the number of bars beside them
        rest = [2 * high / _LOSSES_HEIGHT - 2] if high > _LOSSES_HEIGHT else []
        ratios = [1.0, 1.0, *rest]
        grid = figure.add_gridspec(len(ratios), 2, width_ratios=(1.0, 1.1), height_ratios=ratios)
        held_out, training = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
        _draw_losses(held_out, findings, ("held_out", "held_out_personal"), "Held-out loss")
        _draw_losses(training, findings, ("training",), "Training loss")
        bars = figure.add_subplot(grid[:, 1])
        _draw_bars(bars, findings, scored)
        add_legend(figure, [*legend_lines(held_out, training), *(_explain_bars() if scored else ())])
        return png_bytes(figure)


def _draw_losses(axes: Axes, findings: Findings, kinds: Sequence[str], title: str) -> None:
    looks = looks_of({name: (findings.runs[name]["mode"], False) for name in findings.curves})
    labels = experiment_labels(findings)
    for name, curves in findings.curves.items():
        for kind in kinds:
            if points := curves.get(kind):
                personal = kind == "held_out_personal"
                label = f"{clip(findings.titles[name])} (personal)" if personal else labels[name]
                draw_line(axes, points, replace(looks[name], hollow=personal), label)
    axes.set_title(title, loc="left")
    if not axes.lines:
        say_nothing_measured(axes)
        return
    axes.set_xlabel("round")
    axes.set_ylabel("nats per token")
    axes.margins(y=0.08)
    axes.grid(axis="y", linewidth=0.8)
    curves = (curve for every in findings.curves.values() for curve in every.values())
    whole_rounds(axes, (number for curve in curves for number, _ in curve))


def _draw_bars(axes: Axes, findings: Findings, rows: Sequence[ModelRow]) -> None:
    axes.set_title("Exact match", loc="left")
    if not rows:
        say_nothing_measured(axes, "not scored")
        return
    labels: list[tuple[float, str]] = []
    named = visible_labels(rows, _LABELLED_CLIENTS)
    edge = 0.0
    for row, (gap, height) in zip(rows, _bar_sizes(rows), strict=True):
        centre, edge = edge + gap + height / 2, edge + gap + height
        _draw_bar(axes, row, centre, height, colour_of(row.mode))
        if id(row) in named:
            labels.append((centre, named[id(row)]))
    axes.set_yticks([centre for centre, _ in labels], [label for _, label in labels])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(edge + 0.3, 0.0)
    axes.set_xlim(-0.02, 1.14)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="x", linewidth=0.8)
    axes.set_xlabel("share of answers that are right")


def _bar_sizes(rows: Sequence[ModelRow]) -> list[tuple[float, float]]:
    """(gap before, height) of each bar: the clients of one experiment close together, everything else apart."""
    clients = sum(row.subject == "client" for row in rows)
    client_height = _CLIENT_HEIGHT * min(1.0, _LABELLED_CLIENTS / max(clients, 1))
    sizes = []
    after_client = False
    for row in rows:
        is_client = row.subject == "client"
        sizes.append((0.0 if is_client and after_client else 0.3, client_height if is_client else 0.8))
        after_client = is_client
    return sizes


def _draw_bar(axes: Axes, row: ModelRow, centre: float, height: float, colour: str) -> None:
    """All categories as the bar; the own ones, where they differ, as a diamond at the end of a thin line."""
    share = row.all or 0.0
    is_client = row.subject == "client"
    axes.barh(centre, share, height * 0.86 if is_client else height, color=colour, alpha=0.45 if is_client else 1.0)
    # in a column of their own, where no bar and no diamond is
    if height >= 0.4:
        weight = "normal" if is_client else "bold"
        axes.text(1.13, centre, f"{share:.2f}", ha="right", va="center", fontsize=9, fontweight=weight)
    if row.own is not None and abs(row.own - share) >= 0.005:
        axes.plot([share, row.own], [centre, centre], color=colour, linewidth=1, zorder=2)
        axes.plot(row.own, centre, color=colour, zorder=3, **_DIAMOND)


def _explain_bars() -> list[Artist]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bar = Patch(color=FAINT, label="exact match, all categories")
    return [bar, Line2D([], [], color=FAINT, linewidth=1, label="exact match, own categories", **_DIAMOND)]
