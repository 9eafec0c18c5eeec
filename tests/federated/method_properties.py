"""What every mode promises, one row each; identities.py holds it to its row.

A new mode gets a row here, and a test fails until it has one. Where a server takes a step of its own, `plain` names the
hyper-parameters with which it goes exactly to the mean, so that the laws of means reach it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedlora.types import Half


@dataclass(frozen=True)
class Properties:
    """The promises of one mode.

    combines: the product that a round leaves is the mean of the clients' products ("products": exact); or that of mean
    factors ("factors"); it is picked from the middle of the clients' ("middle"); or nothing is combined ("nothing").
    trains, shares, travels: which factors, in rounds 1, 2, ..., repeated.
    keeps: which factors of its own adapter a client goes on with in its next round; "none": it starts at the server's.
    alone: what one client or equal clients give: that client's "factors"; its "product"; or only A of it.
    """

    combines: Literal["products", "factors", "middle", "nothing"]
    is_weighted: bool
    has_global: bool = True
    trains: tuple[Half, ...] = ("both",)
    shares: tuple[Half, ...] = ("both",)
    travels: tuple[Half, ...] = ("both",)
    alone: Literal["factors", "product", "A", "nothing"] = "factors"
    keeps: Half | Literal["none"] = "none"
    keeps_control: bool = False
    pulls: bool = False
    server_rewrites: bool = False
    slots: frozenset[str] = frozenset()
    fewest: int = 1
    order_matters: bool = False
    has_unequal_ranks: bool = False
    plain: Mapping[str, float] = field(default_factory=dict)

    def of_round(self, halves: tuple[Half, ...], number: int) -> Half:
        """The entry of `trains`, `shares` or `travels` for a round."""
        return halves[(number - 1) % len(halves)]


MEAN = Properties("factors", is_weighted=True)
MIDDLE = Properties("middle", is_weighted=False)
FAR = {"server_learning_rate": 2e12, "server_tau": 1e12, "server_beta1": 0.0}
"""With v at tau ** 2 an adaptive server divides by 2 tau, whatever the change."""
ADAPTIVE = {**FAR, "server_beta2": 1 - 1e-14}

PROPERTIES: dict[str, Properties] = {
    "homo": MEAN,
    "seq": Properties("products", is_weighted=True, order_matters=True),
    "none": Properties("nothing", is_weighted=False, has_global=False, alone="nothing", keeps="both"),
    "pooled": Properties("products", is_weighted=True),
    "fedavgm": Properties("factors", is_weighted=True, slots=frozenset({"velocity"}), plain={"server_momentum": 0.0}),
    "fedadagrad": Properties("factors", is_weighted=True, slots=frozenset({"mean", "variance"}), plain=FAR),
    "fedadam": Properties("factors", is_weighted=True, slots=frozenset({"mean", "variance"}), plain=ADAPTIVE),
    "fedyogi": Properties("factors", is_weighted=True, slots=frozenset({"mean", "variance"}), plain=ADAPTIVE),
    "diloco": Properties(
        "factors",
        is_weighted=False,
        slots=frozenset({"momentum"}),
        plain={"server_learning_rate": 1.0, "server_momentum": 0.0},
    ),
    "fedprox": Properties("factors", is_weighted=True, pulls=True),
    "scaffold": Properties("factors", is_weighted=False, slots=frozenset({"control"}), keeps_control=True),
    "ffa": Properties("products", is_weighted=True, trains=("B",), shares=("B",), travels=("B",)),
    "rolora": Properties("products", is_weighted=True, trains=("B", "A"), shares=("B", "A")),
    "fedsvd": Properties(
        "products", is_weighted=True, trains=("B",), shares=("B",), alone="product", server_rewrites=True
    ),
    "fedrot": Properties("factors", is_weighted=True, alone="product"),
    "fedsa": Properties(
        "factors", is_weighted=True, has_global=False, shares=("A",), travels=("A",), alone="A", keeps="B"
    ),
    "median": MIDDLE,
    "trimmed_mean": MIDDLE,
    "krum": Properties("middle", is_weighted=False, fewest=5),
    "multi_krum": Properties("middle", is_weighted=False, fewest=5),
    "geometric_median": MIDDLE,
}
