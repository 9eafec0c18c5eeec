"""Which clients form the cohort of a round.

The cohort depends on (seed, round) alone, so all methods that are compared under one seed have the same clients in the
same rounds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from fedlora.seeds import derive_seed
from fedlora.types import ClientId


def cohort_size(fraction: float, num_clients: int) -> int:
    """`max(1, ceil(fraction * n - 1e-9))`: 0.29 of 100 is 29, and at least one client."""
    if not (math.isfinite(fraction) and 0 < fraction <= 1):
        raise ValueError(f"client fraction {fraction} is not in (0, 1]")
    return max(1, math.ceil(fraction * num_clients - 1e-9))


def draw_cohort(
    clients: Sequence[ClientId], *, how: str, fraction: float, seed: int, round_number: int
) -> tuple[ClientId, ...]:
    """The cohort of a round in ascending client order; `how` is random, all or round_robin."""
    ordered = sorted(clients)
    if how == "all":
        return tuple(ordered)
    size = cohort_size(fraction, len(ordered))
    if how == "round_robin":
        first = (round_number - 1) * size
        return tuple(sorted(ordered[(first + offset) % len(ordered)] for offset in range(size)))
    draw = random.Random(derive_seed(seed, "cohort", round_number))  # noqa: S311 - reproducible, not secret
    return tuple(sorted(draw.sample(ordered, size)))
