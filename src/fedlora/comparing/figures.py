"""The pictures of a comparison: scores, loss against bytes, who gains, and what is forgotten on the way.

Each is drawn only where there is something to draw. Seeds are points, their mean the bar or line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.methods.table import ALONE, BASELINES
from fedlora.reporting.drawing import BASE_COLOUR, FAINT, clip, house_style, png_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442", "#7F3C8D", "#888833")
_FIXED = {"base": BASE_COLOUR, **dict(zip(BASELINES, ("#555555", "#B0B0B0"), strict=True))}
_MOST_CLIENTS = 12


def draw_comparison(result: Result) -> dict[str, bytes]:
    """File name -> PNG."""
    with house_style():
        figures = {"losses.png": _draw_scores(result, "loss_own", "held-out loss, own kind")}
        if any("aggregation_error" in row["metrics"] for row in result["rows"]):
            figures["errors.png"] = _draw_scores(result, "aggregation_error", "aggregation error", logarithmic=True)
        figures["bytes.png"] = _draw_bytes(result)
        for index, table in enumerate(result["clients"]):
            if table["same_clients"]:
                figures[f"clients{_number(index, result['clients'])}.png"] = _draw_clients(table)
        for index, setting in enumerate(result["settings"]):
            curves = [curve for curve in result["curves"] if curve["setting"] == setting]
            if curves:
                figures[f"forgetting{_number(index, result['settings'])}.png"] = _draw_forgetting(curves)
        return figures


def _number(index: int, group: Sequence[Any]) -> str:
    return f"-{index + 1}" if len(group) > 1 else ""


def _colours(result: Result) -> dict[str, str]:
    labels = list(dict.fromkeys(row["label"] for row in result["rows"]))
    free = [label for label in labels if label not in _FIXED]
    return {**_FIXED, **{label: PALETTE[index % len(PALETTE)] for index, label in enumerate(free)}}


def _draw_scores(result: Result, metric: str, title: str, *, logarithmic: bool = False) -> bytes:
    """One group of points per setting, one column per method."""
    from matplotlib.figure import Figure

    settings = result["settings"]
    rows = [row for row in result["rows"] if metric in row["metrics"]]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    colours = _colours(result)
    width = 2.2 + max(1.9, 0.28 * len(labels)) * len(settings)
    figure = Figure(figsize=(min(14.0, max(6.0, width)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    step = 0.8 / max(1, len(labels))
    for column, label in enumerate(labels):
        for row in (row for row in rows if row["label"] == label):
            place = settings.index(row["setting"]) - 0.4 + (column + 0.5) * step
            found = row["metrics"][metric]
            values = list(found["values"].values())
            first = row["setting"] == next(r["setting"] for r in rows if r["label"] == label)
            axes.plot([place] * len(values), values, "o", color=colours[label], markersize=3.5, alpha=0.6)
            axes.plot(
                [place - 0.4 * step, place + 0.4 * step],
                [found["mean"]] * 2,
                color=colours[label],
                linewidth=3,
                label=clip(label) if first else None,
            )
    if logarithmic and all(value > 0 for row in rows for value in row["metrics"][metric]["values"].values()):
        axes.set_yscale("log")
        # the usual labels are formulas, and text is not parsed for any here
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.set_title(title, loc="left")
    axes.set_xticks(range(len(settings)), [_wrap(setting) for setting in settings])
    axes.grid(axis="y", linewidth=0.8)
    figure.legend(loc="outside right upper")
    return png_bytes(figure)


def _wrap(setting: str) -> str:
    return "\n".join(clip(part) for part in re.split(", ", setting))


def _draw_bytes(result: Result) -> bytes:
    """Loss against what travelled, both ways; what sends nothing stands on the left."""
    from matplotlib.figure import Figure

    settings = result["settings"]
    width = min(15.0, 3.4 * len(settings) + 2.0)
    figure = Figure(figsize=(width, 4.0), layout="constrained")
    colours, seen = _colours(result), set()
    all_axes = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for axes, setting in zip(all_axes, settings, strict=True):
        for row in (row for row in result["rows"] if row["setting"] == setting and "bytes_up" in row["metrics"]):
            sent = (row["metrics"]["bytes_up"]["mean"] + row["metrics"]["bytes_down"]["mean"]) / 1e6
            label = None if row["label"] in seen else clip(row["label"])
            seen.add(row["label"])
            axes.plot(sent, row["metrics"]["loss_own"]["mean"], "o", color=colours[row["label"]], label=label)
        axes.set_title(_wrap(setting), loc="left", fontsize=9)
        axes.set_xlabel("MB down and up")
        axes.grid(linewidth=0.8)
    all_axes[0].set_ylabel("held-out loss, own kind")
    figure.legend(loc="outside right upper")
    return png_bytes(figure)


def _draw_clients(table: Mapping[str, Any]) -> bytes:
    """How much every client (columns) gains from each method (rows) against training alone."""
    from matplotlib.figure import Figure

    methods = {name: one for name, one in table["methods"].items() if name not in ("base", ALONE)}
    clients = list(next(iter(methods.values()))["gain"]) if methods else []
    figure = Figure(
        figsize=(max(5.0, 2.6 + 0.7 * len(clients)), 1.6 + 0.42 * max(1, len(methods))), layout="constrained"
    )
    axes = figure.add_subplot()
    gains = [[one["gain"].get(client, float("nan")) for client in clients] for one in methods.values()]
    most = max((abs(value) for line in gains for value in line if value == value), default=1.0) or 1.0
    image = axes.imshow(gains, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for line, values in enumerate(gains):
        for column, value in enumerate(values):
            colour = "white" if abs(value) > 0.6 * most else "#333333"
            axes.text(column, line, f"{value:+.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(methods)), [clip(name) for name in methods])
    named = table.get("names", {})
    names = [clip(named[one]) if one in named else _client_label(one, table["shares"][one]) for one in clients]
    axes.set_xticks(range(len(clients)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_title("Loss alone less loss here: blue gains from joining", loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04)
    return png_bytes(figure)


def _client_label(client: str, shares: Mapping[str, float]) -> str:
    largest = max(sorted(shares), key=lambda name: shares[name])
    return clip(largest) if shares[largest] > 0.5 else f"client {client}"


def _draw_forgetting(curves: Sequence[Mapping[str, Any]]) -> bytes:
    """The first seed's loss on every client's kind of rows, one panel per method, on the same axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(curves) + 1.2, 4.4), layout="constrained")
    all_axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, curve in zip(all_axes, curves, strict=True):
        _draw_curve(axes, curve)
    all_axes[0].set_ylabel("held-out loss on the client's rows")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return png_bytes(figure)


def _draw_curve(axes: Axes, curve: Mapping[str, Any]) -> None:
    seed, points = next(iter(curve["seeds"].items()))
    steps = [point["steps"] for point in points]
    clients = list(points[0]["own"])
    for index, client in enumerate(clients[:_MOST_CLIENTS]):
        values = [point["own"][client] for point in points]
        marker = "o" if len(points) < 40 else ""
        axes.plot(
            steps, values, color=PALETTE[index % len(PALETTE)], linewidth=1.1, marker=marker, markersize=2.5,
            label=clip(curve.get("names", {}).get(client, f"client {client}")),
        )  # fmt: skip
    mean = [sum(point["own"].values()) / len(clients) for point in points]
    axes.plot(steps, mean, color="black", linewidth=2.2, label="mean")
    axes.set_title(f"{clip(curve['method'])} (seed {seed})", loc="left")
    axes.set_xlabel("optimizer steps, all clients")
    axes.grid(axis="y", linewidth=0.8, color=FAINT, alpha=0.3)
