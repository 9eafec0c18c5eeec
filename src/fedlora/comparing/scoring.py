"""Score a trained run on held-out rows: the loss per category of every adapter it left.

Losses are means per response token. Nothing here trains, and nothing is read but committed rounds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.data.records import read_rows
from fedlora.engines.losses import Groups, Losses, LossMeter
from fedlora.files import sha256_of_json
from fedlora.llm.base_model import BaseModel
from fedlora.methods.table import find_recorded
from fedlora.paths import OutputName, RunPaths
from fedlora.rows import MIXED
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.run_folder import read_run
from fedlora.runs.saved_adapters import adapter_file, find_personal
from fedlora.types import AdapterState


@dataclass(frozen=True)
class Hop:
    """A moment of a run: an adapter that then was the global one, and the steps taken up to it."""

    round: int
    client_id: int | None
    steps: int
    file: Path


class Scorer:
    """One base with the LoRA layers of a configuration, measuring adapters of their shape."""

    def __init__(self, base: BaseModel, config: TrainConfig) -> None:
        self.meter = LossMeter(base, config)
        self.base_identity = base.identity.record() if base.identity else None
        self.config = config
        self._groups: dict[Path, Groups] = {}

    def losses(self, adapter: AdapterState | None, rows_file: Path) -> Losses:
        """The loss on every category of a file; None is the base model."""
        return self.meter.measure(adapter, self._read(rows_file))

    def score_file(self, file: Path, rows_file: Path) -> Losses:
        """`losses` of a stored adapter."""
        return self.meter.measure_file(file, self._read(rows_file))

    def score_run(self, paths: RunPaths, rows_file: Path) -> dict[str, Any]:
        """Losses of what a run's last round left: of the global adapter, if there is one, and of the clients' own."""
        last = self.config.num_communication_rounds
        found: dict[str, Any] = {"global": None, "clients": {}}
        if read_run(paths).has_global_model:
            found["global"] = self.score_file(adapter_file(paths, last, OutputName("global")), rows_file)
        for client, file in find_personal(paths, last).items():
            found["clients"][str(client)] = self.score_file(file, rows_file)
        return found

    def score_own_rows(self, paths: RunPaths, rows_file: Path, groups: Mapping[str, str]) -> dict[str, Any]:
        """The loss of every test row of each client (client -> its group of rows), summed over its tokens: under the
        global adapter of the last round, if there is one, and under the clients' own."""
        last = self.config.num_communication_rounds
        shared = adapter_file(paths, last, OutputName("global")) if read_run(paths).has_global_model else None
        personal = find_personal(paths, last)
        own = {str(client): file for client, file in personal.items() if str(client) in groups}
        return {
            **self._describe_rows(rows_file, groups),
            "global": self._measure_rows(dict.fromkeys(groups, shared), rows_file, groups) if shared else None,
            "clients": self._measure_rows(own, rows_file, groups),
        }

    def base_own_rows(self, rows_file: Path, groups: Mapping[str, str]) -> dict[str, Any]:
        """`score_own_rows` of the base model."""
        base = self._measure_rows(dict.fromkeys(groups), rows_file, groups)
        return {**self._describe_rows(rows_file, groups), "global": base, "clients": {}}

    def _measure_rows(
        self, files: Mapping[str, Path | None], rows_file: Path, groups: Mapping[str, str]
    ) -> dict[str, list[float]]:
        encoded = self._read(rows_file)
        found = {client: self.meter.measure_rows(file, encoded[groups[client]]) for client, file in files.items()}
        return {client: [round(value, 6) for value in values] for client, values in found.items()}

    def _describe_rows(self, rows_file: Path, groups: Mapping[str, str]) -> dict[str, Any]:
        """Response tokens of each client's rows, and what is alike for rows of one prompt."""
        encoded, prompts = self._read(rows_file), defaultdict[str, list[str]](list)
        for row in read_rows(rows_file, rules=MIXED):
            if row.output.strip():
                prompts[row.category].append(sha256_of_json(list(row.prompt))[:16])
        return {
            "tokens": {client: [one.num_labels for one in encoded[name]] for client, name in groups.items()},
            "prompts": {client: prompts[name] for client, name in groups.items()},
        }

    def score_hops(self, paths: RunPaths, rows_file: Path) -> list[dict[str, Any]]:
        """Losses all along a run with a global adapter."""
        return [
            {
                "round": hop.round,
                "client": hop.client_id,
                "steps": hop.steps,
                "losses": self.score_file(hop.file, rows_file),
            }
            for hop in find_hops(paths)
        ]

    def _read(self, rows_file: Path) -> Groups:
        if rows_file not in self._groups:
            rows = read_rows(rows_file, rules=MIXED)
            self._groups[rows_file] = self.meter.encode(rows, [row.category for row in rows])
        return self._groups[rows_file]


def find_hops(paths: RunPaths) -> list[Hop]:
    """The global adapters of a run: after every client of `seq`, after every round of other methods.

    After a client of `seq` the global adapter is that client's; the last one is the round's.
    """
    recorded = read_run(paths)
    rows = MetricsLog(paths.metrics_file).rows()
    hops: list[Hop] = []
    steps = 0
    for number in paths.committed_rounds():
        lines = [row for row in rows if row["kind"] == "client" and row["round"] == number]
        if find_recorded(recorded.mode, recorded.method).order == "chain":
            for line in sorted(lines, key=lambda row: row["wave"]):
                steps += line["num_steps"]
                client = int(line["client_id"])
                hops.append(Hop(number, client, steps, adapter_file(paths, number, OutputName("client", client))))
        else:
            steps += sum(line["num_steps"] for line in lines)
            hops.append(Hop(number, None, steps, adapter_file(paths, number, OutputName("global"))))
    return hops


def measure_spending(paths: RunPaths) -> dict[str, Any]:
    """What a run took, as its metrics say: steps, tokens, bytes down and up, seconds of its rounds; and the mean and
    the last of what the error meter found, where it measured; the epsilon that was spent, where a run is private."""
    rounds = list(_round_lines(paths))
    spent: dict[str, Any] = {name: sum(row[name] for row in rounds) for name in SPENT}
    spent["rounds"] = len(rounds)
    spent["quarantined"] = sum(len(row["quarantined"]) for row in rounds)
    errors = [row["aggregation_error"] for row in rounds if row.get("aggregation_error") is not None]
    spent["aggregation_error"] = sum(errors) / len(errors) if errors else None
    spent["last_aggregation_error"] = errors[-1] if errors else None
    spent["epsilon"] = (rounds[-1].get("privacy") or {}).get("epsilon") if rounds else None
    return spent


SPENT = ("num_steps", "num_tokens", "bytes_down", "bytes_up", "seconds")


def _round_lines(paths: RunPaths) -> Iterator[Mapping[str, Any]]:
    for row in MetricsLog(paths.metrics_file).rows():
        if row["kind"] == "round" and row["round"] > 0:
            yield row
