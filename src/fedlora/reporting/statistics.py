"""How far a measured share, or a mean over few seeds, can be trusted: 95 % intervals in closed form.

The interval of a share covers the choice of test rows alone, not the luck of training. Wilson's has a width where
nothing or everything is right, which a bootstrap over the rows has not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import NormalDist, fmean, stdev

LEVEL = 0.95


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share in 0..1 of `count` rows (Wilson, JASA 1927)."""
    squared = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    centre = (share + squared / (2 * count)) / (1 + squared / count)
    reach = math.sqrt(squared * (share * (1 - share) + squared / (4 * count)) / count) / (1 + squared / count)
    # rounding may leave the share a hair outside
    return max(0.0, min(share, centre - reach)), min(1.0, max(share, centre + reach))


def macro_interval(shares: Mapping[str, float], counts: Mapping[str, int]) -> tuple[float, float]:
    """The interval of the plain mean over `shares` (category -> 0..1) of `counts` test rows, drawn by category.

    From Wilson's intervals of the categories, whose distances to the shares add up as standard deviations do (Zou,
    Huang and Zhang, Computational Statistics & Data Analysis 2009). With one category it is Wilson's.
    """
    intervals = {name: share_interval(share, counts[name]) for name, share in shares.items()}
    mean = fmean(shares.values())
    below = math.hypot(*(shares[name] - low for name, (low, _) in sorted(intervals.items())))
    above = math.hypot(*(high - shares[name] for name, (_, high) in sorted(intervals.items())))
    return max(0.0, mean - below / len(shares)), min(1.0, mean + above / len(shares))


def seed_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's t interval of the mean over seeds; None for fewer than two.

    It takes the values for normal. Of three values it reaches 2.5 of their standard deviations to each side.
    """
    if len(values) < 2:
        return None
    mean = fmean(values)
    reach = student_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean - reach, mean + reach


@cache
def student_quantile(degrees: int, level: float = LEVEL) -> float:
    """t such that Student's distribution with whole `degrees` of freedom has `level` of its mass in [-t, t]."""
    low, high = 0.0, math.pi / 2
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_mass(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _central_mass(angle: float, degrees: int) -> float:
    """Mass of [-t, t] for t = sqrt(degrees) tan(angle): a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    is_odd, cosine = degrees % 2, math.cos(angle)
    term, total = (cosine if is_odd else 1.0), 0.0
    for number in range(1 + is_odd, degrees, 2):
        total += term
        term *= number / (number + 1) * cosine**2
    mass = math.sin(angle) * total
    return 2 / math.pi * (angle + mass) if is_odd else mass
