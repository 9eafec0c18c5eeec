"""How far several judges agree on the same samples, beyond what chance brings.

With p the share of pairs of judges that agree and e what chance brings, kappa is (p - e) / (1 - e): 1 for perfect
agreement, 0 for that of chance. Two judges: Cohen's, in which each has its own shares of outcomes (Educational and
Psychological Measurement 1960). More: Fleiss', with one set of shares for all (Psychological Bulletin 1971).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.evaluation.intervals import DRAWS, bootstrap_interval, share_interval
from fedlora.evaluation.judge.judge_statistics import OUTCOMES, Outcome

_ALMOST_SURE = 1e-12
"""Of the difference of 1 and the agreement by chance: with all outcomes alike there is no kappa."""

Numbers = NDArray[np.floating]


def describe_agreement(
    outcomes: Sequence[Sequence[Outcome]], prompts: Sequence[Hashable], *, draws: int = DRAWS
) -> dict[str, Any]:
    """Agreement of two judges or more: `outcomes` has a line for each, with an outcome for each sample (at least one).

    `prompts` has the prompt of each sample: intervals resample these. `kappa` is None where all outcomes are alike.
    """
    chosen = np.array([[[outcome == one for one in OUTCOMES] for outcome in line] for line in outcomes], dtype=float)
    kind, measure = ("cohen", cohen_kappa) if len(chosen) == 2 else ("fleiss", fleiss_kappa)
    observed = _share_of_pairs(chosen)
    return {
        "kappa_of": kind,
        **_with_interval(chosen, measure, prompts, draws),
        "same_outcome": float(observed.mean()),
        "num_samples": len(prompts),
    }


def describe_pairs(
    names: Sequence[str], outcomes: Sequence[Sequence[Outcome]], prompts: Sequence[Hashable], *, draws: int = DRAWS
) -> list[dict[str, Any]]:
    """`describe_agreement` of every two judges, with their names under `judges`."""
    return [
        {"judges": [names[one], names[other]]}
        | describe_agreement([outcomes[one], outcomes[other]], prompts, draws=draws)
        for one, other in combinations(range(len(names)), 2)
    ]


def cohen_kappa(weights: Numbers, chosen: Numbers) -> Numbers:
    """(draws,): of two judges; `weights` (draws, samples), `chosen` (2, samples, outcomes) with 1 for each outcome."""
    shares = weights @ chosen / weights.sum(axis=1, keepdims=True)
    return _beyond_chance(weights, chosen, (shares[0] * shares[1]).sum(axis=1))


def fleiss_kappa(weights: Numbers, chosen: Numbers) -> Numbers:
    """(draws,): of two judges or more, `chosen` (judges, samples, outcomes)."""
    shares = weights @ chosen.mean(axis=0) / weights.sum(axis=1, keepdims=True)
    return _beyond_chance(weights, chosen, (shares**2).sum(axis=1))


def _beyond_chance(weights: Numbers, chosen: Numbers, chance: Numbers) -> Numbers:
    """NaN where chance alone brings agreement on everything."""
    observed = weights @ _share_of_pairs(chosen) / weights.sum(axis=1)
    rest = 1 - chance
    return np.divide(observed - chance, rest, out=np.full(len(weights), np.nan), where=rest > _ALMOST_SURE)


def _share_of_pairs(chosen: Numbers) -> Numbers:
    """(samples,): the share of pairs of judges that chose the same outcome."""
    judges, counts = len(chosen), chosen.sum(axis=0)
    return (counts * (counts - 1)).sum(axis=1) / (judges * (judges - 1))


def _with_interval(
    chosen: Numbers, measure: Callable[[Numbers, Numbers], Numbers], prompts: Sequence[Hashable], draws: int
) -> dict[str, Any]:
    value = float(measure(np.ones((1, len(prompts))), chosen)[0])
    if np.isnan(value):
        return {"kappa": None, "interval": None}
    if value == 1.0:
        # no resample knows a disagreement: Wilson's limit on their share, with as much agreement by chance
        chance = float((chosen.mean(axis=(0, 1)) ** 2).sum())
        least = share_interval(1.0, len(set(prompts)))[0]
        return {"kappa": value, "interval": [(least - chance) / (1 - chance), 1.0]}
    return {
        "kappa": value,
        "interval": list(bootstrap_interval(lambda weights: measure(weights, chosen), prompts, draws=draws)),
    }
