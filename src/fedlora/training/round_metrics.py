"""The measurements after a round: the held-out loss, and the lines of metrics.jsonl.

The held-out rows of `val_data_path` are only looked at, never trained on: their loss is measured before the
first round and after each, for the global adapter or, where there is none, for every client's. Where clients have
personal models beside a global one, these are measured on the client's held-back rows and on the held-out ones.
Private metrics are measured by those who have the test rows, and stand in a line of kind `private` for each client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.engines.client_data import ClientExamples
from fedlora.engines.private_metrics import Asked, Owners
from fedlora.federated.base_delta import background_of
from fedlora.llm.background import as_background
from fedlora.llm.examples import Example
from fedlora.llm.local_training import Trainer
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.reader import RunReader
from fedlora.training.round_text import say_numbers
from fedlora.types import ClientId, RoundResult


class RoundMetrics:
    """Measures rounds and writes them down; `best` is the round that validated best so far."""

    def __init__(
        self,
        trainer: Trainer,
        clients: ClientExamples,
        held_out: Sequence[Example],
        reader: RunReader,
        log: MetricsLog,
        *,
        has_personal: bool = False,
        config: TrainConfig | None = None,
        owners: Owners | None = None,
    ) -> None:
        self.trainer = trainer
        self.clients = clients
        self.held_out = list(held_out)
        self.reader = reader
        self.log = log
        self.has_personal = has_personal
        self.config = config
        self.owners = owners
        self.best: dict[str, Any] | None = None
        self._accepted: dict[ClientId, int] = {}
        """Client -> the last round that has an update of it."""

    def start(self) -> None:
        """The base model's own loss, as round 0."""
        if self._has_validation():
            self.log.append(
                {"kind": "round", "round": 0, "val_loss": self.trainer.validate(None, self._shared_validation())}
            )

    def remember(self, row: Mapping[str, Any]) -> None:
        """Compare a round's line with the best so far, and note whose updates are in it."""
        self._accepted |= dict.fromkeys(row.get("cohort", ()), row["round"])
        if row["round"] > 0 and "val_loss" in row and (self.best is None or row["val_loss"] < self.best["val_loss"]):
            self.best = {"round": row["round"], "val_loss": row["val_loss"]}

    def record(self, result: RoundResult, seconds: float) -> dict[str, Any]:
        """Validate what a round left and write its lines; returns the round's line."""
        records = [dict(record) for record in result.records]
        num_labels = sum(record["num_response_tokens"] for record in records)
        row: dict[str, Any] = {
            "kind": "round",
            "round": result.round,
            "cohort": [record["client_id"] for record in records],
            "quarantined": [failure.record() for failure in result.failures],
            # nobody trained on anything where a private cohort is empty
            "loss": sum(r["loss"] * r["num_response_tokens"] for r in records) / num_labels if num_labels else None,
            "seconds": seconds,
        }
        if result.privacy is not None:
            row["privacy"] = {name: result.privacy[name] for name in ("unit", "epsilon", "delta", "accountant")}
        for name in ("num_steps", "num_tokens", "bytes_down", "bytes_up"):
            row[name] = sum(record[name] for record in records)
        row |= result.metrics
        if result.global_adapter is not None:
            if self._has_validation():
                # on the additions themselves: what the round leaves for PEFT may be cut to a rank
                row["val_loss"] = self.trainer.validate(
                    result.global_adapter, self._shared_validation(), background=background_of(result.base)
                )
            if self.has_personal:
                row |= self._validate_personal(result.round, records)
        else:
            self._validate_clients(result.round, records)
            losses = [record["val_loss"] for record in records if "val_loss" in record]
            if losses:
                row["val_loss"] = sum(losses) / len(losses)
        self.remember(row)
        numbers = self._measure_privately(result)
        if numbers and "privacy" in row:
            row["privacy"] |= {"without_noise": ["private_metrics"]}
        # the numbers of a round are committed with its line
        for line in [*records, *numbers, row]:
            self.log.append(line)
        return row

    def _measure_privately(self, result: RoundResult) -> list[dict[str, Any]]:
        """A line for each client, where numbers of the clients' own test rows are asked for after this round."""
        config, owners = self.config, self.owners
        if config is None or owners is None:
            return []
        if not config.measures_privately(result.round, config.num_communication_rounds):
            return []
        asked = Asked(result.round, self.clients.clients(), self._accepted, result.global_adapter, result.base)
        found = owners.measure(asked)
        say_numbers(found, self.clients.names)
        return [
            {"kind": "private", "round": result.round, "client_id": client, **found[client]} for client in sorted(found)
        ]

    def _validate_clients(self, round_number: int, records: list[dict[str, Any]]) -> None:
        """Without a global adapter every client of the cohort is validated on the held-out rows, or on its held-back
        ones."""
        for record in records:
            client = record["client_id"]
            examples = self.held_out or self.clients.own_validation(client)
            if examples:
                adapter = self.reader.read_memory(client, round_number).adapter
                if adapter is not None:  # None: it stays where the client is
                    record["val_loss"] = self.trainer.validate(adapter, [examples])

    def _validate_personal(self, round_number: int, records: list[dict[str, Any]]) -> dict[str, float]:
        """Validate the cohort's personal models on held-back rows and on the held-out ones; the means for the round."""
        for record in records:
            client = record["client_id"]
            adapter = self.reader.read_memory(client, round_number).adapter
            own = self.clients.own_validation(client)
            if adapter is None or not (own or self.held_out):
                continue
            # of any rank, so beside the layers and not in them
            beside = as_background(adapter, self.trainer.lora.spec.scaling)
            record["val_loss_personal"] = self.trainer.validate(None, [own or self.held_out], background=beside)
            if own and self.held_out:
                record["val_loss_personal_shared"] = self.trainer.validate(None, [self.held_out], background=beside)
        means = {}
        for name in ("val_loss_personal", "val_loss_personal_shared"):
            if losses := [record[name] for record in records if name in record]:
                means[name] = sum(losses) / len(losses)
        return means

    def _has_validation(self) -> bool:
        return bool(self.held_out) or any(facts.num_validation for facts in self.clients.facts.values())

    def _shared_validation(self) -> Iterable[list[Example]]:
        """The held-out rows; without them what the clients held back, one client after another."""
        return [self.held_out] if self.held_out else self.clients.validation()
