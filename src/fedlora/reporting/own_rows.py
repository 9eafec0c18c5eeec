"""Who gains by joining: every client's own test rows, under each model that could answer them.

Read from what `score` and `loss` left row by row. A client's gain is a joint model's score less that of the adapter
that it trained alone, where a run of such a method is among those reported, else less the base's, on the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedlora.config.evaluate import ReportConfig
from fedlora.data.client_names import name_of_file
from fedlora.errors import UsageError
from fedlora.evaluation.score_table import Difference, Estimate, Measure, ScoreTable
from fedlora.files import read_json, read_text
from fedlora.paths import OutputName, ResultPaths
from fedlora.reporting.experiments import Experiment, read_losses
from fedlora.reporting.summary import experiment_titles, global_title, in_report_order, personal_title

SHARES = frozenset({"exact"})
"""Measures that are a share of rows which are right."""
LOWER_IS_BETTER = frozenset({"loss"})
MEASURED = {"scores": ("exact", "rougeL", "chrf"), "losses": ("loss",)}
"""Kind of files -> what is compared of them."""
MEASURES = tuple(name for names in MEASURED.values() for name in names)
BASE = "base"


class Gain(Protocol):
    """How much better one model is than another on the same rows."""

    @property
    def estimate(self) -> Estimate: ...
    @property
    def is_clear(self) -> bool: ...
    def record(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class MeanGain:
    """How much better a joint model is than the reference, with its 95 % interval; it counts no single rows."""

    estimate: Estimate

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        low, high = self.estimate.interval
        return low > 0 or high < 0

    def record(self) -> dict[str, Any]:
        return self.estimate.record()


@dataclass(frozen=True)
class ClientGains:
    """One client: measure -> model -> its score on the client's test rows; `gains` has how much better the joint models
    are than the `reference`: higher, and for a loss lower. Both are empty for what was not measured."""

    client: str
    num_rows: int
    scores: Mapping[str, Mapping[str, Estimate]]
    reference: str
    gains: Mapping[str, Mapping[str, Gain]]

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

    Only what was measured on the test rows of the first run that has any counts, so that all are of the same rows.
    """
    titles = experiment_titles(experiments)
    sources: dict[str, dict[str, _Models]] = {}
    for kind in MEASURED:
        scored = ScoredRows(config, kind)
        for experiment in experiments:
            scored.find_tests(experiment)
        for experiment in in_report_order(experiments):
            for client in experiment.clients:
                name = name_of_file(client["file"])
                models = sources.setdefault(name, {}).setdefault(kind, [])
                for label, output, is_joint in _models(experiment, titles[experiment.name], client["client_id"]):
                    rows = scored.rows_of(experiment, output, name)
                    if rows and label not in [other for other, *_ in models]:
                        models.append((label, is_joint, rows))
    return [gains for name, kinds in sources.items() if (gains := _compare(name, kinds))]


_Rows = list[dict[str, Any]]
_Models = list[tuple[str, bool, _Rows]]
"""Label of a model, whether others' rows are in it, and what was measured of it."""


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
    """The row files of one kind, each read once; those on other test rows than the first are left out, and losses of
    another adapter than is there."""

    def __init__(self, config: ReportConfig, kind: str = "scores") -> None:
        self._config = config
        self._kind = kind
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
            is_stale = self._kind == "losses" and read_losses(self._config, *key) is None
            paths = ResultPaths(self._config.rouge_dir, *key[:2])
            self._files[key] = [] if is_stale else self._read(paths, output)
        return self._files[key]

    def _read(self, paths: ResultPaths, output: OutputName) -> _Rows:
        totals, file = (paths.scores(output, suffix, self._kind) for suffix in (".json", ".jsonl"))
        if not totals.is_file() or not file.is_file():
            return []
        try:
            tests = read_json(totals)["targets_sha256"]
            rows = [json.loads(line) for line in read_text(file).splitlines()]
            if not all(measure in row for row in rows for measure in MEASURED[self._kind]):
                raise KeyError(*MEASURED[self._kind])
        except (KeyError, TypeError, ValueError) as error:
            command = "score" if self._kind == "scores" else "loss"
            raise UsageError(
                f"{file}: not written by fedlora ({error})", hint=f"run `fedlora {command}` again"
            ) from None
        self._tests = self._tests or tests
        return rows if tests == self._tests else []


def _compare(client: str, kinds: Mapping[str, _Models]) -> ClientGains | None:
    """A client's matrix; None where no joint model, or nothing to compare it with, has answered its rows."""
    every = {label: is_joint for models in kinds.values() for label, is_joint, _ in models}
    others = [label for label, is_joint in every.items() if not is_joint]
    if not others or len(others) == len(every):
        return None
    reference = next((label for label in others if label != BASE), BASE)
    scores: dict[str, dict[str, Estimate]] = {name: {} for name in MEASURES}
    gains: dict[str, dict[str, Difference]] = {name: {} for name in MEASURES}
    for kind, models in kinds.items():
        if not models:
            continue
        measured = {label: {name: _measure(name, rows) for name in MEASURED[kind]} for label, _, rows in models}
        size = len(models[0][2])
        table = ScoreTable(measured, [client] * size, range(size))
        for label in measured:
            for name, one in table.overall(label).items():
                scores[name][label] = one
            for name in MEASURED[kind] if every[label] and reference in measured else ():
                pair = (reference, label) if name in LOWER_IS_BETTER else (label, reference)
                gains[name][label] = table.difference(*pair)[name]
    num_rows = max(len(models[0][2]) for models in kinds.values() if models)
    return ClientGains(client, num_rows, scores, reference, gains)


def _measure(name: str, rows: _Rows) -> Measure:
    weights = np.array([row["num_tokens"] for row in rows], dtype=float) if name == "loss" else None
    return Measure(np.array([row[name] for row in rows], dtype=float), weights, is_share=name in SHARES)


def count_gains(measure: str, clients: Sequence[ClientGains]) -> dict[str, tuple[int, int, int]]:
    """Joint model -> clients that gain by it, clients that lose, by intervals without 0, and all clients."""
    found: dict[str, tuple[int, int, int]] = {}
    for client in clients:
        for label, one in client.gains.get(measure, {}).items():
            gain, lose, total = found.get(label, (0, 0, 0))
            is_gain = one.estimate.mean > 0
            found[label] = (gain + (one.is_clear and is_gain), lose + (one.is_clear and not is_gain), total + 1)
    return found


def _records(values: Mapping[str, Mapping[str, Estimate | Gain]]) -> dict[str, Any]:
    return {name: {label: one.record() for label, one in found.items()} for name, found in values.items() if found}
