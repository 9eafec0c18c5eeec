"""Numbers as lines and marks: where everything lies, and what each tick and point says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fedlora.plain_text import NOTHING
from fedlora.reporting.page.blocks import Cell, Chart, Charts, Line, Mark, Series, Table
from fedlora.reporting.page.markers import marker_path

_SIZE = (460, 250)
_FRAME = (52.0, 12.0, 448.0, 216.0)
_MOST_DOTS = 30
_UP, _ACROSS = 4, 8
"""About so many ticks."""


def draw_charts(charts: Sequence[Chart | None]) -> list[Charts]:
    """Those of `charts` that have lines, under one legend; nothing where none has."""
    drawn = [chart for chart in charts if chart is not None]
    legend = {line.series.label: line.series for chart in drawn for line in chart.lines}
    return [Charts(drawn, list(legend.values()))] if drawn else []


def line_chart(
    title: str, unit: str, series: Sequence[Series], *, across: str = "round", digits: int = 3, is_log: bool = False
) -> Chart | None:
    """None where nothing is to be drawn. On a logarithmic axis values that are not above 0 are left out of the lines
    and stay in the table."""
    shown = {
        one.label: replace(one, points=[(x, y) for x, y in one.points if math.isfinite(y) and (y > 0 or not is_log)])
        for one in series
    }
    shown = {label: one for label, one in shown.items() if one.points}
    if not shown:
        return None
    places = sorted({x for one in shown.values() for x, _ in one.points})
    values = [y for one in shown.values() for _, y in one.points]
    up = _log_ticks(values) if is_log else _ticks(min(values), max(values), _UP)
    scale = math.log10 if is_log else float
    to_x = _scale(places[0], places[-1], _FRAME[0] + 10, _FRAME[2] - 10)
    up_to = _scale(scale(up[0]), scale(up[-1]), _FRAME[3], _FRAME[1])

    def to_y(value: float) -> float:
        return up_to(scale(value))

    lines = []
    for one in shown.values():
        at = [(to_x(x), to_y(y)) for x, y in one.points]
        dots = at if len(at) <= _MOST_DOTS else at[-1:]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in at)
        lines.append(Line(one, path, "".join(marker_path(one.marker, x, y) for x, y in dots)))
    form = _form(digits)
    return Chart(
        title,
        unit,
        across,
        _SIZE,
        _FRAME,
        [(to_x(x), f"{x:g}") for x in _whole_ticks(places)],
        [(to_y(y), _tick_text(y)) for y in up],
        lines,
        _hover(across, list(shown.values()), places, to_x, to_y, form),
        _numbers(title, unit, across, series, form),
    )


def scale_marks(values: Sequence[tuple[float, float, float] | None], *, ends: tuple[float, float] | None = None,
                series: Sequence[str] = (), has_zero: bool = False) -> list[Mark | None]:  # fmt: skip
    """Marks of (low, value, high) on one scale: from `ends`, or over all of them and, with `has_zero`, 0."""
    numbers = [number for one in values if one for number in one] + ([0.0] if has_zero else [])
    if not numbers:
        return [None] * len(values)
    low, high = ends or (min(numbers), max(numbers))
    to_place = _scale(low, high, 2.0, 98.0)
    zero = to_place(0.0) if has_zero else None
    looks = series or [""] * len(values)
    return [
        None if one is None else Mark(to_place(one[0]), to_place(one[1]), to_place(one[2]), zero, look)
        for one, look in zip(values, looks, strict=True)
    ]


def _hover(
    across: str,
    shown: Sequence[Series],
    places: Sequence[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    form: Callable[[float], str],
) -> dict[str, Any]:
    """Per place on the horizontal axis: where it lies, its name, and every line's height and text there."""
    found = [(one, dict(one.points)) for one in shown]
    return {
        "across": across,
        "x": [to_x(x) for x in places],
        "names": [f"{x:g}" for x in places],
        "lines": [
            {
                "label": one.label,
                "series": one.look,
                "y": [to_y(own[x]) if x in own else None for x in places],
                "text": [form(own[x]) if x in own else NOTHING for x in places],
            }
            for one, own in found
        ],
    }


def _numbers(title: str, unit: str, across: str, series: Sequence[Series], form: Callable[[float], str]) -> Table:
    found = [(one, dict(one.points)) for one in series if one.points]
    places = sorted({x for _, own in found for x in own})
    rows = [
        [
            Cell(one.label, series=one.look),
            *(Cell(form(own[x]), own[x]) if x in own else Cell(NOTHING) for x in places),
        ]
        for one, own in found
    ]
    caption = f"{title}, {unit}, by {across}" if unit else f"{title} by {across}"
    return Table(caption, ["", *(f"{x:g}" for x in places)], rows)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """From `low` ... `high` to `start` ... `end`; the middle where there is only one value."""
    span = high - low
    if span == 0:
        return lambda value: round((start + end) / 2, 1)
    return lambda value: round(start + (min(max(value, low), high) - low) / span * (end - start), 1)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers around `low` and `high`, one below or at the least and one above or at the largest."""
    span = (high - low) or abs(high) * 0.2 or 1.0
    rough = span / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        # nothing that is counted or shared lies below 0
        first, last = (max(first - 1, 0) if low >= 0 else first - 1), last + 1
    return [round(number * step, 12) for number in range(first, last + 1)]


def _whole_ticks(places: Sequence[float]) -> list[float]:
    """Some of the whole numbers from the first to the last of `places`."""
    first, last = round(places[0]), round(places[-1])
    rough = max(1.0, (last - first) / _ACROSS)
    size = 10.0 ** math.floor(math.log10(rough))
    step = int(next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough))
    start = math.ceil(first / step) * step
    return [float(number) for number in range(start, last + 1, step)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten around `values`, every second or third where there are many."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    if first == last:
        last += 1
    step = max(1, math.ceil((last - first) / 6))
    last = first + math.ceil((last - first) / step) * step
    return [10.0**power for power in range(first, last + 1, step)]


def _tick_text(value: float) -> str:
    return f"{value:.0e}" if value and abs(value) < 1e-4 else f"{value:,g}"


def _form(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.2e}" if value and abs(value) < 10**-digits else f"{value:.{digits}f}"
