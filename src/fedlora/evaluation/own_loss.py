"""A client's own loss: the loss on its categories, weighted like its training rows.

It is the expected loss on a new row of the client's kind. The training rows themselves would show what an adapter
memorised, not what the client gained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedlora.data.client_facts import ClientFacts


def client_shares(clients: Iterable[ClientFacts]) -> dict[str, dict[str, float]]:
    """Client -> category -> share of its training rows."""
    shares = {}
    for facts in clients:
        if total := sum(facts.categories.values()):
            shares[str(facts.client_id)] = {name: count / total for name, count in facts.categories.items()}
    return shares


def own_loss(losses: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """The expected loss on a row of a client's kind."""
    return sum(share * losses[category] for category, share in shares.items())


def own_losses(score: Mapping[str, Any], shares: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Client -> own loss, under its own adapter where it has one, else under the global one; clients without either
    (never selected, with a method without a global model) are absent."""
    return {
        client: own_loss(losses, mix)
        for client, mix in shares.items()
        if (losses := score["clients"].get(client) or score["global"]) is not None
    }


def mean_own_loss(score: Mapping[str, Any], shares: Mapping[str, Mapping[str, float]]) -> float:
    """Every client counts the same."""
    found = list(own_losses(score, shares).values())
    return sum(found) / len(found)
