"""The learning rate at a step of a run.

The position in the run follows from the round and the step alone, so a client that joins late or
resumes is where everybody else is.
"""

from __future__ import annotations

import math


def learning_rate(
    kind: str, peak: float, *, round_number: int, step: int, steps_per_round: int, rounds: int, warmup: int = 0
) -> float:
    """Learning rate of `step` (from 0) in `round_number` (from 1).

    `kind` is constant, linear or cosine over all rounds, or linear_per_round, which decays to zero
    within each round (and warms up in each). Warm-up rises linearly over the first `warmup` steps.
    """
    if kind == "linear_per_round":
        position, total = step, steps_per_round
    else:
        position, total = (round_number - 1) * steps_per_round + step, rounds * steps_per_round
    if position < warmup:
        return peak * (position + 1) / warmup
    share = (position - warmup) / max(1, total - warmup)
    if kind == "constant":
        return peak
    if kind in ("linear", "linear_per_round"):
        return peak * (1 - share)
    if kind == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * share))
    raise ValueError(f"unknown schedule {kind!r}")
