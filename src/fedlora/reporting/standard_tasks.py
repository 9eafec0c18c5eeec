"""What standard tasks measured of the models of a report: read from the files of `fedlora tasks`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.evaluate import ReportConfig
from fedlora.evaluation.tasks.task_scores import TaskScore, score_cells, stored_scores
from fedlora.paths import OutputName, ResultPaths
from fedlora.reporting.experiments import Experiment

HEADS = ("task", "measure", "run", "of", "value", "standard error", "95 %", "rows", "shots")
ABOUT = (
    "Tasks of lm-evaluation-harness, with its own standard errors; an interval is 1.96 of them to both sides. It "
    "covers the choice of rows. Models on the same rows differ less by chance than their intervals suggest."
)


@dataclass(frozen=True)
class TaskRow:
    """One score of one model of a run."""

    run: str
    of: str
    score: TaskScore

    def record(self) -> dict[str, Any]:
        return {"run": self.run, "of": self.of, **self.score.record()}

    def cells(self) -> list[str]:
        return [self.score.task, self.score.called, self.run, self.of, *score_cells(self.score)]


def find_task_rows(config: ReportConfig, experiments: Sequence[Experiment]) -> list[TaskRow]:
    """Every score of the compared round, by task and measure; a group is followed by its tasks.

    Raises UsageError for a file that is none of ours.
    """
    found = [row for experiment in experiments for row in _rows_of(config, experiment)]
    order = {key: place for place, key in enumerate(dict.fromkeys((row.score.task, row.score.called) for row in found))}
    # one task may be measured alone and as a part of a group
    unique = dict.fromkeys(found)
    return sorted(unique, key=lambda row: order[row.score.task, row.score.called])


def _rows_of(config: ReportConfig, experiment: Experiment) -> Iterator[TaskRow]:
    folder = ResultPaths(config.tasks_dir, experiment.name, experiment.round_number).folder
    clients = {OutputName("client", one["client_id"]): experiment.shown(one["client_id"]) for one in experiment.clients}
    for output, name in {OutputName("base"): "base", OutputName("global"): "global", **clients}.items():
        for file in sorted((folder / str(output)).glob("*.json")):
            yield from (TaskRow(experiment.name, name, score) for score in stored_scores(file))
