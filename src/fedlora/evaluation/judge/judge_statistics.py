"""What verdicts on a number of prompts can show: win rate, length, positions, each with its interval.

A sample scores 1 for a win, 0 for a loss and 1/2 for a tie. Rows with one prompt are not independent: intervals
resample prompts, and the sign test counts each prompt once.

Judges prefer long answers. The length-controlled win rate is that of answers of equal length under a logistic
regression of the scores on tanh(d / sd(d)), where d is the difference of the answers' lengths (Dubois et al.,
Length-Controlled AlpacaEval, arXiv 2404.04475; without its term for the difficulty of a prompt, which needs many
models).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedlora.evaluation.intervals import DRAWS, LEVEL, bootstrap_interval, mean_interval, share_interval, sign_test

Outcome = Literal["win", "tie", "loss"]
OUTCOMES: tuple[Outcome, ...] = ("win", "tie", "loss")
_SCORES: dict[Outcome, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}
POWER = 0.8
_RIDGE = 1e-3
"""Keeps the regression finite where length alone separates wins from losses; without effect elsewhere."""
_MOST_STEPS, _LONGEST_STEP, _CLOSE = 60, 2.0, 1e-10

Numbers = NDArray[np.floating]


@dataclass(frozen=True)
class JudgedSample:
    """One sample after both orders; scores (1 to 100) are means of the two, `outcome` is ours against the baseline."""

    category: str
    baseline_score: float
    proposed_score: float
    outcome: Outcome
    flipped: bool
    prompt: Hashable
    baseline_length: int
    """Characters, as `proposed_length`."""
    proposed_length: int
    slots: tuple[int, int]
    """How often the answer shown first was preferred, and the second; a tie counts for neither."""
    agreed: bool
    """Whether both orders say the same of the answers."""
    contradictions: int
    """Verdicts for the answer with the lower score."""
    repeats_agreed: float | None = None
    """The share of pairs of repeats of one question with the same verdict; None where nothing was repeated."""

    @property
    def score(self) -> float:
        """1 for a win, 1/2 for a tie, 0 for a loss."""
        return _SCORES[self.outcome]


def smallest_difference(prompts: int) -> float:
    """How far from 1/2 a win rate must be for so many prompts to show it, at the level of the intervals and with POWER.

    From the normal approximation, for scores that are never ties; with ties a smaller difference shows.
    """
    normal = NormalDist()
    quantiles = normal.inv_cdf((1 + LEVEL) / 2) + normal.inv_cdf(POWER)
    return min(0.5, quantiles * 0.5 / math.sqrt(prompts))


def describe_verdicts(samples: Sequence[JudgedSample], *, draws: int = DRAWS) -> dict[str, Any]:
    """Rates in 0..1 over `samples`, at least one; intervals are [low, high]."""
    prompts = {sample.prompt for sample in samples}
    agreed = sum(sample.agreed for sample in samples) / len(samples)
    return {
        **_win_rate(samples, draws),
        "sign_test_p": _sign_test(samples),
        "num_prompts": len(prompts),
        "smallest_difference": smallest_difference(len(prompts)),
        "order_consistency": agreed,
        "order_consistency_interval": list(share_interval(agreed, len(samples))),
        **_repeats(samples, draws),
        **_first_slot(samples, draws),
        "score_contradictions": sum(sample.contradictions for sample in samples),
        "length": _describe_length(samples, draws),
        "categories": {
            category: {"num_samples": len(of), **_win_rate(of, draws)}
            for category in sorted({sample.category for sample in samples})
            for of in ([sample for sample in samples if sample.category == category],)
        },
    }


def _win_rate(samples: Sequence[JudgedSample], draws: int) -> dict[str, Any]:
    scores, prompts = [sample.score for sample in samples], [sample.prompt for sample in samples]
    interval = _constant_interval(scores, prompts) or mean_interval(scores, prompts, draws=draws)
    return {"win_rate_ties_half": math.fsum(scores) / len(scores), "interval": list(interval)}


def _constant_interval(scores: Sequence[float], prompts: Sequence[Hashable]) -> tuple[float, float] | None:
    """Where all outcomes are alike, of which no resample knows any other: by Wilson's limit on the share of others."""
    if len(set(scores)) > 1:
        return None
    value, most_others = scores[0], share_interval(0.0, len(set(prompts)))[1]
    return value - most_others * value, value + most_others * (1 - value)


