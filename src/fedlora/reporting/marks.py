"""Lines and points of pictures: each method in its colour, with its dash and marker.

What one method has several of in one picture differs in more than colour: several runs in dash and in which half of the
marker is filled, personal models from the global one by hollow markers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlora.reporting.palette import Style, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_MARKERS = {
    **{"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "triangle down": "v", "plus": "P", "cross": "X"}
}
_FILLS = ("full", "left", "top", "right", "bottom")
_MOST_MARKERS = 15
"""Markers on one line; a longer line has them spread over it."""


@dataclass(frozen=True)
class Look:
    """How one line or one group of points is drawn."""

    style: Style
    fill: str = "full"
    hollow: bool = False

    def marks(self, size: float = 5.5) -> dict[str, Any]:
        """matplotlib's properties of the markers."""
        fill = {"markerfacecolor": "white"} if self.hollow else {"fillstyle": self.fill}
        return {
            "color": self.style.colour,
            "marker": _MARKERS[self.style.marker],
            "markersize": size,
            "markeredgecolor": self.style.colour,
            "markerfacecoloralt": "white",
            **fill,
        }


def looks_of(methods: Mapping[str, tuple[str, bool]]) -> dict[str, Look]:
    """Name -> look, from name -> (method, whether these are personal models beside a global one)."""
    seen: Counter[tuple[str, bool]] = Counter()
    looks = {}
    for name, (method, personal) in methods.items():
        variant = seen[method, personal]
        seen[method, personal] += 1
        looks[name] = Look(style_of(method, variant), _FILLS[variant % len(_FILLS)], personal)
    return looks


def draw_line(axes: Axes, points: Sequence[tuple[float, float]], look: Look, label: str, width: float = 1.8) -> None:
    """A line through (x, y) points with markers on it; a value that is not a number is a gap."""
    places, values = zip(*points, strict=True)
    drawn = [value if math.isfinite(value) else math.nan for value in values]
    every = max(1, math.ceil(len(points) / _MOST_MARKERS))
    dash = (0, look.style.dash) if look.style.dash else "-"
    axes.plot(places, drawn, linewidth=width, linestyle=dash, markevery=every, label=label, **look.marks())


def legend_lines(*all_axes: Axes) -> list[Line2D]:
    """Every labelled line of some axes, each label once."""
    lines = (line for axes in all_axes for line in axes.lines)
    named = {str(line.get_label()): line for line in lines if not str(line.get_label()).startswith("_")}
    return list(named.values())


def whole_rounds(axes: Axes, rounds: Iterable[int]) -> None:
    """A horizontal axis of rounds, from the first to the last, with room for the markers at both ends."""
    from matplotlib.ticker import MaxNLocator

    known = list(rounds)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if known:
        room = max(0.3, 0.03 * (max(known) - min(known)))
        axes.set_xlim(min(known) - room, max(known) + room)


def set_decades(axes: Axes, name: str, values: Iterable[float]) -> Callable[[float], float]:
    """Make the axis `name` (x or y) logarithmic where positive values span a factor of 30 or more, else linear from 0.

    Zero has no place among decades: it is marked 0, below the smallest one. Returns where a value is drawn; what is
    not a number is nowhere (NaN).
    """
    finite = sorted({value for value in values if math.isfinite(value)})
    positive = [value for value in finite if value > 0]
    axis = axes.xaxis if name == "x" else axes.yaxis
    set_limits = axes.set_xlim if name == "x" else axes.set_ylim
    if not positive or positive[-1] < 30 * positive[0]:
        top = positive[-1] if positive else 1.0
        low = min(0.0, finite[0]) if finite else 0.0
        axis.set_major_formatter(lambda value, _: number_label(value))
        set_limits(low - 0.06 * (top - low), top + 0.08 * (top - low))
        return lambda value: value if math.isfinite(value) else math.nan
    low, high = math.floor(math.log10(positive[0])), math.ceil(math.log10(positive[-1]))
    step = math.ceil((high - low) / 7)
    decades = list(range(high, low - 1, -step))[::-1]
    ticks, labels = [10.0**power for power in decades], [number_label(10.0**power) for power in decades]
    edge = low
    if finite[0] <= 0:
        edge = low - step
        ticks, labels = [10.0**edge, *ticks], ["0", *labels]
    room = 0.06 * (high - edge)
    axes.set(**{f"{name}scale": "log"})
    set_limits(10 ** (edge - room), 10 ** (high + room))
    axis.set_ticks(ticks, labels)
    axis.set_ticks([], minor=True)
    return lambda value: math.nan if not math.isfinite(value) else value if value > 0 else 10.0**edge


def number_label(value: float) -> str:
    """A number of an axis in plain characters: 0.01, 250, 10⁻⁷, 2.5·10⁻⁸."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    mantissa, _, power = f"{value:.3e}".partition("e")
    raised = "10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return raised if float(mantissa) == 1 else f"{float(mantissa):g}·{raised}"
