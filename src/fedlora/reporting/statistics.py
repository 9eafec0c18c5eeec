"""How far a measured share can be trusted: a bootstrap over the test rows.

The rows themselves are not needed: drawing n rows with replacement from n rows of which a share p is right gives a
binomial number of right ones. Rows are drawn inside their category, as the test set was. The interval covers the
choice of test rows alone, not the luck of training; where every share is 0 or 1 it has no width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedlora.seeds import derive_seed

_DRAWS = 10_000
_SEED = 0


def macro_interval(shares: Mapping[str, float], counts: Mapping[str, int]) -> tuple[float, float]:
    """The 95 % percentile interval of the plain mean over `shares` (category -> 0..1) of `counts` test rows.

    The same input gives the same interval: the draws have a fixed seed.
    """
    names = sorted(shares)
    sizes = np.array([counts[name] for name in names])
    generator = np.random.default_rng(derive_seed(_SEED, "bootstrap"))
    right = generator.binomial(sizes, [shares[name] for name in names], size=(_DRAWS, len(names)))
    low, high = np.percentile((right / sizes).mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def seed_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of the mean over seeds; None for fewer than two.

    Of three values every 27th resample is three times the smallest, so the interval reaches from the smallest to the
    largest: it says how far the seeds lie apart, and not much more.
    """
    if len(values) < 2:
        return None
    generator = np.random.default_rng(derive_seed(_SEED, "bootstrap/seeds"))
    drawn = generator.integers(0, len(values), size=(_DRAWS, len(values)))
    low, high = np.percentile(np.asarray(values, dtype=np.float64)[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
