"""The pictures of a comparison: scores, loss against bytes, who gains, and what is forgotten on the way.

Each is drawn only where there is something to draw, under the names of the tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.methods.row import Method
from fedlora.methods.table import ALONE, METHODS
from fedlora.plain_text import counted
from fedlora.reporting.drawing import add_legend, clip, house_style, new_figure, png_bytes
from fedlora.reporting.marks import Look, draw_line, legend_lines, looks_of, set_decades
from fedlora.reporting.matrix import Matrix, draw_matrix
from fedlora.reporting.palette import FAINT, INK, client_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Result = Mapping[str, Any]

_MOST_CLIENTS = 12
"""Clients that have lines of their own colours."""
_MOST_PANELS = 3
"""Panels side by side."""
_LOSS = "nats per token"
_MEAN_BAR: dict[str, Any] = {"marker": "|", "markersize": 15, "markeredgewidth": 2, "linestyle": ""}
_SEED_POINTS: dict[str, Any] = {"linestyle": "", "alpha": 0.75}


def draw_comparison(result: Result) -> dict[str, bytes]:
    """File name -> PNG."""
    figures = {}
    if _measured(result, "loss_own"):
        figures["losses.png"] = _draw_scores(
            result, "loss_own", "Held-out loss on each client's own kind of rows", _LOSS
        )
    if _measured(result, "aggregation_error"):
        unit = "distance / length of the exact mean"
        figures["errors.png"] = _draw_scores(
            result, "aggregation_error", "Aggregation error, mean over rounds", unit, decades=True
        )
    if _measured(result, "bytes_up"):
        figures["bytes.png"] = _draw_bytes(result)
    for index, table in enumerate(result["clients"]):
        if table["same_clients"] and (picture := _draw_clients(result, table)):
            figures[f"clients{_number(index, result['clients'])}.png"] = picture
    for index, setting in enumerate(result["settings"]):
        curves = [curve for curve in result["curves"] if curve["setting"] == setting]
        if curves:
            figures[f"forgetting{_number(index, result['settings'])}.png"] = _draw_forgetting(curves)
    return figures


def _number(index: int, group: Sequence[Any]) -> str:
    return f"-{index + 1}" if len(group) > 1 else ""


def _measured(result: Result, metric: str) -> list[Mapping[str, Any]]:
    return [row for row in result["rows"] if metric in row["metrics"]]


def _looks(result: Result) -> dict[str, Look]:
    """Label -> look; the label of personal models beside a global one ends with (personal)."""
    return looks_of({row["label"]: (row["mode"], row["label"].endswith(" (personal)")) for row in result["rows"]})


def _panels(figure: Figure, titles: Sequence[str], *, same_x: bool) -> list[Axes]:
    """One panel for each title, in rows of at most three; all have the same scale upwards."""
    columns, lines = _grid(titles)
    every = list(figure.subplots(lines, columns, squeeze=False, sharex=same_x, sharey=True).flatten())
    for unused in every[len(titles) :]:
        unused.remove()
    panels = every[: len(titles)]
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(_wrap(title), loc="left", fontsize=9, fontweight="normal")
        # those above an empty place too
        axes.tick_params(labelbottom=True)
    return panels


def _wrap(setting: str) -> str:
    return "\n".join(clip(part) for part in re.split(", ", setting))


def _draw_scores(result: Result, metric: str, title: str, unit: str, *, decades: bool = False) -> bytes:
    """A line for each method, a panel for each setting: a point for each seed, and a bar at their mean."""
    rows = _measured(result, metric)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    settings = _settings(result, rows)
    looks = _looks(result)
    with house_style():
        columns, lines = _grid(settings)
        figure = new_figure(2.6 + 3.4 * columns, 0.6 + lines * (0.9 + 0.26 * len(labels)))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        panels = dict(zip(settings, _panels(figure, settings, same_x=True), strict=True))
        every = [value for row in rows for value in (row["metrics"][metric]["mean"], *_seeds(row, metric))]
        place = set_decades(next(iter(panels.values())), "x", every) if decades else float
        for row in rows:
            axes, look, line = panels[row["setting"]], looks[row["label"]], labels.index(row["label"])
            mean, seeds = row["metrics"][metric]["mean"], _seeds(row, metric)
            axes.plot(place(mean), line, **_MEAN_BAR, color=look.style.colour)
            axes.plot([place(value) for value in seeds], [line] * len(seeds), **look.marks(5), **_SEED_POINTS)
        for axes in panels.values():
            axes.set_yticks(range(len(labels)), [clip(label) for label in labels])
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.grid(linewidth=0.8)
            axes.set_xlabel(unit)
        add_legend(figure, _explain_points())
        return png_bytes(figure)


def _explain_points() -> list[Line2D]:
    from matplotlib.lines import Line2D

    bar = Line2D([], [], color=FAINT, label="mean over seeds", **_MEAN_BAR)
    return [Line2D([], [], color=FAINT, marker="o", markersize=5, label="one seed", **_SEED_POINTS), bar]


def _settings(result: Result, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that some of these rows have."""
    return [setting for setting in result["settings"] if any(row["setting"] == setting for row in rows)]


