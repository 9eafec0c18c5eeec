"""How the series of a page look: a class for each, in the style that its method has in every picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedlora.reporting.page.blocks import Series
from fedlora.reporting.palette import Style, style_of

BASE = "base"


def personal(name: str) -> str:
    """The series of an experiment's personal models."""
    return f"{name} (personal)"


@dataclass(frozen=True)
class Looks:
    """Name of a series (an experiment, a contender, `base`) -> its style, in the order of their classes."""

    styles: Mapping[str, Style]

    @classmethod
    def of_methods(cls, series: Iterable[tuple[str, str]]) -> Looks:
        """Of (name, method) pairs, after the base; several of one method differ in dash."""
        styles = {BASE: style_of(BASE)}
        counts: dict[str, int] = {}
        for name, method in series:
            if name not in styles:
                counts[method] = counts.get(method, -1) + 1
                styles[name] = style_of(method, counts[method])
        return cls(styles)

    @classmethod
    def of_runs(cls, series: Sequence[tuple[str, str]]) -> Looks:
        """Of (experiment, method) pairs; the clients' personal models of an experiment differ from it in dash."""
        return cls.of_methods([*series, *((personal(name), method) for name, method in series)])

    def class_of(self, name: str) -> str:
        """The class of a series; none for what has no style."""
        return f"s{list(self.styles).index(name)}" if name in self.styles else ""

    def series(self, name: str, label: str, points: Sequence[tuple[float, float]]) -> Series:
        """Points under a label, in the look of a series."""
        return Series(label, self.class_of(name), self.styles[name].marker, points)
