"""How much one client may move the global adapter: the length of its update and its share of the weights.

Clipping bounds what a client that sends a hundred times its update can do; it does not tell good from bad, and a
patient attacker stays below every bound. The norm is that of the whole update, all tensors together (Sun et al. 2019,
"Can You Really Backdoor Federated Learning?", arXiv 1911.07963).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.federated.adapters import difference_norm
from fedlora.types import AdapterState, ClientId


@dataclass(frozen=True)
class Limits:
    """`norm`: longest update; `norm_ratio`: the same in medians of the cohort; `weight`: largest share of weights."""

    norm: float | None = None
    norm_ratio: float | None = None
    weight: float = 1.0

    def longest(self, norms: Sequence[float]) -> float:
        """The norm at which updates are clipped, infinite without a limit; `norms` are those of the cohort."""
        limits = [math.inf if self.norm is None else self.norm]
        if self.norm_ratio is not None and norms:
            limits.append(self.norm_ratio * statistics.median(norms))
        return min(limits)


def clip_update(start: AdapterState, sent: AdapterState, longest: float) -> tuple[AdapterState, float]:
    """`start + (sent - start) * min(1, longest / norm)`, and the norm before; computed in float64.

    An update within the limit comes back as it is, to the bit.
    """
    norm = difference_norm(sent, start)
    if norm <= longest:
        return sent, norm
    scale = longest / norm
    return {key: _scale(start[key], value, scale) for key, value in sent.items()}, norm


def cap_counts(counts: Mapping[ClientId, int], share: float) -> dict[ClientId, int]:
    """Counts lowered so that none is more than `share` of their sum: `min(n, c)` with the largest whole `c`.

    Where `share` is less than an equal part, all become equal: no weights could do better.
    """
    # the share of the largest, c / sum(min(n, c)), never falls as c grows
    fits, above = 1, max(counts.values(), default=1) + 1
    while above - fits > 1:
        middle = (fits + above) // 2
        if middle <= share * sum(min(count, middle) for count in counts.values()):
            fits = middle
        else:
            above = middle
    return {client: min(count, fits) for client, count in counts.items()}


def _scale(start: Tensor, sent: Tensor, scale: float) -> Tensor:
    base = start.to(torch.float64)
    return (base + (sent.to(torch.float64) - base) * scale).to(torch.float32)
