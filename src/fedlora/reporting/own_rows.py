"""Who gains by joining: every client's own test rows, under each model that could answer them.

Read from what `score` left row by row. A client's gain is a joint model's score less that of the adapter that it
trained alone, where a run of such a method is among those reported, else less the base's; both on the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.config.evaluate import ReportConfig
from fedlora.data.client_names import name_of_file
from fedlora.errors import UsageError
from fedlora.evaluation.score_table import Difference, Estimate, Measure, ScoreTable
from fedlora.files import read_json, read_text
from fedlora.paths import OutputName, ResultPaths
from fedlora.reporting.experiments import Experiment
from fedlora.reporting.summary import experiment_titles, global_title, in_report_order, personal_title

MEASURES = {"exact": True, "rougeL": False, "chrf": False}
"""What is compared -> whether it is a share of rows that are right."""
BASE = "base"


@dataclass(frozen=True)
class ClientGains:
    """One client: measure -> model -> its score on the client's test rows; `gains` has the joint models, less the
    `reference`."""

    client: str
    num_rows: int
    scores: Mapping[str, Mapping[str, Estimate]]
    reference: str
    gains: Mapping[str, Mapping[str, Difference]]

    def record(self) -> dict[str, Any]:
        return {
            "client": self.client,
            "num_rows": self.num_rows,
            "reference": self.reference,
            "scores": _records(self.scores),
            "gains": _records(self.gains),
        }


def find_gains(config: ReportConfig, experiments: Sequence[Experiment]) -> list[ClientGains]:
    """One entry for each client with test rows of its own that a joint model and its reference have answered.

    Only scores on the test rows of the first run that has any count, so that all are of the same rows.
    """
    scored = ScoredRows(config)
    for experiment in experiments:
        scored.find_tests(experiment)
    titles = experiment_titles(experiments)
    sources: dict[str, list[tuple[str, bool, _Rows]]] = {}
    for experiment in in_report_order(experiments):
        for client in experiment.clients:
            name = name_of_file(client["file"])
            for label, output, is_joint in _models(experiment, titles[experiment.name], client["client_id"]):
                rows = scored.rows_of(experiment, output, name)
                known = [other for other, *_ in sources.setdefault(name, [])]
                if rows and label not in known:
                    sources[name].append((label, is_joint, rows))
    return [gains for name, models in sources.items() if (gains := _compare(name, models))]


_Rows = list[dict[str, Any]]


def _models(experiment: Experiment, title: str, client: int) -> list[tuple[str, OutputName, bool]]:
    """Label and file of every model that may answer a client's rows, and whether others' rows are in it."""
    is_joint = experiment.method.combines
    own = f"alone ({title})"
    if is_joint:
        own = personal_title(experiment, title) if experiment.has_personal_models else f"{title}, its own"
    return [
        (BASE, OutputName("base"), False),
        (global_title(experiment, title), OutputName("global"), is_joint),
        (own, OutputName("client", client), is_joint),
    ]


class ScoredRows:
    """The row files of `score`, each read once; those on other test rows than the first are left out."""

    def __init__(self, config: ReportConfig) -> None:
        self._config = config
        self._tests = ""
        self._files: dict[tuple[str, int, OutputName], _Rows] = {}

    def find_tests(self, experiment: Experiment) -> None:
        """Take the test rows of this run's scores for those of all, unless an earlier run has some."""
        clients = (OutputName("client", client["client_id"]) for client in experiment.clients)
        for output in (OutputName("base"), OutputName("global"), *clients):
            self._load(experiment, output)

    def rows_of(self, experiment: Experiment, output: OutputName, client: str | None = None) -> _Rows:
        """The scores on one client's rows, or on all, in the order of the test rows; none where there are none."""
        rows = self._load(experiment, output)
        return rows if client is None else [row for row in rows if row.get("client") == client]

    def _load(self, experiment: Experiment, output: OutputName) -> _Rows:
        key = (experiment.name, experiment.round_number, output)
        if key not in self._files:
            self._files[key] = self._read(ResultPaths(self._config.rouge_dir, *key[:2]), output)
        return self._files[key]

    def _read(self, paths: ResultPaths, output: OutputName) -> _Rows:
        totals, file = paths.scores(output, ".json"), paths.scores(output, ".jsonl")
        if not totals.is_file() or not file.is_file():
            return []
        try:
            tests = read_json(totals)["targets_sha256"]
            rows = [json.loads(line) for line in read_text(file).splitlines()]
            if not all(measure in row for row in rows for measure in MEASURES):
                raise KeyError(*MEASURES)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{file}: not written by fedlora ({error})", hint="run `fedlora score` again") from None
        self._tests = self._tests or tests
        return rows if tests == self._tests else []


def _compare(client: str, models: Sequence[tuple[str, bool, _Rows]]) -> ClientGains | None:
    """A client's matrix; None where no joint model, or nothing to compare it with, has answered its rows."""
    joint = [label for label, is_joint, _ in models if is_joint]
    others = [label for label, is_joint, _ in models if not is_joint]
    if not joint or not others:
        return None
    reference = next((label for label in others if label != BASE), BASE)
    rows = models[0][2]
    measured = {
        label: {
            name: Measure(np.array([row[name] for row in own], dtype=float), is_share=is_share)
            for name, is_share in MEASURES.items()
        }
        for label, _, own in models
    }
    table = ScoreTable(measured, [client] * len(rows), range(len(rows)))
    scores = {label: table.overall(label) for label in measured}
    gains = {label: table.difference(label, reference) for label in joint}
    return ClientGains(
        client,
        len(rows),
        {name: {label: found[name] for label, found in scores.items()} for name in MEASURES},
        reference,
        {name: {label: found[name] for label, found in gains.items()} for name in MEASURES},
    )


def count_gains(measure: str, clients: Sequence[ClientGains]) -> dict[str, tuple[int, int, int]]:
    """Joint model -> clients that gain by it, clients that lose, by intervals without 0, and all clients."""
    found: dict[str, tuple[int, int, int]] = {}
    for client in clients:
        for label, one in client.gains[measure].items():
            gain, lose, total = found.get(label, (0, 0, 0))
            is_gain = one.estimate.mean > 0
            found[label] = (gain + (one.is_clear and is_gain), lose + (one.is_clear and not is_gain), total + 1)
    return found


def _records(values: Mapping[str, Mapping[str, Estimate | Difference]]) -> dict[str, Any]:
    return {name: {label: one.record() for label, one in found.items()} for name, found in values.items()}
