"""How far a measured number can be trusted: 95 % intervals, by bootstrap over prompts and in closed form.

All but `seed_interval` cover the choice of test rows alone, not the luck of training. Wilson's interval of a share has
a width where nothing or everything is right, which a bootstrap over the rows has not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cache
from statistics import NormalDist, fmean, stdev

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlora.seeds import derive_seed

LEVEL = 0.95
DRAWS = 2000
"""Resamples of a bootstrap: the ends of an interval then vary by about 2 % of its width from seed to seed."""
_MOST_NUMBERS = 2**22
"""Of the weights that are in memory at once."""


def bootstrap_weights(
    prompts: Sequence[Hashable], *, draws: int = DRAWS, seed: int = 0
) -> Iterator[NDArray[np.floating]]:
    """Resamples with replacement of the distinct `prompts`, one of which stands for each row.

    Yields blocks of weights, (some draws, rows): how often a row is in a resample. Rows of one prompt are drawn
    together, because they are not independent. The same seed gives the same resamples, so differences between
    measures of the same rows are paired (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    belongs = np.array([numbers[prompt] for prompt in prompts])
    generator = np.random.default_rng(derive_seed(seed, "bootstrap"))
    block = max(1, _MOST_NUMBERS // len(prompts))
    for start in range(0, draws, block):
        size = (min(block, draws - start), len(numbers))
        drawn = generator.integers(len(numbers), size=size) + len(numbers) * np.arange(size[0])[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size[0] * size[1]).reshape(size)
        yield counts.astype(float)[:, belongs]


def bootstrap_interval(
    measure: Callable[[NDArray[np.floating]], ArrayLike],
    prompts: Sequence[Hashable],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a number that `measure` computes from the weights of rows, (draws, rows) -> (draws,).

    Resamples in which the measure is not a number are left out; where all are, so are the ends.
    """
    found = np.concatenate(
        [np.asarray(measure(weights)) for weights in bootstrap_weights(prompts, draws=draws, seed=seed)]
    )
    return percentile_interval(found)


def percentile_interval(found: NDArray[np.floating]) -> tuple[float, float]:
    """The middle 95 % of the values (draws,) that resamples gave, without those that are not a number."""
    found = found[~np.isnan(found)]
    if not len(found):
        return math.nan, math.nan
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # sums of other machines differ in the last digits; files should not
    return round(float(low), 9), round(float(high), 9)


def mean_interval(
    values: Sequence[float], prompts: Sequence[Hashable], *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean of `values`, one a row; NaN values are not counted.

    Of the difference between two measures of the same rows, give the differences row by row.
    """
    numbers = np.asarray(values, dtype=float)
    there = ~np.isnan(numbers)
    filled = np.where(there, numbers, 0.0)

    def mean(weights: NDArray[np.floating]) -> NDArray[np.floating]:
        counts = weights @ there
        return np.divide(weights @ filled, counts, out=np.full(len(weights), np.nan), where=counts > 0)

    return bootstrap_interval(mean, prompts, draws=draws, seed=seed)


def sign_test(more: int, fewer: int) -> float:
    """Two-sided p of the exact sign test: `more` rows differ in one direction, `fewer` in the other, ties are left out.

    Of rows that are right or wrong under two models it is McNemar's exact test. 1.0 without any difference.
    """
    count, term = more + fewer, 1
    tail = term
    for number in range(min(more, fewer)):
        term = term * (count - number) // (number + 1)
        tail += term
    return min(1.0, 2 * tail / 2**count)


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
