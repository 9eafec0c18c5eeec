"""The mean of clients' changes with a bounded part of each and noise on their sum: DP-FedAvg.

McMahan et al., ICLR 2018 (arXiv 1710.06963): every client of a Poisson cohort gives its change scaled to a norm of at
most C, all with the same weight; Gaussian noise of standard deviation z C lies on the sum, which is divided by the
fixed number q N, not by how many came. So an empty cohort is a round like any other: noise alone. What a server then
does with this mean, momentum or a singular value decomposition, costs no further privacy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.federated.adapters import difference_norm
from fedlora.federated.privacy.randomness import Secret
from fedlora.types import AdapterState, ClientId


@dataclass(frozen=True)
class ClientMechanism:
    """`rate` q, largest norm `clip` C (one norm over all tensors sent), `noise_multiplier` z."""

    rate: float
    clip: float
    noise_multiplier: float

    def draw_cohort(self, clients: Sequence[ClientId], secret: Secret, round_number: int) -> tuple[ClientId, ...]:
        """Each client with probability q, independently, in ascending order; the cohort may be empty."""
        return tuple(client for client in sorted(clients) if secret.uniform("cohort", round_number, client) < self.rate)

    def private_mean(
        self,
        start: AdapterState,
        sent: Iterable[AdapterState],
        num_clients: int,
        secret: Secret,
        round_number: int,
    ) -> dict[str, Tensor]:
        """`start + (sum of clipped changes + noise) / (q N)` in the type of `start`, over the keys of `start`.

        `num_clients` is N, all that could have been drawn. Summed in float64 in the order given.
        """
        total = {key: torch.zeros(value.shape, dtype=torch.float64) for key, value in start.items()}
        for state in sent:
            for key, change in clip_change(start, state, self.clip).items():
                total[key] += change
        scale = self.noise_multiplier * self.clip
        result = {}
        for index, key in enumerate(sorted(start)):
            if scale:
                total[key] += scale * secret.normal(start[key].shape, "client_noise", round_number, index)
            mean = total[key] / (self.rate * num_clients)
            result[key] = (start[key].to(torch.float64) + mean).to(start[key].dtype)
        return result


def clip_change(start: AdapterState, sent: AdapterState, clip: float) -> dict[str, Tensor]:
    """`(sent - start) * min(1, clip / norm)` in float64, one norm over all tensors; a change of zero stays zero."""
    if sent.keys() != start.keys():
        raise ValueError("a client sent other tensors than it was asked for, and its norm would not bound them")
    norm = difference_norm(sent, start)
    scale = 1.0 if norm <= clip else clip / norm
    return {key: (sent[key].to(torch.float64) - value.to(torch.float64)) * scale for key, value in start.items()}
