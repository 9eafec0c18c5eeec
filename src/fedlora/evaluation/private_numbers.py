"""Numbers that an owner may give of its own test rows: means, their standard errors, and two counts.

A difference between two models is paired row by row where the rows are, so its standard error is that of the
differences and not of the difficulty of the rows. Rows with one prompt count as one in every standard error.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.config.private_metrics import PRIVATE_METRICS
from fedlora.evaluation.intervals import share_interval, student_quantile
from fedlora.evaluation.score_table import Estimate, Measure, Numbers
from fedlora.plain_text import counted, one_line

MODELS = ("base", "global", "personal")
PAIRS = (("global", "base"), ("personal", "base"), ("personal", "global"))
SHARES = frozenset({"exact", "normalised"})
"""Shares of rows that are right; their intervals are Wilson's."""


@dataclass(frozen=True)
class PrivateMean:
    """A mean over rows that stay with their owner, and its standard error."""

    mean: float
    error: float

    def record(self) -> dict[str, float]:
        return {"mean": self.mean, "se": self.error}


def summarise_rows(
    measured: Mapping[str, Mapping[str, Measure]], prompts: Sequence[Hashable], fewest: int
) -> dict[str, Any]:
    """What may leave of the measures of every model (model -> metric -> rows): JSON values.

    Of fewer than `fewest` different prompts it is the reason alone, not even the count.
    """
    num_prompts = len(set(prompts))
    if num_prompts < fewest:
        return withheld(f"fewer than {counted(fewest, 'test row')} with different prompts")
    pairs = [(one, other) for one, other in PAIRS if one in measured and other in measured]
    return {
        "num_rows": len(prompts),
        "num_prompts": num_prompts,
        "models": {
            model: {name: _mean(one.values, one.weights, prompts).record() for name, one in own.items()}
            for model, own in measured.items()
        },
        "differences": {
            f"{one}-{other}": {
                name: _mean(mine.values - measured[other][name].values, mine.weights, prompts).record()
                for name, mine in measured[one].items()
            }
            for one, other in pairs
        },
    }


def withheld(reason: str) -> dict[str, Any]:
    """What stands in the place of numbers that are not given."""
    return {"withheld": one_line(reason)[:200]}


def read_numbers(told: Any, names: Sequence[str], fewest: int) -> dict[str, Any]:
    """What an owner gave, checked: only metrics that were asked for, over at least `fewest` prompts.

    Raises ValueError for anything else.
    """
    if not isinstance(told, dict):
        raise ValueError("its numbers are no JSON object")
    if set(told) == {"withheld"} and isinstance(told["withheld"], str):
        return withheld(told["withheld"])
    if set(told) != {"num_rows", "num_prompts", "models", "differences"}:
        raise ValueError("its numbers have other fields than they must have")
    counts = [told["num_rows"], told["num_prompts"]]
    if not all(type(count) is int for count in counts) or not fewest <= counts[1] <= counts[0] < 10**9:
        raise ValueError(f"its numbers are of fewer than {counted(fewest, 'test row')} with different prompts")
    pairs = [f"{one}-{other}" for one, other in PAIRS]
    return {
        "num_rows": counts[0],
        "num_prompts": counts[1],
        "models": _read_group(told["models"], MODELS, names),
        "differences": _read_group(told["differences"], pairs, names),
    }


def mean_of(found: Mapping[str, float]) -> PrivateMean:
    """A recorded mean."""
    return PrivateMean(float(found["mean"]), float(found["se"]))


def estimate(name: str, one: PrivateMean, num_prompts: int) -> Estimate:
    """A mean with its 95 % interval: Student's t, Wilson's for a share."""
    if name in SHARES and 0 <= one.mean <= 1:
        low, high = share_interval(one.mean, num_prompts)
        return Estimate(one.mean, (round(low, 9), round(high, 9)))
    found = difference_estimate(one, num_prompts - 1)
    if name == "loss":
        return found
    # a score is in 0..1
    low, high = found.interval
    return Estimate(found.mean, (max(0.0, low), min(1.0, high)))


def difference_estimate(one: PrivateMean, degrees: float) -> Estimate:
    """A mean with Student's interval."""
    reach = student_quantile(max(1, int(degrees))) * one.error
    return Estimate(one.mean, (round(one.mean - reach, 9), round(one.mean + reach, 9)))


def unpaired(one: PrivateMean, other: PrivateMean, counts: tuple[int, int]) -> Estimate:
    """The first mean less the second, of rows that cannot be paired any more, by Welch's approximation: its interval
    is wider than that of paired rows where hard rows are hard for both."""
    squares = (one.error**2, other.error**2)
    error = math.sqrt(sum(squares))
    below = sum(square**2 / (count - 1) for square, count in zip(squares, counts, strict=True))
    return difference_estimate(
        PrivateMean(round(one.mean - other.mean, 9), error), sum(squares) ** 2 / below if below else 1
    )


def _mean(values: Numbers, weights: Numbers | None, prompts: Sequence[Hashable]) -> PrivateMean:
    """The mean by weight, and its standard error from the residuals, summed by prompt."""
    weights = np.ones(len(values)) if weights is None else weights
    mean = float(np.sum(values * weights) / np.sum(weights))
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    places = np.array([numbers[prompt] for prompt in prompts])
    residuals = np.bincount(places, weights * (values - mean), minlength=len(numbers))
    size = len(numbers)
    error = math.sqrt(size / (size - 1) * float(np.sum(residuals**2))) / float(np.sum(weights))
    return PrivateMean(round(mean, 9), round(error, 9))


def _read_group(told: Any, owners: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    if not isinstance(told, dict) or set(told) - set(owners):
        raise ValueError("its numbers are of other models than base, global and personal")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for owner in [owner for owner in owners if owner in told]:
        if not isinstance(told[owner], dict) or set(told[owner]) - set(names):
            raise ValueError("its numbers hold a metric that was not asked for")
        found[owner] = {name: _read_mean(told[owner][name]) for name in PRIVATE_METRICS if name in told[owner]}
    return found


def _read_mean(told: Any) -> dict[str, float]:
    if not isinstance(told, dict) or set(told) != {"mean", "se"}:
        raise ValueError("a number has other fields than mean and se")
    if not all(type(value) is float and math.isfinite(value) for value in told.values()) or told["se"] < 0:
        raise ValueError("a mean or a standard error is no number")
    return {"mean": told["mean"], "se": told["se"]}
