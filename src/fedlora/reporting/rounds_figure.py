"""rounds.png: losses per round, and the exact match of every model.

The bar is exact match over all categories. Where a client's own categories go better or worse than that, a diamond at
the end of a thin line shows it: the length of the line is what a client alone does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedlora.plain_text import counted
from fedlora.reporting.drawing import BASE_COLOUR, FAINT, clip, experiment_colours, house_style, png_bytes, scored_rows
from fedlora.reporting.findings import Findings
from fedlora.reporting.main_table import short_label
from fedlora.reporting.summary import ModelRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CLIENT_HEIGHT = 0.62
_LABELLED_CLIENTS = 16
_LEGEND_COLUMNS = 4


def draw_rounds(findings: Findings) -> bytes:
    """Held-out and training loss per round of every experiment, and the exact match of every model."""
    with house_style():
        from matplotlib.figure import Figure

        scored = scored_rows(findings)
        extent = sum(height + gap for gap, height in _bar_sizes(scored))
        figure = Figure(figsize=(11.5, max(4.8, 1.6 + 0.42 * extent)), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.0, 1.1))
        held_out = figure.add_subplot(grid[0, 0])
        training = figure.add_subplot(grid[1, 0], sharex=held_out)
        _draw_losses(held_out, findings, "held_out", "Held-out loss")
        _draw_losses(training, findings, "training", "Training loss")
        training.set_xlabel("round")
        held_out.tick_params(labelbottom=False)
        lines = held_out.lines if len(held_out.lines) > len(training.lines) else training.lines
        figure.legend(handles=list(lines), loc="outside lower left", ncols=_LEGEND_COLUMNS)
        _draw_bars(figure.add_subplot(grid[:, 1]), findings, scored)
        return png_bytes(figure)


def _draw_losses(axes: Axes, findings: Findings, kind: str, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    colours = experiment_colours(findings)
    for name, curve in findings.curves.items():
        if points := curve[kind]:
            rounds, losses = zip(*points, strict=True)
            marker = "o" if len(points) <= 30 else ""
            label = clip(findings.titles[name])
            axes.plot(rounds, losses, color=colours[name], linewidth=2, marker=marker, markersize=5, label=label)
    axes.set_title(title, loc="left")
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", linewidth=0.8)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color=FAINT)
        axes.set_yticks([])


def _draw_bars(axes: Axes, findings: Findings, rows: Sequence[ModelRow]) -> None:
    axes.set_title("Exact match", loc="left")
    if not rows:
        axes.text(0.5, 0.5, "not scored", ha="center", va="center", transform=axes.transAxes, color=FAINT)
        axes.set_axis_off()
        return
    colours = experiment_colours(findings)
    labels: list[tuple[float, str]] = []
    named = _named_bars(rows)
    edge = 0.0
    for row, (gap, height) in zip(rows, _bar_sizes(rows), strict=True):
        centre, edge = edge + gap + height / 2, edge + gap + height
        colour = BASE_COLOUR if row.subject == "base" else colours[row.experiment]
        _draw_bar(axes, row, centre, height, colour)
        if id(row) in named:
            labels.append((centre, named[id(row)]))
    axes.set_yticks([centre for centre, _ in labels], [label for _, label in labels])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(edge + 0.3, 0.0)
    axes.set_xlim(0, 1.08)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="x", linewidth=0.8)
    axes.set_xlabel("share of answers that are right")
    _explain_bars(axes)


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


def _named_bars(rows: Sequence[ModelRow]) -> dict[int, str]:
    """Labels by the id of their row; of many clients the one in the middle stands for all."""
    clients: dict[str, list[ModelRow]] = {}
    for row in rows:
        if row.subject == "client":
            clients.setdefault(row.experiment, []).append(row)
    if sum(map(len, clients.values())) <= _LABELLED_CLIENTS:
        return {id(row): clip(short_label(row)) for row in rows}
    others = {id(row): clip(short_label(row)) for row in rows if row.subject != "client"}
    return others | {
        id(group[len(group) // 2]): f"each of {counted(len(group), 'client')}" for group in clients.values()
    }


def _draw_bar(axes: Axes, row: ModelRow, centre: float, height: float, colour: str) -> None:
    """All categories as the bar; the own ones, where they differ, as a diamond at the end of a thin line."""
    share = row.all or 0.0
    is_client = row.subject == "client"
    axes.barh(centre, share, height * 0.86 if is_client else height, color=colour, alpha=0.45 if is_client else 1.0)
    if not is_client:
        axes.text(share + 0.02, centre, f"{share:.2f}", va="center", fontsize=9, fontweight="bold", zorder=4,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
    if row.own is not None and abs(row.own - share) >= 0.005:
        axes.plot([share, row.own], [centre, centre], color=colour, linewidth=1, zorder=2)
        axes.plot(row.own, centre, "D", markersize=5, color=colour, clip_on=False, zorder=3)


def _explain_bars(axes: Axes) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bar = Patch(color=FAINT, label="all categories")
    diamond = Line2D([], [], color=FAINT, linewidth=1, marker="D", markersize=5, label="own categories")
    axes.legend(
        handles=[bar, diamond],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=2,
        borderaxespad=0.2,
        handlelength=1.4,
    )
