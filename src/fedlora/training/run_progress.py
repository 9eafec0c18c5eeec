"""How far a run is, counted in the examples that it trains on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.console import Progress
from fedlora.federated.sampling import cohort_size
from fedlora.methods.choosing import LoadedMethod
from fedlora.types import ClientUpdate


class RunProgress(Progress):
    """Progress of a run whose rounds up to `done` are committed; `rows` are their lines in metrics.jsonl.

    An example counts as often as it is trained on. `sizes` are the examples of the clients that have some.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: LoadedMethod,
        sizes: Sequence[int],
        *,
        done: int,
        rows: Iterable[Mapping[str, Any]],
    ) -> None:
        self._passes = config.local_num_epochs * method.num_trainings
        before = self._passes * sum(row["num_examples"] for row in rows if row["kind"] == "client")
        ahead = self._passes * round(sum(sizes) * _shares_ahead(config, method, len(sizes), done))
        label = f"train {config.exp_name} ({config.federation_mode})"
        super().__init__(label, before + max(1, ahead), "examples", done=before)

    def count(self, update: ClientUpdate, is_kept: bool) -> None:
        """Show the loss of an update; one that was kept from before an interruption counts as done by then."""
        self.note = f"loss {update.metrics['loss']:.3f}"
        if is_kept:
            self.skip(update.num_examples * self._passes)


def _shares_ahead(config: TrainConfig, method: LoadedMethod, clients: int, done: int) -> float:
    """How often the remaining rounds train on everybody's examples, about: cohorts are drawn round by round."""
    share = 1.0
    if clients and config.client_selection_strategy != "all":
        share = cohort_size(config.client_selection_frac, clients) / clients
    ahead = range(done + 1, config.num_communication_rounds + 1)
    return sum(1.0 if method.server.asks_everybody(number) else share for number in ahead)
