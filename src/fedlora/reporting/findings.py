"""All that a report says, before it is put into words, JSON or pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedlora.config.evaluate import ReportConfig
from fedlora.plain_text import counted
from fedlora.reporting.curves import drift_curves, loss_curves, quality_curve
from fedlora.reporting.experiments import Experiment
from fedlora.reporting.fairness import answer_sources, config_differences, find_notes, find_warnings
from fedlora.reporting.own_rows import ClientGains, find_gains
from fedlora.reporting.private_rows import find_private_gains, private_notes
from fedlora.reporting.standard_tasks import TaskRow, find_task_rows
from fedlora.reporting.standing import Standing, find_standing
from fedlora.reporting.summary import (
    Gap,
    ModelRow,
    experiment_titles,
    find_gaps,
    in_report_order,
    make_rows,
)


@dataclass(frozen=True)
class Judgement:
    """One comparison by the judge: our answers against a baseline's; scores 1 to 100, rates 0..1."""

    baseline: str
    proposed: str
    judge: str
    num_samples: int
    failures: int
    win: int
    tie: int
    loss: int
    win_rate_ties_half: float
    interval: Sequence[float] | None
    """Of the win rate, at 95 %; results of earlier versions have none."""
    length_controlled: float | None
    """The win rate of answers of equal length."""
    position_flip_rate: float
    baseline_score: float
    proposed_score: float
    ratio: float


@dataclass(frozen=True)
class Findings:
    """The comparison of several experiments after `round_number` rounds."""

    round_number: int
    rows: Sequence[ModelRow]
    gaps: Sequence[Gap]
    warnings: Sequence[str]
    notes: Sequence[str]
    titles: Mapping[str, str]
    """Experiment -> what it is called in the tables."""
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
    """Experiment, in the order of the rows -> `training`, `held_out`, `held_out_personal` -> (round, loss) points."""
    judgements: Sequence[Judgement]
    quarantined: Sequence[str]
    limited: Sequence[str]
    runs: Mapping[str, Mapping[str, Any]]
    """Experiment -> its run.json."""
    config_differences: Mapping[str, Mapping[str, Any]]
    answers: Sequence[Mapping[str, Any]]
    drift: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]] = field(default_factory=dict)
    """Experiment -> number of the error meter -> (round, value) points; only experiments that have any."""
    gains_of_clients: Sequence[ClientGains] = ()
    """Every client's own test rows under each model."""
    private_gains: Sequence[ClientGains] = ()
    """The same from private metrics, whose rows stay with their owners."""
    standing: Standing | None = None
    """Who wins; None where no model but the base was measured."""
    quality: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Experiment -> (round, exact match) of the rounds that were scored."""
    tasks: Sequence[TaskRow] = ()
    """Standard tasks."""

    @property
    def categories(self) -> list[str]:
        """Test categories, sorted."""
        return sorted({category for row in self.rows for category in row.categories})

    def record(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "format": 1,
            "communication_rounds": self.round_number,
            "rows": [row.record() for row in self.rows],
            "gaps": [asdict(gap) for gap in self.gaps],
            "warnings": self.warnings,
            "notes": self.notes,
            "titles": self.titles,
            "curves": self.curves,
            "judgements": [asdict(judgement) for judgement in self.judgements],
            "quarantined": self.quarantined,
            "limited": self.limited,
            "experiments": self.runs,
            "config_differences": self.config_differences,
            "answers": self.answers,
            "drift": self.drift,
            "own_rows": [one.record() for one in self.gains_of_clients],
            **({"private_rows": [one.record() for one in self.private_gains]} if self.private_gains else {}),
            "tasks": [one.record() for one in self.tasks],
        }


def gather_findings(config: ReportConfig, experiments: Sequence[Experiment], absent: Sequence[str]) -> Findings:
    """Compare `experiments` (at least one); `absent` names those that were asked for and have no run."""
    round_number = experiments[0].round_number
    rows = make_rows(experiments, absent)
    titles = experiment_titles(experiments)
    return Findings(
        round_number=round_number,
        rows=rows,
        gaps=find_gaps(config, experiments, absent, rows),
        warnings=find_warnings(experiments, rows),
        notes=[*find_notes(experiments, rows), *private_notes(config, experiments)],
        titles=titles,
        curves={one.name: loss_curves(one) for one in in_report_order(experiments)},
        judgements=[
            _judgement(f"{titles[one.name]} {name}" if name != "base" else f"base ({one.name})", result)
            for one in experiments
            for name, answers in one.answers.items()
            for result in answers.judged
        ],
        quarantined=[text for one in experiments for text in _quarantined(one)],
        limited=[text for one in experiments for text in _limited(one)],
        runs={one.name: one.run for one in experiments},
        config_differences=config_differences(experiments),
        answers=answer_sources(experiments),
        gains_of_clients=find_gains(config, experiments),
        private_gains=find_private_gains(config, experiments),
        standing=find_standing(config, experiments, rows),
        quality={one.name: quality_curve(config, one) for one in in_report_order(experiments)},
        tasks=find_task_rows(config, experiments),
        drift={one.name: curves for one in in_report_order(experiments) if any((curves := drift_curves(one)).values())},
    )


def _judgement(baseline: str, result: Mapping[str, Any]) -> Judgement:
    judge, statistics = result["judge"], result.get("statistics")
    models = ", ".join(judge["models_returned"]) or judge["model_asked"]
    return Judgement(
        baseline=baseline,
        proposed=result["files"]["proposed"]["path"],
        judge=f"majority of {judge['model_asked']}" if "judges" in result else models,
        num_samples=result["num_samples"],
        failures=result["eval_failures"],
        win=result["win"],
        tie=result["tie"],
        loss=result["loss"],
        win_rate_ties_half=(result["win"] + result["tie"] / 2) / result["num_samples"],
        interval=statistics["interval"] if statistics else None,
        length_controlled=statistics["length"]["controlled_win_rate"] if statistics else None,
        position_flip_rate=result["position_flip_rate"],
        baseline_score=result["overall_pred_avg"],
        proposed_score=result["overall_prop_avg"],
        ratio=result["overall_ratio"],
    )


def _quarantined(experiment: Experiment) -> list[str]:
    return [
        f"{experiment.name}, round {row['round']}, {experiment.shown(entry['client_id'])}: {entry['reason']}"
        for row in experiment.round_rows
        for entry in row.get("quarantined", ())
    ]


def _limited(experiment: Experiment) -> list[str]:
    texts = []
    for row in experiment.client_rows:
        place = f"{experiment.name}, round {row['round']}, {experiment.shown(row['client_id'])}"
        if "clipped_to" in row:
            texts.append(f"{place}: update of norm {row['norm']:.4g} clipped to {row['clipped_to']:.4g}")
        if "counted_as" in row:
            texts.append(f"{place}: {counted(row['num_examples'], 'row')} counted as {row['counted_as']}")
    return texts