def _seeds(row: Mapping[str, Any], metric: str) -> list[float]:
    return list(row["metrics"][metric]["values"].values())


def _grid(panels: Sequence[Any]) -> tuple[int, int]:
    """Columns and lines."""
    return min(_MOST_PANELS, len(panels)), math.ceil(len(panels) / _MOST_PANELS)


def _draw_bytes(result: Result) -> bytes:
    """Loss against what travelled, both ways. What sends no adapters has no place there: its loss is a line across."""
    rows = [row for row in _measured(result, "bytes_up") if "loss_own" in row["metrics"]]
    settings = _settings(result, rows)
    looks = _looks(result)
    with house_style():
        columns, lines = _grid(settings)
        figure = new_figure(1.6 + 3.6 * columns, 0.4 + 3.6 * lines)
        panels = dict(zip(settings, _panels(figure, settings, same_x=True), strict=True))
        sent = {id(row): _megabytes(row) for row in rows}
        place = set_decades(next(iter(panels.values())), "x", (value for value in sent.values() if value))
        sizes = _marker_sizes(rows, sent)
        for row in rows:
            axes, look, loss = panels[row["setting"]], looks[row["label"]], row["metrics"]["loss_own"]["mean"]
            label = clip(row["label"]) + _sends_no_adapters(row)
            if sent[id(row)]:
                axes.plot([place(sent[id(row)])], [loss], linestyle="", label=label, **look.marks(sizes[id(row)]))
            else:
                axes.axhline(
                    loss, color=look.style.colour, linestyle=(0, look.style.dash or (4, 2)), linewidth=1.4, label=label
                )
        for axes in panels.values():
            axes.margins(y=0.1)
            axes.grid(linewidth=0.8)
            axes.set_xlabel("adapters sent, down and up (MB)")
        for axes in list(panels.values())[::columns]:
            axes.set_ylabel(f"held-out loss, own\n({_LOSS})")
        add_legend(figure, legend_lines(*panels.values()))
        return png_bytes(figure)


