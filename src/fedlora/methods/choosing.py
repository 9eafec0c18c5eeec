"""The table of federation modes: what the server does, what a client does, who goes when.

`seq` has no code of its own: it is FedAvg over waves of one client, so a wave's mean is that
client's adapter and the next client starts from it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast

from fedlora.config.train import HYPERPARAMETERS, TrainConfig
from fedlora.errors import UsageError
from fedlora.federated.privacy.combinations import check_privacy
from fedlora.methods.ditto import TrainBoth
from fedlora.methods.fedavg import FedAvg, TrainAndSend
from fedlora.methods.feddpa import TrainLocalBeside
from fedlora.methods.fedex import FedEx
from fedlora.methods.fedprox import ProximalTraining
from fedlora.methods.fedrot import FedRot, RotateAndSend
from fedlora.methods.fedsa import FedSa, KeepB
from fedlora.methods.finetune import AverageThenPart, SendThenKeep
from fedlora.methods.flexlora import FlexLora
from fedlora.methods.flora import FLora
from fedlora.methods.hetlora import HetLora, PruneAndSend
from fedlora.methods.local_only import KeepOwn, NoServer
from fedlora.methods.one_factor import FedSvd, FfaLora, RoLora
from fedlora.methods.robust import CoordinateMedian, GeometricMedian, Krum, MultiKrum, TrimmedMean
from fedlora.methods.scaffold import ControlledTraining, Scaffold
from fedlora.methods.server_adaptive import FedAdagrad, FedAdam, FedYogi
from fedlora.methods.server_momentum import DiLoCo, FedAvgM
from fedlora.methods.strategy import ClientRule, Strategy
from fedlora.methods.zero_padding import ZeroPadding
from fedlora.paths import POOLED
from fedlora.seeds import derive_seed
from fedlora.types import ClientId, ServerState

Half = TypeVar("Half", Strategy, ClientRule)

Wave = tuple[tuple[ClientId, tuple[ClientId, ...]], ...]
"""The members of a wave, each with the clients whose rows it trains on."""


@dataclass(frozen=True)
class Mode:
    """One row of the table; `order` says how a cohort becomes waves."""

    strategy: Strategy
    rule: ClientRule
    order: Literal["parallel", "chain", "pooled"]

    def with_hyperparameters(self, given: Mapping[str, Any]) -> Mode:
        """The same method with other values; each goes to whichever half has a field of its name."""
        return replace(self, strategy=_with(self.strategy, given), rule=_with(self.rule, given))

    def waves(self, cohort: Sequence[ClientId], *, shuffle: bool, seed: int, round_number: int) -> tuple[Wave, ...]:
        """parallel: everybody in one wave; chain: one client a wave; pooled: one trainer with everybody's rows."""
        members = sorted(cohort)
        if self.order == "pooled":
            return (((POOLED, tuple(members)),),)
        if self.order == "parallel":
            return (tuple((client, (client,)) for client in members),)
        if shuffle:
            random.Random(derive_seed(seed, "seq_order", round_number)).shuffle(members)  # noqa: S311
        return tuple(((client, (client,)),) for client in members)


MODES: dict[str, Mode] = {
    "homo": Mode(FedAvg(), TrainAndSend(), "parallel"),
    "seq": Mode(FedAvg(), TrainAndSend(), "chain"),
    "none": Mode(NoServer(), KeepOwn(), "parallel"),
    "pooled": Mode(FedAvg(), TrainAndSend(), "pooled"),
    "fedavgm": Mode(FedAvgM(), TrainAndSend(), "parallel"),
    "fedadagrad": Mode(FedAdagrad(), TrainAndSend(), "parallel"),
    "fedadam": Mode(FedAdam(), TrainAndSend(), "parallel"),
    "fedyogi": Mode(FedYogi(), TrainAndSend(), "parallel"),
    "diloco": Mode(DiLoCo(), TrainAndSend(), "parallel"),
    "fedprox": Mode(FedAvg(), ProximalTraining(), "parallel"),
    "scaffold": Mode(Scaffold(), ControlledTraining(), "parallel"),
    "ffa": Mode(FfaLora(), TrainAndSend(), "parallel"),
    "rolora": Mode(RoLora(), TrainAndSend(), "parallel"),
    "fedsvd": Mode(FedSvd(), TrainAndSend(), "parallel"),
    "fedrot": Mode(FedRot(), RotateAndSend(), "parallel"),
    "fedsa": Mode(FedSa(), KeepB(), "parallel"),
    "fedex": Mode(FedEx(), TrainAndSend(), "parallel"),
    "flora": Mode(FLora(), TrainAndSend(), "parallel"),
    "median": Mode(CoordinateMedian(), TrainAndSend(), "parallel"),
    "trimmed_mean": Mode(TrimmedMean(), TrainAndSend(), "parallel"),
    "krum": Mode(Krum(), TrainAndSend(), "parallel"),
    "multi_krum": Mode(MultiKrum(), TrainAndSend(), "parallel"),
    "geometric_median": Mode(GeometricMedian(), TrainAndSend(), "parallel"),
    "zeropad": Mode(ZeroPadding(), TrainAndSend(), "parallel"),
    "hetlora": Mode(HetLora(), PruneAndSend(), "parallel"),
    "flexlora": Mode(FlexLora(), TrainAndSend(), "parallel"),
    "ditto": Mode(FedAvg(), TrainBoth(), "parallel"),
    "feddpa": Mode(FedAvg(), TrainLocalBeside(), "parallel"),
    "finetune": Mode(AverageThenPart(), SendThenKeep(), "parallel"),
}

