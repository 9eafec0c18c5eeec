"""The hyper-parameters of federated methods: type, limits, help and default of each. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fedlora.methods.row import Option

LEARNING_RATE = "step size of the server's optimizer"
SERVER_LEARNING_RATE = Option("server_learning_rate", 1.0, LEARNING_RATE, gt=0)
SERVER_MOMENTUM = Option("server_momentum", 0.9, "momentum of the server's optimizer, in [0, 1)", ge=0, lt=1)
BETA1 = Option("server_beta1", 0.9, "decay of the server's running mean, in [0, 1)", ge=0, lt=1)
BETA2 = Option("server_beta2", 0.99, "decay of the server's running variance, in [0, 1)", ge=0, lt=1)
TAU = Option("server_tau", 1e-3, "adaptivity: added to the root of the server's running variance", gt=0)
SERVER_WEIGHTS = Option(
    *("server_weights", "uniform", "what a client weighs in the server's mean: all the same, or by its examples"),
    Literal["uniform", "examples"],
)
ADAPTIVE = (replace(SERVER_LEARNING_RATE, default=1e-3), BETA1, BETA2, TAU)
EXPORT_RANK = Option(
    *("export_rank", 256, "largest rank of the adapter that a round leaves for PEFT; at least lora_r", int),
    ge=1,
    le=4096,
    at_least="lora_r",
)
NUM_HOSTILE = Option("num_hostile", 1, "hostile clients that a round withstands", int, ge=0)
KRUM_SELECTED = Option(
    *("krum_selected", 1, "clients nearest to the others whose mean is taken, at most clients - num_hostile", int),
    ge=1,
    if_none="clients - num_hostile - 2",
)
NORMALISATION = Option(
    "rank_normalisation",
    "all",
    "average a rank direction over all clients, or only over the participants whose rank includes it",
    Literal["all", "participants"],
)
ROTATION_STRENGTH = Option(
    "rotation_strength", 0.5, "how far factors are turned to the server's: 0 not at all, 1 all the way", ge=0, le=1
)
RESIDUAL_RANK = Option(
    *("residual_rank", None, "largest rank of what a round adds to the base", int), ge=1, if_none="all of it"
)
TRIMMED_SHARE = Option(
    *("trimmed_share", None, "share of the clients left out at each end, at least one", float),
    ge=0,
    lt=0.5,
    if_none="0.2",
)
PRUNE_TO = Option("prune_to", 0.99, "share of its rank that a client keeps when it prunes", gt=0, le=1)
TAIL_PENALTY = Option("tail_penalty", 1e-3, "strength of the penalty on the rank directions that may be pruned", ge=0)
SVD_SPLIT = Option(
    "svd_split", "b", "where singular values go: b, or balanced: their roots to both", Literal["b", "balanced"]
)
PERSONAL_ROUNDS = Option(
    *("personal_rounds", 1, "last rounds, in which every client trains alone", int),
    ge=1,
    below="num_communication_rounds",
)
WEISZFELD = (
    Option("weiszfeld_steps", 32, "steps towards the geometric median", int, ge=1),
    Option("weiszfeld_smoothing", 1e-6, "distance below which a client counts as met", gt=0),
)
PROXIMAL_MU = Option("proximal_mu", 0.01, "weight of the pull to the global adapter", ge=0)
DITTO_LAMBDA = Option("ditto_lambda", 0.1, "weight of the personal model's pull to the global one", ge=0)
PERSONAL_WEIGHT = Option("personal_weight", 0.5, "share of the local adapter in the output", ge=0, le=1)
