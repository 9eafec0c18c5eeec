"""What a method promises: the laws hold it to this, and a promise that is not made is not tried.

A promise that is None is not made. `promises_of` takes from the row and the code what they say, so that the author of a
method adds little more than `combines`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedlora.config.method_check import Combines
from fedlora.laws.federation_of_one_round import adapter
from fedlora.methods.choosing import LoadedMethod
from fedlora.types import Half

ROUNDS = (1, 2, 3, 4)

Alone = Literal["factors", "product", "A", "nothing"]
Keeps = Literal["both", "A", "B", "none"]
Ranks = Literal["one", "product", "directions"]


@dataclass(frozen=True)
class Promises:
    """The promises of one method.

    combines: the product that a round leaves is the mean of the clients' products ("products": exact); the best
    approximation of it that has the adapter's rank ("cut"); or that of mean factors ("factors"); it is picked from the
    middle of the clients' ("middle"); or nothing is combined ("nothing").
    is_weighted: a client counts by its examples.
    weighs_by_norm: a client counts by the length of its product.
    sees_mean: the server computes from nothing but the mean of the adapters, weighted by examples or not.
    has_global: a round leaves one adapter for everybody.
    trains, shares, travels: which factors, in rounds 1, 2, ..., repeated.
    alone: what one client or equal clients give: that client's "factors"; its "product"; or only A of it.
    keeps: which factors of its own adapter a client starts from in its next round; "none": it starts at the server's.
    has_own_model: beside what it sends, a client trains a model that stays with it.
    rests: clients that send what they got leave the global product as it is.
    server_rewrites: the server may change factors that are not shared in a round.
    draws_anew: every round begins with another untrained adapter.
    slots: the names of the server's state; a round leaves no other.
    fewest: the fewest updates that move the server.
    order_matters: a round depends on which client is which.
    ranks: a smaller rank is refused ("one"), or equal clients of it give their "product", beside it what no client sent
    ("directions").
    settings: options under which the laws are stated; `plain`: with which the server goes to the mean as well.
    """

    combines: Combines | None
    is_weighted: bool | None
    weighs_by_norm: bool = False
    sees_mean: bool = False
    has_global: bool = True
    trains: tuple[Half, ...] = ("both",)
    shares: tuple[Half | None, ...] = ("both",)
    travels: tuple[Half | None, ...] = ("both",)
    alone: Alone | None = "factors"
    keeps: Keeps | None = "none"
    has_own_model: bool = False
    rests: bool = True
    server_rewrites: bool = False
    draws_anew: bool = False
    slots: frozenset[str] | None = frozenset()
    fewest: int = 1
    order_matters: bool = False
    ranks: Ranks | None = "one"
    settings: Mapping[str, Any] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(default_factory=dict)

    def of_round(self, halves: Sequence[Half | None], number: int) -> Half | None:
        """The entry of `trains`, `shares` or `travels` for a round."""
        return halves[(number - 1) % len(halves)]


ALONE: Mapping[str | None, Alone | None] = {
    "products": "product",
    "cut": "product",
    "factors": "factors",
    "middle": "factors",
    "nothing": "nothing",
    None: None,
}
"""`combines` -> what one client gives."""


def promises_of(method: LoadedMethod, given: Mapping[str, Any]) -> Promises:
    """The promises that a method makes by its row and its code, with those in `given` in place of some."""
    combines = given.get("combines", None if method.combines else "nothing")
    state = method.server.init(adapter(0), tuple(range(7)))
    downloads = [method.server.broadcast(state, 0, number) for number in ROUNDS]
    shares = tuple(one.shared for one in downloads)
    alone = "A" if combines == "factors" and set(shares) == {"A"} else ALONE.get(combines)
    found: dict[str, Any] = {
        "combines": combines,
        "is_weighted": None if method.rows_weigh is None else method.weighs_rows,
        "sees_mean": method.server_sees == "mean" and method.order == "parallel",
        "has_global": method.has_global_model,
        "trains": tuple(one.trainable for one in downloads),
        "shares": shares,
        "travels": tuple(one.travels for one in downloads),
        "alone": alone,
        "keeps": None if method.keeps_personal_model else "none",
        "server_rewrites": method.rewrites_factors is not False,
        "draws_anew": method.adds_to_base is not False,
        "slots": None,
        "fewest": method.server.fewest_clients,
        "order_matters": method.order == "chain",
        "ranks": "one" if method.ranks_may_differ is False and combines != "nothing" else None,
    }
    return Promises(**{**found, **given})
