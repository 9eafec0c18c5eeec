"""Means of what was measured row by row, with 95 % intervals by bootstrap over prompts, and paired differences.

All models are resampled together: each resample holds the same rows for all, so the difference between two models has
the width of the differences between their answers and not of the difficulty of the rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlora.evaluation.intervals import (
    bootstrap_weights,
    macro_interval,
    percentile_interval,
    share_interval,
    sign_test,
)

Numbers = NDArray[np.floating]
Model = TypeVar("Model", bound=Hashable)
_MOST_NUMBERS = 2**22


@dataclass(frozen=True)
class Measure:
    """What was measured of every row (rows,); NaN where a row has no such number.

    With `weights` (rows,), such as the tokens of a loss, the overall mean is that of all rows by weight; without, the
    plain mean over the groups, so that a group counts the same whatever its size. A share is of rows that are right,
    each 1 or 0; its interval is Wilson's, which has a width where all rows are right.
    """

    values: Numbers
    weights: Numbers | None = None
    is_share: bool = False


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    interval: tuple[float, float]

    def record(self) -> dict[str, Any]:
        return {"mean": self.mean, "interval": list(self.interval)}


@dataclass(frozen=True)
class Difference:
    """How much higher one model is than another on the same rows, with its 95 % interval; `higher` and `lower` count
    the rows, `p` is of the exact sign test on them, which is McNemar's where rows are right or wrong."""

    estimate: Estimate
    higher: int
    lower: int
    p: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        low, high = self.estimate.interval
        return low > 0 or high < 0

    def record(self) -> dict[str, Any]:
        return {**self.estimate.record(), "higher": self.higher, "lower": self.lower, "p": self.p}


class ScoreTable(Generic[Model]):
    """Measures of several models on the same rows; `groups` and `prompts` have one entry a row."""

    def __init__(
        self,
        measured: Mapping[Model, Mapping[str, Measure]],
        groups: Sequence[str],
        prompts: Sequence[Hashable],
    ) -> None:
        self._measures = {(model, name): one for model, own in measured.items() for name, one in own.items()}
        self._places = {name: np.flatnonzero(np.array(list(groups)) == name) for name in dict.fromkeys(groups)}
        self._by_group: dict[tuple[Model, str], dict[str, Estimate]] = {key: {} for key in self._measures}
        columns = list(self._measures.values())
        values = np.stack([one.values for one in columns], axis=1)
        counts = np.stack([np.ones(len(groups)) if one.weights is None else one.weights for one in columns], axis=1)
        counts = np.where(np.isnan(values), 0.0, counts)
        means = self._resample(np.where(np.isnan(values), 0.0, values) * counts, counts, prompts)
        self._overall = dict(zip(self._measures, means.T, strict=True))

    def overall(self, model: Model) -> dict[str, Estimate]:
        """Every measure of a model over all rows."""
        found = {}
        for (owner, name), means in self._overall.items():
            if owner == model and not np.isnan(means[0]):
                found[name] = _estimate(means)
                if self._measures[owner, name].is_share:
                    shares = {group: one.mean for group, one in self._by_group[owner, name].items()}
                    counts = {group: self._count(owner, name, group) for group in shares}
                    found[name] = Estimate(found[name].mean, macro_interval(shares, counts))
        return found

    def by_group(self, model: Model) -> dict[str, dict[str, Estimate]]:
        """Every measure of a model in each group, in the order of the groups' first rows."""
        own = {name: groups for (owner, name), groups in self._by_group.items() if owner == model}
        return {
            group: {name: groups[group] for name, groups in own.items() if group in groups} for group in self._places
        }

    def difference(self, model: Model, other: Model) -> dict[str, Difference]:
        """Every measure that both models have: the first less the second."""
        found = {}
        for (owner, name), means in self._overall.items():
            if owner != model or (other, name) not in self._measures:
                continue
            apart = means - self._overall[other, name]
            if not np.isnan(apart[0]):
                one, two = (self._measures[each, name].values for each in (model, other))
                higher, lower = int(np.sum(one > two)), int(np.sum(one < two))
                found[name] = Difference(_estimate(apart), higher, lower, sign_test(higher, lower))
        return found

    def _resample(self, totals: Numbers, counts: Numbers, prompts: Sequence[Hashable]) -> Numbers:
        """Overall means (1 + draws, columns) from totals and counts (rows, columns), first of the rows as they are."""
        drawn = [block.astype(np.uint16) for block in bootstrap_weights(prompts)]
        weights = np.concatenate([np.ones((1, len(prompts)), np.uint16), *drawn])
        pooled = np.array([one.weights is not None for one in self._measures.values()])
        above = np.zeros((len(weights), len(pooled)))
        below = np.zeros_like(above)
        for group, places in self._places.items():
            part = weights[:, places]
            sums, sizes = _product(part, totals[places]), _product(part, counts[places])
            means = _divide(sums, sizes)
            self._note_group(group, means)
            # a group of which a resample holds no row is no part of its mean
            there = ~np.isnan(means)
            above += np.where(pooled, sums, np.where(there, means, 0.0))
            below += np.where(pooled, sizes, there)
        return _divide(above, below)

    def _note_group(self, group: str, means: Numbers) -> None:
        for (key, measure), found in zip(self._measures.items(), means.T, strict=True):
            if np.isnan(found[0]):
                continue
            estimate = _estimate(found)
            if measure.is_share:
                estimate = Estimate(estimate.mean, share_interval(estimate.mean, self._count(*key, group)))
            self._by_group[key][group] = estimate

    def _count(self, model: Model, name: str, group: str) -> int:
        return int(np.sum(~np.isnan(self._measures[model, name].values[self._places[group]])))


def _product(weights: NDArray[np.integer], columns: Numbers) -> Numbers:
    """`weights` (draws, rows) times `columns` (rows, columns), with few of the weights as floats at once."""
    parts = np.array_split(weights, 1 + weights.size // _MOST_NUMBERS)
    return np.concatenate([part.astype(float) @ columns for part in parts])


def _divide(sums: Numbers, counts: Numbers) -> Numbers:
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _estimate(means: Numbers) -> Estimate:
    return Estimate(round(float(means[0]), 9), percentile_interval(means[1:]))
