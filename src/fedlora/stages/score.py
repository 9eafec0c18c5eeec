"""The `score` stage: one table over any models and rounds, with intervals, and their paired differences.

The reference project's files of exact match and ROUGE are written as `evaluate_rouge` writes them. Beside them stand
every measure with its interval, and the same row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config.score import ScoreConfig
from fedlora.console import say
from fedlora.data.held_out import HeldOutRows
from fedlora.errors import DataError, UsageError
from fedlora.evaluation.rouge import AnswerScore
from fedlora.evaluation.score_table import Difference, Estimate, Measure, ScoreTable
from fedlora.evaluation.text_measures import chrf, is_same, token_f1
from fedlora.files import json_lines, write_json, write_text
from fedlora.paths import OutputName, ResultPaths
from fedlora.plain_text import NOTHING, Table, one_line, table_text
from fedlora.rows import Row
from fedlora.runs.subjects import Subject, shown_names
from fedlora.stages.evaluate_rouge import (
    AnsweredRows,
    RougeScores,
    SubjectScores,
    clients_table,
    find_subjects,
    pair_answers,
    read_tests,
    score_answers,
    write_scores,
)

SHOWN = ("exact", "normalised", "f1", "rougeL", "chrf")
"""Measures that tables show; the files have all."""
SHARES = ("exact", "normalised")


@dataclass(frozen=True)
class ModelScores(SubjectScores):
    """Every measure of one model's answers, in 0..1: overall, by category or client, and less those of others."""

    measures: Mapping[str, Estimate]
    groups: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[Subject, Mapping[str, Difference]]
    totals_file: Path
    rows_file: Path

    def totals(self) -> dict[str, Any]:
        """The measures as JSON values."""
        return {
            "overall": _records(self.measures),
            "groups": {group: _records(measures) for group, measures in self.groups.items()},
            "differences": [
                {"against": other.word, "measures": _records(measures)} for other, measures in self.differences.items()
            ],
        }


@dataclass(frozen=True, repr=False)
class Scores(RougeScores):
    """The scores of everyone who was asked for, in that order."""

    scores: tuple[ModelScores, ...]
    config: ScoreConfig

    def __getitem__(self, name: str) -> ModelScores:
        """The scores of one subject, by the name in the table. Raises UsageError for another name."""
        named = dict(zip(self.names, self.scores, strict=True))
        if name not in named:
            raise UsageError(f"no scores of {name!r}", hint=f"there are {', '.join(named)}")
        return named[name]

    def parts(self) -> Sequence[str]:
        """Of one subject the table by category, of several a row each; how they differ; where the results lie."""
        if len(self.scores) == 1:
            tables = (_groups_table(self.scores[0]),)
        else:
            rows = [
                [name, str(one.num_rows), *_cells(one.measures)]
                for name, one in zip(self.names, self.scores, strict=True)
            ]
            tables = (table_text(("of", "rows", *SHOWN), rows),)
        folders = dict.fromkeys(str(one.file.parent) for one in self.scores)
        return *tables, *clients_table(self.scores), *_differences_table(self.scores), *folders

    def as_dict(self) -> dict[str, Any]:
        """Per subject who it is, its files, what the reference project's holds, and every measure with its interval."""
        return {
            "scores": [
                {
                    **one.subject.record(),
                    "file": str(one.file),
                    "scores": dict(one.record),
                    "totals_file": str(one.totals_file),
                    "rows_file": str(one.rows_file),
                    **one.totals(),
                }
                for one in self.scores
            ]
        }


def run(config: ScoreConfig) -> Scores:
    """Score the predictions that `config` names, and write three files for each.

    Raises UsageError when a file is missing, DataError when predictions and test rows do not belong together; nothing
    is written then.
    """
    subjects = find_subjects(config, config.words)
    others = find_subjects(config, config.against_subjects) if config.against_subjects else []
    every = list(dict.fromkeys([*subjects, *others]))
    tests = read_tests(config, every)
    answered = pair_answers(config, every, tests)
    references = {one: [other for other in others if other != one] for one in subjects}
    if not others:
        beside = _find_bases(config, subjects, tests)
        references = {one: _base_of(one, [*subjects, *beside.pairs]) for one in subjects}
        answered = AnsweredRows(tests, {**answered.pairs, **beside.pairs}, {**answered.sources, **beside.sources})
    found = score_answers(config, answered)
    measured = {one: _measure(scores, answered.pairs[one]) for one, scores in found.items()}
    table = ScoreTable(measured, tests.groups, [row.prompt for row in tests.rows])
    written = write_scores(config, answered, {one: found[one] for one in subjects})
    pairs: set[frozenset[Subject]] = set()
    scores = []
    for one in written:
        differences = {
            other: table.difference(one.subject, other)
            for other in references[one.subject]
            # any two are compared once
            if frozenset((one.subject, other)) not in pairs
        }
        pairs |= {frozenset((one.subject, other)) for other in differences}
        model = _make_scores(config, one, table, differences)
        _write_model(model, tests, measured[one.subject])
        scores.append(model)
    return Scores(tuple(scores), config)


