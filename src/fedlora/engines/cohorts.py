"""Choose the clients of a round, and check that a run over these clients is possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedlora.config.train import TrainConfig
from fedlora.errors import TrainingError, UsageError
from fedlora.federated.sampling import draw_cohort
from fedlora.methods.choosing import LoadedMethod, choose_method
from fedlora.methods.table import METHODS
from fedlora.plain_text import counted
from fedlora.runs.run_records import RunRecord
from fedlora.types import ClientId


def choose_cohort(
    config: TrainConfig, method: LoadedMethod, clients: Sequence[ClientId], number: int
) -> tuple[ClientId, ...]:
    """Who takes part in a round of a run over these clients; with client-level privacy a stand-in of the usual size."""
    if method.server.asks_everybody(number):
        return tuple(clients)
    return draw_cohort(
        clients,
        how=config.client_selection_strategy,
        fraction=config.client_selection_frac,
        seed=config.seed,
        round_number=number,
    )


def resolve_method(config: TrainConfig, clients: Sequence[ClientId], recorded: RunRecord | None) -> LoadedMethod:
    """The method of a run over the clients that have rows; UsageError or TrainingError where such a run is impossible.

    No model is needed: a command asks this before it loads one, and passes the method on.
    """
    method = choose_method(config, recorded.more.get("hyperparameters") if recorded else None)
    check_clients(config, method, clients)
    return method


def check_clients(config: TrainConfig, method: LoadedMethod, clients: Sequence[ClientId]) -> None:
    """TrainingError when no client has a row to train on, UsageError when cohorts are too small for `min_clients` or
    for what the method needs."""
    if not clients:
        raise TrainingError("no client has a row to train on", hint="check the client files")
    size, fewest = len(choose_cohort(config, method, clients, 1)), count_fewest(config, method)
    if config.max_client_weight * size < 1:
        raise UsageError(
            f"max_client_weight={config.max_client_weight:g} is not possible: the largest of "
            f"{counted(size, 'client')} has at "
            f"least 1/{size} of the weights",
            hint=f"raise it to {1 / size:.3g} or more",
        )
    if not method.pools_rows and size < fewest:
        asks = f"min_clients={fewest}" if fewest == config.min_clients else f"{config.federation_mode} needs {fewest}"
        raise UsageError(
            f"{asks}, but a cohort has {size} of the {counted(len(clients), 'client')}",
            hint="raise --client_selection_frac, or lower what is asked for",
        )
    if fault := method.server.find_cohort_fault(size):
        option, _, _ = fault.partition("=")
        raise UsageError(
            f"federation_mode={config.federation_mode}: {fault}",
            hint=f"raise --client_selection_frac, change --{option}, or leave it out",
        )


def find_cohort_doubts(
    config: TrainConfig, method: LoadedMethod, clients: Sequence[ClientId]
) -> Iterator[tuple[str, str]]:
    """Warnings about the cohorts of a run before its first round, each with a hint."""
    if method.hyperparameters.get("is_guarded") is False:
        yield (
            f"the run was started when {method.name} could combine all clients, and continues so",
            "start a new run to withstand hostile clients",
        )
    is_single = len(choose_cohort(config, method, clients, 1)) == 1 < len(clients)
    if is_single and method.combines and method.order == "parallel":
        chains = " or ".join(row.name for row in METHODS.values() if row.order == "chain")
        yield (
            f"a cohort is one of {counted(len(clients), 'client')} "
            f"(client_selection_frac={config.client_selection_frac:g}), so "
            f"federation_mode={config.federation_mode} has nothing to combine",
            f"raise --client_selection_frac, or use --federation_mode {chains}",
        )


def count_fewest(config: TrainConfig, method: LoadedMethod) -> int:
    """The fewest usable updates of a round: by the user's choice and by the method's need."""
    return 1 if method.pools_rows else max(config.min_clients, method.server.fewest_clients)