OF_THE_RUN = ("lora_scaling", "num_communication_rounds")
"""What a half may know of the run it is part of, by the name of its field: no choice of the method's own."""


def choose_mode(config: TrainConfig) -> Mode:
    """The row that a configuration names, with its hyper-parameters in place of the defaults.

    A flag reaches whichever of the two halves has a field of its name. Raises UsageError for one that neither has, and
    for combinations that cannot be right.
    """
    name, mode = config.federation_mode, MODES[config.federation_mode]
    given = {key: value for key in HYPERPARAMETERS if (value := getattr(config, key)) is not None}
    known = hyperparameters_of(mode)
    _check_ranks(config, mode)
    if foreign := sorted(given.keys() - known.keys()):
        hint = f"its own are {', '.join(sorted(known))}" if known else "it has none of its own"
        raise UsageError(f"federation_mode={name} has no {', '.join(foreign)}", hint=hint)
    if config.max_client_weight < 1 and not mode.strategy.is_weighted:
        raise UsageError(
            f"federation_mode={name} gives every client the same weight, or one that rows do not decide",
            hint="leave --max_client_weight out",
        )
    if config.optimizer_state == "keep" and mode.strategy.turns_factors:
        raise UsageError(
            f"federation_mode={name} hands out other factors than a client left, so kept moments would mean nothing",
            hint="leave --optimizer_state at reset",
        )
    if config.optimizer_state == "keep" and mode.rule.num_phases > 1:
        raise UsageError(
            f"federation_mode={name} trains {mode.rule.num_phases} adapters of a client, and one's moments are not the "
            "other's",
            hint="leave --optimizer_state at reset",
        )
    chosen = {**known, **given}
    alone, rounds = chosen.get("personal_rounds", 0), config.num_communication_rounds
    if alone >= rounds:
        raise UsageError(
            f"federation_mode={name}: personal_rounds={alone} leaves none of the {rounds} rounds to train together in",
            hint="lower --personal_rounds, raise --num_communication_rounds, or use none",
        )
    if (export_rank := chosen.get("export_rank", config.lora_r)) < config.lora_r:
        raise UsageError(
            f"export_rank={export_rank} is below lora_r={config.lora_r}: not even the clients' rank would fit",
            hint="raise --export_rank",
        )
    if mode.rule.sends and config.limits_clients:
        raise UsageError(
            f"federation_mode={name} sends more than an adapter, and a limit on the adapter alone would not hold",
            hint="leave max_update_norm, max_update_norm_ratio and max_client_weight out",
        )
    check_privacy(config)
    return mode.with_hyperparameters(given | {key: getattr(config, key) for key in OF_THE_RUN})


def has_global_model(mode: Mode) -> bool:
    """Whether a round leaves one adapter for everybody; else every client has its own."""
    return mode.strategy.global_adapter(ServerState({})) is not None


def has_personal_models(mode: Mode) -> bool:
    """Whether clients come to have models of their own, beside a global one or instead."""
    return mode.rule.own_ranks > 0


def hyperparameters_of(mode: Mode) -> dict[str, Any]:
    """Name -> value of everything that the two halves of a mode let one choose."""
    own = {**asdict(cast(Any, mode.strategy)), **asdict(cast(Any, mode.rule))}
    return {name: value for name, value in own.items() if name not in OF_THE_RUN}


def _check_ranks(config: TrainConfig, mode: Mode) -> None:
    """UsageError where a mode has one rank for all, or where there are not as many ranks as clients."""
    ranks = config.client_ranks
    if ranks is None:
        return
    if not mode.strategy.takes_ranks:
        able = ", ".join(name for name, other in MODES.items() if other.strategy.takes_ranks)
        raise UsageError(
            f"federation_mode={config.federation_mode} combines factors of one shape, so all clients have one rank",
            hint=f"leave --client_ranks out, or take a mode for different ranks: {able}",
        )
    if len(ranks) != config.num_clients:
        raise UsageError(
            f"client_ranks names {len(ranks)} ranks, but there are {config.num_clients} clients",
            hint="give one rank a client, in the order of their numbers; 4x3 stands for 4,4,4",
        )


def _with(half: Half, given: Mapping[str, Any]) -> Half:
    own = {field.name for field in fields(cast(Any, half))}
    return replace(cast(Any, half), **{name: value for name, value in given.items() if name in own})