def _find_bases(config: ScoreConfig, subjects: Sequence[Subject], tests: HeldOutRows) -> AnsweredRows:
    """The base's answers that lie beside those of `subjects`; a base that answered other rows is left out by name."""
    pairs, sources = {}, {}
    for run, number in dict.fromkeys((one.run, one.round_number) for one in subjects):
        base = Subject(run, number, OutputName("base"), "base")
        folder = ResultPaths(config.prediction_dir, run, number)
        if base in subjects or not folder.predictions(base.output).is_file():
            continue
        try:
            answered = pair_answers(config, [base], tests)
        except DataError as error:
            say(f"note: not compared with the base: {error}")
            continue
        pairs |= answered.pairs
        sources |= answered.sources
    return AnsweredRows(tests, pairs, sources)


def _base_of(subject: Subject, among: Sequence[Subject]) -> list[Subject]:
    """The base that answered beside a model, else the first that answered the rows; none for a base."""
    bases = [one for one in among if one.output.kind == "base"]
    beside = [one for one in bases if (one.run, one.round_number) == (subject.run, subject.round_number)]
    return [] if subject.output.kind == "base" else [*beside, *bases][:1]


def _measure(scores: Sequence[AnswerScore], pairs: Sequence[tuple[Row, Row]]) -> dict[str, Measure]:
    """Every measure of the answers, row by row."""
    texts = [(prediction.output, target.output) for prediction, target in pairs]
    columns = {
        "exact": [float(one.exact) for one in scores],
        "normalised": [float(is_same(*each)) for each in texts],
        "f1": [token_f1(*each) for each in texts],
        **{metric: [one.rouge[metric] for one in scores] for metric in scores[0].rouge},
        "chrf": [chrf(*each) for each in texts],
    }
    return {name: Measure(np.array(values), is_share=name in SHARES) for name, values in columns.items()}


def _make_scores(
    config: ScoreConfig,
    one: SubjectScores,
    table: ScoreTable,
    differences: Mapping[Subject, Mapping[str, Difference]],
) -> ModelScores:
    subject = one.subject
    paths = ResultPaths(config.evaluation_dir, subject.run, subject.round_number)
    return ModelScores(
        subject,
        one.record,
        one.file,
        table.overall(subject),
        table.by_group(subject),
        differences,
        paths.scores(subject.output, ".json"),
        paths.scores(subject.output, ".jsonl"),
    )


def _write_model(model: ModelScores, tests: HeldOutRows, measured: Mapping[str, Measure]) -> None:
    """The totals, and one line per test row in the rows' order, counted from 1."""
    ours = model.record["fedlora"]
    kept = ("num_samples", "predictions_sha256", "targets_sha256", "rouge_tokenizer", "hidden_from_rouge")
    about = {name: ours[name] for name in kept if name in ours}
    write_json(model.totals_file, {"grouped_by": tests.grouped_by, **about, **model.totals()})
    lines = []
    for place, row in enumerate(tests.rows):
        client = {"client": tests.clients[place]} if tests.clients else {}
        values = {name: round(float(one.values[place]), 9) for name, one in measured.items()}
        lines.append({"row": place + 1, "category": row.category, **client, **values})
    write_text(model.rows_file, json_lines(lines))


def _records(measures: Mapping[str, Estimate | Difference]) -> dict[str, Any]:
    return {name: one.record() for name, one in measures.items()}


def _groups_table(scores: ModelScores) -> Table:
    ours = scores.record["fedlora"]
    rows = [
        [one_line(group), str(ours["num_samples"][group]), *_cells(measures)]
        for group, measures in scores.groups.items()
    ]
    rows.append(["overall", str(scores.num_rows), *_cells(scores.measures)])
    return table_text((ours.get("grouped_by", "category"), "rows", *SHOWN), rows, rules=(0, len(rows) - 1))


def _differences_table(scores: Sequence[ModelScores]) -> list[Table]:
    """One row for each two models that were compared; none where none were."""
    pairs = [(one, other) for one in scores for other in one.differences]
    if not pairs:
        return []
    names = dict(zip(every := _subjects_of(scores), shown_names(every), strict=True))
    rows = []
    for one, other in pairs:
        found = one.differences[other]
        cells = [_difference_cell(found.get(measure)) for measure in SHOWN]
        rows.append([names[one.subject], names[other], *cells, _p_text(found["exact"].p)])
    return [table_text(("difference of", "less", *SHOWN, "p of exact"), rows, left=(0, 1))]


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _subjects_of(scores: Sequence[ModelScores]) -> list[Subject]:
    return list(dict.fromkeys(subject for one in scores for subject in (one.subject, *one.differences)))


def _cells(measures: Mapping[str, Estimate]) -> list[str]:
    """The mean and its interval, of every measure that tables show."""
    return [_cell(measures.get(name)) for name in SHOWN]


def _cell(one: Estimate | None) -> str:
    return NOTHING if one is None else f"{one.mean:.3f} {one.interval[0]:.3f}-{one.interval[1]:.3f}"


def _difference_cell(one: Difference | None) -> str:
    if one is None:
        return NOTHING
    low, high = one.estimate.interval
    return f"{one.estimate.mean:+.3f} {low:+.3f}..{high:+.3f}"