def _marker_sizes(rows: Sequence[Mapping[str, Any]], sent: Mapping[int, float]) -> dict[int, float]:
    """Row -> size of its marker: larger where later rows have the same place, so that none hides another."""
    losses = [row["metrics"]["loss_own"]["mean"] for row in rows]
    near = 0.01 * (max(losses) - min(losses))

    def covers(later: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
        apart = abs(later["metrics"]["loss_own"]["mean"] - row["metrics"]["loss_own"]["mean"])
        return later["setting"] == row["setting"] and sent[id(later)] == sent[id(row)] and apart <= near

    hidden = {id(row): sum(covers(later, row) for later in rows[at + 1 :]) for at, row in enumerate(rows)}
    return {row: 7.0 + 3.0 * min(count, 2) for row, count in hidden.items()}


def _megabytes(row: Mapping[str, Any]) -> float:
    return (row["metrics"]["bytes_up"]["mean"] + row["metrics"]["bytes_down"]["mean"]) / 1e6


def _sends_no_adapters(row: Mapping[str, Any]) -> str:
    method: Method | None = METHODS.get(row["mode"])
    if method is None or (method.combines and not method.pools_rows):
        return ""
    return ": rows travel, no adapters" if method.pools_rows else ": sends nothing"


def _draw_clients(result: Result, table: Mapping[str, Any]) -> bytes | None:
    """How much every client (columns) gains from each method (rows) against training alone."""
    # in the order of the main table: a JSON file may have its keys sorted
    labels = [label for label in _looks(result) if label not in ("base", ALONE)]
    methods = {label: table["methods"][label] for label in labels if label in table["methods"]}
    clients = sorted({client for one in methods.values() for client in one["gain"]}, key=int)
    if not clients:
        return None
    gains = [[one["gain"].get(client, math.nan) for client in clients] for one in methods.values()]
    most = max((abs(value) for line in gains for value in line if math.isfinite(value)), default=1.0) or 1.0
    return draw_matrix(
        Matrix(
            title="What each client gains by joining, against its loss alone",
            unit=f"gain ({_LOSS})",
            rows=[clip(name) for name in methods],
            columns=[_client_label(client, table) for client in clients],
            values=gains,
            limits=(-most, most),
            colours="RdBu",
            form="+.2f",
        )
    )


def _client_label(client: str, table: Mapping[str, Any]) -> str:
    if name := table.get("names", {}).get(client):
        return clip(name)
    shares = table["shares"][client]
    largest = max(sorted(shares), key=lambda name: shares[name])
    return clip(f"{client}: {largest}") if shares[largest] > 0.5 else f"client {client}"


def _draw_forgetting(curves: Sequence[Mapping[str, Any]]) -> bytes:
    """The first seed's loss on every client's kind of rows, one panel per method, on the same axes."""
    with house_style():
        columns, lines = _grid(curves)
        figure = new_figure(1.0 + 5.0 * columns, 4.2 * lines)
        titles = [f"{clip(curve['method'])} (seed {next(iter(curve['seeds']))})" for curve in curves]
        panels = _panels(figure, titles, same_x=False)
        for axes, curve in zip(panels, curves, strict=True):
            _draw_curve(axes, next(iter(curve["seeds"].values())), curve.get("names", {}))
        for axes in panels[::columns]:
            axes.set_ylabel(f"held-out loss on each client's rows\n({_LOSS})")
        add_legend(figure, legend_lines(*panels))
        return png_bytes(figure)


def _draw_curve(axes: Axes, points: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> None:
    steps = [point["steps"] for point in points]
    clients = list(points[0]["own"])
    many = len(clients) > _MOST_CLIENTS
    for index, client in enumerate(clients):
        line = [(step, point["own"][client]) for step, point in zip(steps, points, strict=True)]
        if many:
            label = f"each of {counted(len(clients), 'client')}"
            axes.plot(*zip(*line, strict=True), color=FAINT, alpha=0.5, linewidth=0.8, label=label)
        else:
            draw_line(axes, line, Look(client_style(index)), clip(names.get(client, f"client {client}")), 1.1)
    mean = [(step, _mean(point["own"].values())) for step, point in zip(steps, points, strict=True)]
    axes.plot(*zip(*mean, strict=True), color=INK, linewidth=2.6, label="mean over clients")
    axes.margins(0.05)
    axes.set_xlabel("optimizer steps, all clients")
    axes.grid(axis="y", linewidth=0.8)


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)
