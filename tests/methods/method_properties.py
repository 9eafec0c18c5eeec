"""What every built-in method promises, one row each; test_identities.py holds it to its row.

A new method gets a row here, and a test fails until it has one. The fields are explained in `fedlora.laws.promises`.
Where a server takes a step of its own, `plain` names the options with which it goes exactly to the mean, so that the
laws of means reach it too.
"""

from __future__ import annotations

from fedlora.laws.promises import Promises

MEAN = Promises("factors", is_weighted=True)
MIDDLE = Promises("middle", is_weighted=False, fewest=3)
FAR = {"server_learning_rate": 2e12, "server_tau": 1e12, "server_beta1": 0.0}
"""With v at tau ** 2 an adaptive server divides by 2 tau, whatever the change."""
ADAPTIVE = {**FAR, "server_beta2": 1 - 1e-14}

PROPERTIES: dict[str, Promises] = {
    "homo": MEAN,
    "seq": Promises("products", is_weighted=True, order_matters=True),
    "none": Promises(
        "nothing",
        is_weighted=False,
        has_global=False,
        shares=(None,),
        travels=(None,),
        alone="nothing",
        keeps="both",
    ),
    "pooled": Promises("products", is_weighted=True),
    "fedavgm": Promises("factors", is_weighted=True, slots=frozenset({"velocity"}), plain={"server_momentum": 0.0}),
    "fedadagrad": Promises("factors", is_weighted=True, slots=frozenset({"mean", "variance"}), plain=FAR),
    "fedadam": Promises("factors", is_weighted=True, slots=frozenset({"mean", "variance"}), plain=ADAPTIVE),
    "fedyogi": Promises("factors", is_weighted=True, slots=frozenset({"mean", "variance"}), plain=ADAPTIVE),
    "diloco": Promises(
        "factors",
        is_weighted=False,
        slots=frozenset({"momentum"}),
        plain={"server_learning_rate": 1.0, "server_momentum": 0.0},
    ),
    "fedprox": MEAN,
    "scaffold": Promises("factors", is_weighted=False, slots=frozenset({"control"})),
    "ffa": Promises("products", is_weighted=True, trains=("B",), shares=("B",), travels=("B",)),
    "rolora": Promises("products", is_weighted=True, trains=("B", "A"), shares=("B", "A")),
    "fedsvd": Promises(
        "products", is_weighted=True, trains=("B",), shares=("B",), alone="product", server_rewrites=True
    ),
    "fedrot": Promises("factors", is_weighted=True, alone="product"),
    "fedsa": Promises(
        "factors", is_weighted=True, has_global=False, shares=("A",), travels=("A",), alone="A", keeps="B"
    ),
    "median": MIDDLE,
    "trimmed_mean": MIDDLE,
    "krum": Promises("middle", is_weighted=False, fewest=5),
    "multi_krum": Promises("middle", is_weighted=False, fewest=5),
    "geometric_median": MIDDLE,
    "zeropad": Promises("factors", is_weighted=True, ranks="directions"),
    "hetlora": Promises(
        "factors",
        is_weighted=False,
        weighs_by_norm=True,
        slots=frozenset({"ranks"}),
        ranks="directions",
        settings={"prune_to": 1.0},
    ),
    "fedex": Promises("products", is_weighted=True),
    "flora": Promises(
        "products",
        is_weighted=True,
        travels=(None,),
        alone="product",
        server_rewrites=True,
        draws_anew=True,
        ranks="product",
    ),
    "ditto": Promises("factors", is_weighted=True, has_own_model=True),
    "feddpa": Promises("factors", is_weighted=True, has_own_model=True),
    "finetune": MEAN,
    "flexlora": Promises("cut", is_weighted=True, alone="product", server_rewrites=True, ranks="product"),
}
