"""What every mode promises, one row each; identities.py holds it to its row.

A new mode gets a row here, and a test fails until it has one. Where a server takes a step of its own, `plain` names the
hyper-parameters with which it goes exactly to the mean, so that the laws of means reach it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from fedlora.types import Half

Value = TypeVar("Value")


@dataclass(frozen=True)
class Properties:
    """The promises of one mode.

    combines: the product that a round leaves is the mean of the clients' products ("products": exact); the best
    approximation of it that has the adapter's rank ("cut"); or that of mean factors ("factors"); it is picked from the
    middle of the clients' ("middle"); or nothing is combined ("nothing").
    draws_anew: every round begins with another untrained adapter.
    has_own_model: beside what it sends, a client trains a model that stays with it.
    weighs_by_norm: a client weighs what its product is long.
    trains, shares, travels: which factors, in rounds 1, 2, ..., repeated.
    keeps: which factors of its own adapter a client goes on with in its next round; "none": it starts at the server's.
    alone: what one client or equal clients give: that client's "factors"; its "product"; or only A of it.
    ranks: a smaller rank is refused ("one"), or equal clients of it give their "product", beside it what nobody sent
    ("directions").
    settings: hyper-parameters under which the laws are stated; `plain`: with which the server goes to the mean as well.
    """

    combines: Literal["products", "cut", "factors", "middle", "nothing"]
    is_weighted: bool
    weighs_by_norm: bool = False
    has_global: bool = True
    trains: tuple[Half, ...] = ("both",)
    shares: tuple[Half | None, ...] = ("both",)
    travels: tuple[Half | None, ...] = ("both",)
    alone: Literal["factors", "product", "A", "nothing"] = "factors"
    keeps: Half | Literal["none"] = "none"
    has_own_model: bool = False
    keeps_control: bool = False
    pulls: bool = False
    server_rewrites: bool = False
    draws_anew: bool = False
    slots: frozenset[str] = frozenset()
    fewest: int = 1
    order_matters: bool = False
    ranks: Literal["one", "product", "directions"] = "one"
    settings: Mapping[str, float] = field(default_factory=dict)
    plain: Mapping[str, float] = field(default_factory=dict)

    def of_round(self, halves: tuple[Value, ...], number: int) -> Value:
        """The entry of `trains`, `shares` or `travels` for a round."""
        return halves[(number - 1) % len(halves)]


MEAN = Properties("factors", is_weighted=True)
MIDDLE = Properties("middle", is_weighted=False, fewest=3)
FAR = {"server_learning_rate": 2e12, "server_tau": 1e12, "server_beta1": 0.0}
"""With v at tau ** 2 an adaptive server divides by 2 tau, whatever the change."""
ADAPTIVE = {**FAR, "server_beta2": 1 - 1e-14}

PROPERTIES: dict[str, Properties] = {
    "homo": MEAN,
    "seq": Properties("products", is_weighted=True, order_matters=True),
    "none": Properties(
        "nothing",
        is_weighted=False,
        has_global=False,
        shares=(None,),
        travels=(None,),
        alone="nothing",
        keeps="both",
    ),
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
    "zeropad": Properties("factors", is_weighted=True, ranks="directions"),
    "hetlora": Properties(
        "factors",
        is_weighted=False,
        weighs_by_norm=True,
        slots=frozenset({"ranks"}),
        ranks="directions",
        settings={"prune_to": 1.0},
    ),
    "fedex": Properties("products", is_weighted=True),
    "flora": Properties(
        "products",
        is_weighted=True,
        travels=(None,),
        alone="product",
        server_rewrites=True,
        draws_anew=True,
        ranks="product",
    ),
    "ditto": Properties("factors", is_weighted=True, has_own_model=True),
    "feddpa": Properties("factors", is_weighted=True, has_own_model=True),
    "finetune": MEAN,
    "flexlora": Properties("cut", is_weighted=True, alone="product", server_rewrites=True, ranks="product"),
}
