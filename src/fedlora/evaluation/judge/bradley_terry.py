"""Several models in one order: their strengths under the model of Bradley and Terry (Biometrika 1952).

Model i wins against j with probability logistic(s_i - s_j); a tie is half a win for each. Strengths are in logits, with
mean 0: a lead of 1.1 means three wins of four. Intervals resample prompts, which all pairs share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.evaluation.intervals import LEVEL, bootstrap_weights
from fedlora.evaluation.judge.judge_statistics import JudgedSample
from fedlora.plain_text import Table, one_line, table_text

_RIDGE = 1e-2
"""Keeps a model that wins everything from an infinite strength; without effect elsewhere."""
_MOST_STEPS, _LONGEST_STEP, _CLOSE = 60, 2.0, 1e-9
FEWEST = 3
"""Models below which the win rate of the pair says the same."""

Numbers = NDArray[np.floating]


@dataclass(frozen=True)
class Compared:
    """Samples whose outcome is that of `proposed` against `baseline`, who are named without ambiguity."""

    proposed: str
    baseline: str
    samples: Sequence[JudgedSample]


@dataclass(frozen=True)
class Strength:
    """Of one model, in logits; `interval` at 95 %."""

    name: str
    strength: float
    interval: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"name": self.name, "strength": self.strength, "interval": list(self.interval)}


def rank_models(compared: Sequence[Compared]) -> list[Strength]:
    """The strongest first; empty for fewer than FEWEST models, and where no chain of pairs connects them.

    A pair that is compared in both directions counts once: both are made of the same verdicts.
    """
    once: dict[frozenset[str], Compared] = {}
    for pair in compared:
        once.setdefault(frozenset((pair.proposed, pair.baseline)), pair)
    compared = list(once.values())
    names = list(dict.fromkeys(name for pair in compared for name in (pair.proposed, pair.baseline)))
    if len(names) < FEWEST or not _are_connected(names, compared):
        return []
    places = [(names.index(pair.proposed), names.index(pair.baseline)) for pair in compared for _ in pair.samples]
    samples = [sample for pair in compared for sample in pair.samples]
    won, all_there = _tables(np.ones((1, len(samples))), places, samples, len(names)), []
    for weights in bootstrap_weights([sample.prompt for sample in samples]):
        all_there.append(fit_strengths(_tables(weights, places, samples, len(names))))
    low, high = np.quantile(np.concatenate(all_there), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    found = zip(names, fit_strengths(won)[0], low, high, strict=True)
    ranked = [Strength(name, float(value), (float(a), float(b))) for name, value, a, b in found]
    return sorted(ranked, key=lambda one: (-one.strength, one.name))


def ranking_table(ranked: Sequence[Strength]) -> Table:
    """A row for each model."""
    rows = [
        [one_line(one.name), f"{one.strength:+.3f}", f"{one.interval[0]:+.3f} to {one.interval[1]:+.3f}"]
        for one in ranked
    ]
    return table_text(("model", "strength", "95 % interval"), rows)


def fit_strengths(won: Numbers) -> Numbers:
    """(draws, models) with mean 0, from wins (draws, models, models): how often the first won against the second.

    By Newton's method, steps limited to 2.
    """
    games = won + won.transpose(0, 2, 1)
    strengths = np.zeros(won.shape[:2])
    for _ in range(_MOST_STEPS):
        chances = 1 / (1 + np.exp(strengths[:, None, :] - strengths[:, :, None]))
        slope = (won - games * chances).sum(axis=2) - _RIDGE * strengths
        curve = games * chances * (1 - chances)
        bend = -curve
        number = np.arange(won.shape[1])
        bend[:, number, number] += curve.sum(axis=2) + _RIDGE
        step = np.linalg.solve(bend, slope[:, :, None])[:, :, 0]
        strengths += np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)
        if np.abs(step).max() < _CLOSE:
            break
    return strengths - strengths.mean(axis=1, keepdims=True)


def _tables(
    weights: Numbers, places: Sequence[tuple[int, int]], samples: Sequence[JudgedSample], count: int
) -> Numbers:
    """Wins (draws, models, models) in each resample of the rows."""
    shares = np.zeros((len(samples), count * count))
    for row, ((one, other), sample) in enumerate(zip(places, samples, strict=True)):
        shares[row, one * count + other] = sample.score
        shares[row, other * count + one] = 1 - sample.score
    return (weights @ shares).reshape(-1, count, count)


def _are_connected(names: Sequence[str], compared: Sequence[Compared]) -> bool:
    reached, before = {names[0]}, 0
    while len(reached) > before:
        before = len(reached)
        pairs = ({pair.proposed, pair.baseline} for pair in compared if pair.samples)
        reached |= {name for pair in pairs if pair & reached for name in pair}
    return len(reached) == len(names)
