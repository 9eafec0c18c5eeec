"""From a row of the table to a method at work: its two halves loaded, with the hyper-parameters of a run.

`seq` has no code of its own: it is FedAvg over waves of one client, so a wave's mean is that client's adapter and the
next client starts from it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, cast

from fedlora.config.train import TrainConfig
from fedlora.methods.combinations import check_ranks
from fedlora.methods.fedavg import FedAvg, TrainAndSend
from fedlora.methods.own_options import OF_THE_RUN, make_half
from fedlora.methods.row import Method
from fedlora.methods.strategy import ClientRule, Strategy
from fedlora.methods.table import METHODS
from fedlora.paths import POOLED
from fedlora.seeds import derive_seed
from fedlora.types import ClientId, ServerState

Half = TypeVar("Half", Strategy, ClientRule)

Wave = tuple[tuple[ClientId, tuple[ClientId, ...]], ...]
"""The members of a wave, each with the clients whose rows it trains on."""

_RECORDED = ("client_ranks", "is_guarded")
"""Those that run.json has beside the options."""


@dataclass(frozen=True)
class LoadedMethod(Method):
    """A row whose halves are instances, with a value for every option."""

    server: Strategy = field(default_factory=FedAvg)
    client: ClientRule = field(default_factory=TrainAndSend)
    has_global_model: bool = True
    keeps_personal_model: bool = False

    def __post_init__(self) -> None:
        """Its options are those of its row."""

    @property
    def weighs_rows(self) -> bool:
        """Whether a client counts by its examples."""
        return self.counts_rows(self.hyperparameters)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Option -> the value it has, and the clients' ranks where the method takes some: what run.json records."""
        found = {option.name: getattr(_half_with(self, option.name), option.name) for option in self.options}
        return found | {name: getattr(self.server, name) for name in _RECORDED if hasattr(self.server, name)}

    def with_values(self, values: Mapping[str, Any]) -> LoadedMethod:
        """The same method with other values; each goes to the half that has a field of its name."""
        return replace(self, server=_with(self.server, values), client=_with(self.client, values))

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


def load_method(method: str | Method, values: Mapping[str, Any] | None = None) -> LoadedMethod:
    """A method, or the built-in one of this name, with its row's defaults, and `values` in place of some of them."""
    row = METHODS[method] if isinstance(method, str) else method
    server, client = make_half(row.server), make_half(row.client)
    facts = {field.name: getattr(row, field.name) for field in fields(row)}
    # two facts that can be asked of the halves where a row does not state them
    if row.has_global_model is None:
        facts["has_global_model"] = server.global_adapter(ServerState({})) is not None
    if row.keeps_personal_model is None:
        facts["keeps_personal_model"] = client.own_ranks > 0
    made = LoadedMethod(**{**facts, "server": server, "client": client})
    return made.with_values({**row.values({}), **(values or {})})


def choose_method(config: TrainConfig, recorded: Mapping[str, Any] | None = None) -> LoadedMethod:
    """The method that a configuration names, with its options and what a half may know of the run.

    `recorded` are the hyper-parameters of a run that is gone on with: what its configuration leaves open stays as it
    was when the run started, whatever the defaults are now. Raises UsageError where the ranks do not fit the clients.
    """
    check_ranks(config)
    kept = {name: value for name, value in (recorded or {}).items() if config.method.option(name)}
    run = {name: getattr(config, name) for name in OF_THE_RUN if name != "is_guarded"}
    # runs that were started before robust servers were guarded go on as they began
    run["is_guarded"] = recorded is None or recorded.get("is_guarded", False)
    return load_method(config.method, {**kept, **config.method_options, **run})


def _own_fields(half: Strategy | ClientRule) -> set[str]:
    return {field.name for field in fields(cast(Any, half))}


def _half_with(method: LoadedMethod, name: str) -> Strategy | ClientRule:
    return method.server if name in _own_fields(method.server) else method.client


def _with(half: Half, values: Mapping[str, Any]) -> Half:
    own = _own_fields(half)
    return replace(cast(Any, half), **{name: value for name, value in values.items() if name in own})
