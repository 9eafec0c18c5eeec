"""The rows of the method table: what the rest of the code knows of each method. No torch.

`_row` states what differs from FedAvg, so a fact that it leaves out is FedAvg's; `Method` alone leaves it unstated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedlora.methods import options
from fedlora.methods.row import Method

AVERAGE = Method(
    "homo",
    "average",
    "FedAvg: the mean of the clients' factors, weighted by examples",
    "McMahan et al. 2017, arXiv 1602.05629; on LoRA as FedIT, arXiv 2305.05644",
    server="fedlora.methods.fedavg:FedAvg",
    client="fedlora.methods.fedavg:TrainAndSend",
    server_sees="mean",
    rows_weigh=True,
    rewrites_factors=False,
    changes_client_training=False,
    asks_everybody=False,
    trains="once",
    ranks_may_differ=False,
    keeps_personal_model=False,
    has_global_model=True,
    adds_to_base=False,
    bound_to_length=False,
)


def _row(name: str, family: str, summary: str, paper: str, **differing: Any) -> Method:
    halves = {half: f"fedlora.methods.{differing.pop(half)}" for half in ("server", "client") if half in differing}
    return replace(AVERAGE, name=name, family=family, summary=summary, paper=paper, **halves, **differing)


BASIC = (
    AVERAGE,
    _row("seq", "average", "one client after another, each from what the one before left", "", order="chain"),
    _row(
        *("none", "baseline", "every client alone: nothing is shared", ""),
        server="local_only:NoServer",
        client="local_only:KeepOwn",
        server_sees="nothing",
        rows_weigh=False,
        changes_client_training=True,
        ranks_may_differ=True,
        keeps_personal_model=True,
        has_global_model=False,
        is_baseline=True,
    ),
    _row(
        *("pooled", "baseline", "one trainer on the rows of all clients: the baseline without federation", ""),
        order="pooled",
        is_baseline=True,
    ),
)

_REDDI = "Reddi et al. 2021, arXiv 2003.00295"
SERVER_OPTIMIZERS = (
    _row(
        *("fedavgm", "server optimizer", "momentum on the server", "Hsu et al. 2019, arXiv 1909.06335"),
        server="server_momentum:FedAvgM",
        options=(options.SERVER_LEARNING_RATE, options.SERVER_MOMENTUM),
    ),
    _row(
        *("fedadagrad", "server optimizer", "Adagrad on the server", _REDDI),
        server="server_adaptive:FedAdagrad",
        options=(options.ADAPTIVE[0], replace(options.BETA1, default=0.0), options.BETA2, options.TAU),
    ),
    _row(
        *("fedadam", "server optimizer", "Adam on the server", _REDDI),
        server="server_adaptive:FedAdam",
        options=options.ADAPTIVE,
    ),
    _row(
        *("fedyogi", "server optimizer", "Yogi on the server", _REDDI),
        server="server_adaptive:FedYogi",
        options=options.ADAPTIVE,
    ),
    _row(
        *("diloco", "server optimizer", "Nesterov momentum on the server, after many local steps"),
        "Douillard et al. 2023, arXiv 2311.08105",
        server="server_momentum:DiLoCo",
        options=(
            replace(options.SERVER_LEARNING_RATE, default=0.7),
            options.SERVER_MOMENTUM,
            options.SERVER_WEIGHTS,
        ),
        rows_weigh=("server_weights", "examples"),
    ),
)

CLIENT_DRIFT = (
    _row(
        *("fedprox", "client drift", "clients are held near the global adapter", "Li et al. 2020, arXiv 1812.06127"),
        client="fedprox:ProximalTraining",
        options=(options.PROXIMAL_MU,),
        changes_client_training=True,
    ),
    _row(
        *("scaffold", "client drift", "control variates correct the clients' gradients"),
        "Karimireddy et al. 2020, arXiv 1910.06378",
        server="scaffold:Scaffold",
        client="scaffold:ControlledTraining",
        options=(options.SERVER_LEARNING_RATE,),
        server_sees="mean and more",
        rows_weigh=False,
        changes_client_training=True,
    ),
)

ONE_FACTOR = (
    _row(
        *("ffa", "one factor", "A stays as it was drawn, B is trained and averaged: exact"),
        "Sun et al. 2024, arXiv 2403.12313",
        server="one_factor:FfaLora",
        changes_client_training=True,
    ),
    _row(
        *("rolora", "one factor", "B in odd rounds, A in even ones: exact", "Chen et al. 2025, arXiv 2502.01755"),
        server="one_factor:RoLora",
        changes_client_training=True,
        rewrites_factors=True,
    ),
    _row(
        *("fedsvd", "one factor", "B is trained, and A renewed by SVD of the product: exact"),
        "Lee et al. 2025, arXiv 2505.12805",
        server="one_factor:FedSvd",
        changes_client_training=True,
        rewrites_factors=True,
    ),
    _row(
        *("fedrot", "alignment", "clients turn their factors to the server's before the mean", "arXiv 2602.23638"),
        server="fedrot:FedRot",
        client="fedrot:RotateAndSend",
        options=(options.ROTATION_STRENGTH,),
        changes_client_training=True,
        rewrites_factors=True,
    ),
    _row(
        *("fedsa", "personal", "A is shared, B stays with its client", "Guo et al. 2025, arXiv 2410.01463"),
        server="fedsa:FedSa",
        client="fedsa:KeepB",
        changes_client_training=True,
        keeps_personal_model=True,
        has_global_model=False,
    ),
)

_PRODUCTS: dict[str, Any] = {"server_sees": "mean of products", "adds_to_base": True}
EXACT = (
    _row(
        *("fedex", "exact", "factors are averaged, and what that misses is added to the base"),
        "Singhal et al. 2025, arXiv 2410.09432",
        server="fedex:FedEx",
        options=(options.RESIDUAL_RANK, options.EXPORT_RANK),
        **_PRODUCTS,
    ),
    _row(
        *("flora", "exact", "the clients' factors are stacked into the base", "Wang et al. 2024, arXiv 2409.05976"),
        server="flora:FLora",
        options=(options.EXPORT_RANK,),
        rewrites_factors=True,
        ranks_may_differ=True,
        **_PRODUCTS,
    ),
)


_YIN, _BLANCHARD = "Yin et al. 2018, arXiv 1803.01498", "Blanchard et al. 2017, arXiv 1703.02757"
_SINGLE: dict[str, Any] = {"server_sees": "single updates", "rows_weigh": False}
ROBUST = (
    _row(*("median", "robust", "the median of every coordinate", _YIN), server="robust:CoordinateMedian", **_SINGLE),
    _row(
        *("trimmed_mean", "robust", "the mean of every coordinate without its extremes", _YIN),
        server="robust:TrimmedMean",
        options=(options.TRIMMED_SHARE,),
        **_SINGLE,
    ),
    _row(
        *("krum", "robust", "the one update that is nearest to the others", _BLANCHARD),
        server="robust:Krum",
        options=(options.NUM_HOSTILE, options.KRUM_SELECTED),
        **_SINGLE,
    ),
    _row(
        *("multi_krum", "robust", "the mean of the updates nearest to the others", _BLANCHARD),
        server="robust:MultiKrum",
        options=(options.NUM_HOSTILE, replace(options.KRUM_SELECTED, default=None)),
        **_SINGLE,
    ),
    _row(
        *(
            "geometric_median",
            "robust",
            "the point nearest to all updates",
            "Pillutla et al. 2022, arXiv 1912.13445",
        ),
        server="robust:GeometricMedian",
        options=options.WEISZFELD,
        **_SINGLE,
    ),
)

_CHO = "Cho et al. 2024, arXiv 2401.06432"
_SHAPES: dict[str, Any] = {"server_sees": "mean of several shapes", "ranks_may_differ": True}
SEVERAL_RANKS = (
    _row(
        *("zeropad", "different ranks", "adapters padded with zeros, then averaged", _CHO),
        server="zero_padding:ZeroPadding",
        options=(options.NORMALISATION,),
        **_SHAPES,
    ),
    _row(
        *("hetlora", "different ranks", "padding weighted by norm; clients prune their rank", _CHO),
        server="hetlora:HetLora",
        client="hetlora:PruneAndSend",
        options=(options.NORMALISATION, options.PRUNE_TO, options.TAIL_PENALTY),
        rows_weigh=False,
        changes_client_training=True,
        **_SHAPES,
    ),
    _row(
        *("flexlora", "different ranks", "the mean of products, cut by SVD to every client's rank"),
        "Bai et al. 2024, arXiv 2402.11505",
        server="flexlora:FlexLora",
        options=(options.SVD_SPLIT,),
        rewrites_factors=True,
        **_SHAPES,
    ),
)

_PERSONAL: dict[str, Any] = {"changes_client_training": True, "keeps_personal_model": True}
PERSONAL = (
    _row(
        *("ditto", "personal", "a personal model beside the global one, held near it"),
        "Li et al. 2021, arXiv 2012.04221",
        client="ditto:TrainBoth",
        options=(options.DITTO_LAMBDA,),
        trains="twice",
        **_PERSONAL,
    ),
    _row(
        *("feddpa", "personal", "the outputs of a global and a local adapter are mixed"),
        "Yang et al. 2024, arXiv 2403.19211",
        client="feddpa:TrainLocalBeside",
        options=(options.PERSONAL_WEIGHT,),
        trains="twice",
        **_PERSONAL,
    ),
    _row(
        *("finetune", "personal", "FedAvg, then every client for itself", ""),
        server="finetune:AverageThenPart",
        client="finetune:SendThenKeep",
        options=(options.PERSONAL_ROUNDS,),
        asks_everybody=True,
        bound_to_length=True,
        **_PERSONAL,
    ),
)

ROWS = (
    *BASIC,
    *SERVER_OPTIMIZERS,
    *CLIENT_DRIFT,
    *ONE_FACTOR,
    *EXACT,
    *ROBUST,
    *SEVERAL_RANKS,
    *PERSONAL,
)