def _sign_test(samples: Sequence[JudgedSample]) -> float:
    totals: defaultdict[Hashable, float] = defaultdict(float)
    for sample in samples:
        totals[sample.prompt] += sample.score - 0.5
    return sign_test(sum(total > 0 for total in totals.values()), sum(total < 0 for total in totals.values()))


def _repeats(samples: Sequence[JudgedSample], draws: int) -> dict[str, Any]:
    """How often a judge says the same when it is asked again; nothing where it was not."""
    asked = [sample for sample in samples if sample.repeats_agreed is not None]
    if not asked:
        return {}
    shares, prompts = [sample.repeats_agreed or 0.0 for sample in asked], [sample.prompt for sample in asked]
    share = math.fsum(shares) / len(shares)
    alike = share in (0.0, 1.0)
    interval = share_interval(share, len(set(prompts))) if alike else mean_interval(shares, prompts, draws=draws)
    return {"repeat_consistency": share, "repeat_consistency_interval": list(interval)}


def _first_slot(samples: Sequence[JudgedSample], draws: int) -> dict[str, Any]:
    """The share of verdicts for an answer that chose the one shown first; None where all are ties."""
    deciding = [sample for sample in samples if any(sample.slots)]
    if not deciding:
        return {"first_slot_preference": None, "first_slot_interval": None}
    decided = np.array([sum(sample.slots) for sample in deciding], dtype=float)
    first, prompts = np.array([sample.slots[0] for sample in deciding], dtype=float), [one.prompt for one in deciding]
    share = float(first.sum() / decided.sum())
    if share in (0.0, 1.0):
        # no resample knows any other
        interval = share_interval(share, len(set(prompts)))
    else:
        interval = bootstrap_interval(lambda weights: (weights @ first) / (weights @ decided), prompts, draws=draws)
    return {"first_slot_preference": share, "first_slot_interval": list(interval)}


def _describe_length(samples: Sequence[JudgedSample], draws: int) -> dict[str, Any]:
    """Mean lengths in characters, the win rate by which answer is longer, and that of answers of equal length."""
    scores, prompts = np.array([sample.score for sample in samples]), [sample.prompt for sample in samples]
    more = np.array([sample.proposed_length - sample.baseline_length for sample in samples], dtype=float)
    spread = more.std()
    term = np.tanh(more / spread) if spread else more * 0.0
    interval = _constant_interval(scores.tolist(), prompts) or bootstrap_interval(
        lambda weights: rate_at_equal_length(weights, scores, term), prompts, draws=draws
    )
    return {
        "baseline_mean": sum(sample.baseline_length for sample in samples) / len(samples),
        "proposed_mean": sum(sample.proposed_length for sample in samples) / len(samples),
        "win_rate_by_longer": {
            name: {"num_samples": int(of.sum()), "win_rate_ties_half": float(scores[of].mean()) if of.any() else None}
            for name, of in (("proposed", more > 0), ("baseline", more < 0), ("neither", more == 0))
        },
        "controlled_win_rate": float(rate_at_equal_length(np.ones((1, len(samples))), scores, term)[0]),
        "controlled_interval": list(interval),
    }


def rate_at_equal_length(weights: Numbers, scores: Numbers, term: Numbers) -> Numbers:
    """(draws,): logistic(b0) of the regression logit(score) = b0 + b1 * term, for each line of `weights` (draws, rows).

    `scores` (rows,) are in 0..1. By Newton's method, steps limited to 2.
    """
    found = np.zeros((2, len(weights)))
    for _ in range(_MOST_STEPS):
        chances = _logistic(found[0][:, None] + found[1][:, None] * term)
        rest = weights * (scores - chances)
        spread = weights * chances * (1 - chances)
        slope = rest.sum(axis=1) - _RIDGE * found[0], rest @ term - _RIDGE * found[1]
        a, b, c = spread.sum(axis=1) + _RIDGE, spread @ term, spread @ term**2 + _RIDGE
        step = np.array([c * slope[0] - b * slope[1], a * slope[1] - b * slope[0]]) / (a * c - b * b)
        found += np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)
        if np.abs(step).max() < _CLOSE:
            break
    return _logistic(found[0])


def _logistic(values: Numbers) -> Numbers:
    return 1 / (1 + np.exp(-np.clip(values, -500, 500)))
