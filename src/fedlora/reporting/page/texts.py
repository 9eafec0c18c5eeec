"""The answers of every model side by side, with the reference, what was right, and what a judge said.

Answers are joined by their prompts, never by line. A file that answers other rows than the first is left out by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from fedlora.config.evaluate import ReportConfig
from fedlora.data.held_out import HeldOutRows, Share, read_test_rows
from fedlora.errors import FedloraError
from fedlora.evaluation.judge.verdict_log import read_verdicts
from fedlora.evaluation.matching import pair_rows, read_predictions
from fedlora.files import json_line, sha256_of
from fedlora.paths import OutputName, ResultPaths
from fedlora.plain_text import counted, one_line
from fedlora.reporting.experiments import Experiment
from fedlora.reporting.own_rows import ScoredRows
from fedlora.reporting.page.blocks import Texts
from fedlora.reporting.page.looks import BASE, Looks
from fedlora.reporting.page.said import verdicts_of
from fedlora.reporting.standing import EXACT
from fedlora.reporting.summary import base_owner, experiment_titles, global_title, in_report_order, personal_title
from fedlora.rows import ReadRules, Row

MOST_BYTES = 2_000_000
"""Of all answers together; the page stays under 3 MB with its tables and charts."""
MOST_LETTERS = 4_000
"""Of one text."""
MOST_SHOWN = 6
"""Models that are chosen at first: before those of single clients all others."""


@dataclass(frozen=True)
class Asked:
    """Whose answers a file holds. `meta` is its sidecar; `exact` says per row what `score` found, and may be empty;
    `judged` are the pairs whose baseline it is, and `verdicts` the log of what was said of them."""

    label: str
    look: str
    file: Path
    meta: Mapping[str, Any]
    is_client: bool = False
    exact: Sequence[bool] = ()
    judged: Sequence[Mapping[str, Any]] = ()
    verdicts: Path | None = None


@dataclass(frozen=True)
class Answering:
    """Who answered, in the order of the common rows."""

    asked: Asked
    answers: Sequence[str]
    exact: Sequence[bool | None]

    @property
    def label(self) -> str:
        return self.asked.label


@dataclass
class _Rows:
    """The rows that all answer, in the order of the first file; `tests` where the test file is still there."""

    rows: Sequence[Row]
    tests: HeldOutRows | None
    notes: list[str] = field(default_factory=list)

    @property
    def references(self) -> list[str | None]:
        return [None if self.tests is None else row.output for row in self.rows]


def texts_of_runs(
    config: ReportConfig, experiments: Sequence[Experiment], looks: Looks, share: Share | None
) -> Texts | None:
    """The answers of the models of a report, None where there are none; `share` is what the runs held out of their
    clients' files."""
    titles = experiment_titles(experiments)
    subjects = [(base_owner(experiments), OutputName("base"), BASE, looks.class_of(BASE))]
    for one in in_report_order(experiments):
        for name in one.answers:
            output = OutputName.of_stem(name)
            if output is not None and output.kind != "base":
                label = global_title(one, titles[one.name])
                if output.kind == "client":
                    label = f"{personal_title(one, titles[one.name])} {one.shown(output.client_id)}"
                subjects.append((one, output, label, looks.class_of(one.name)))
    scored = ScoredRows(config)
    asked = []
    for one, output, label, look in subjects:
        answers, number = one.answers[str(output)], one.round_number
        file = ResultPaths(config.prediction_dir, one.name, number).predictions(output)
        is_scored = (
            answers.rouge and file.is_file() and answers.rouge["fedlora"]["predictions_sha256"] == sha256_of(file)
        )
        exact = [row[EXACT] == 1 for row in scored.rows_of(one, output)] if is_scored else []
        verdicts = ResultPaths(config.llm_dir, one.name, number).verdicts(output)
        is_client = output.kind == "client"
        asked.append(Asked(label, look, file, answers.meta or {}, is_client, exact, answers.judged, verdicts))
    return side_by_side(asked, share)


def side_by_side(asked: Sequence[Asked], share: Share | None = None) -> Texts | None:
    """The answers of those whose files are there and answer the rows of the first; None where there are none."""
    notes, files = [], []
    for one in asked:
        if one.file.is_file():
            try:
                files.append((one, read_predictions(one.file, "answer")))
            except FedloraError:
                notes.append(f"{one.label} is left out: its predictions cannot be read.")
    if not files:
        return None
    common = _common_rows(files[0][0].meta, files[0][1], share)
    common.notes.extend(notes)
    found = [answering for one, rows in files if (answering := _answering(one, rows, common)) is not None]
    answered = {one.asked.file.resolve(): one for one in found}
    judged = [
        verdicts_of(result, read_verdicts(one.asked.verdicts), common.rows, common.references, answered)
        for one in found
        if one.asked.verdicts is not None
        for result in one.asked.judged
    ]
    return Texts(_content(common, found, judged))


def _common_rows(meta: Mapping[str, Any], answered: Sequence[Row], share: Share | None) -> _Rows:
    """The test rows where they are as they were answered, else the prompts of the first file without references."""
    if "test_path" in meta:
        try:
            rules = ReadRules(**meta.get("reading", {}))
            tests = read_test_rows(Path(meta["test_path"]), rules=rules, share=share, needs_reply=False)
        except (FedloraError, TypeError):
            tests = None
        if tests is not None and tests.sha256 == meta["test_file_sha256"]:
            return _Rows(tests.rows, tests)
    note = "The test rows are no longer where they were, or changed: answers are shown without references."
    return _Rows(answered, None, [note])


def _answering(asked: Asked, rows: Sequence[Row], common: _Rows) -> Answering | None:
    """The answers in the order of the rows; None, and a note, where they are to other rows."""
    try:
        pairs = pair_rows(rows, common.rows, predictions_name=asked.label, targets_name="the test rows")
    except FedloraError:
        common.notes.append(f"{asked.label} answered other rows and is left out.")
        return None
    # scores stand in the order of the test rows
    is_known = common.tests is not None and len(asked.exact) == len(common.rows)
    return Answering(
        asked, [answer.output for answer, _ in pairs], asked.exact if is_known else [None] * len(common.rows)
    )


def _content(
    common: _Rows, found: Sequence[Answering], judged: Sequence[Mapping[int, Sequence[str]]]
) -> dict[str, Any]:
    """JSON values for the page, with as many rows as fit: in turn one of each category."""
    groups = common.tests.groups if common.tests is not None else [row.category for row in common.rows]
    references = common.references
    rows = [
        {
            "number": place + 1,
            "group": one_line(groups[place]),
            "turns": [[turn.role, _cut(turn.content)] for turn in row.before],
            "asked": _cut(row.question),
            "reference": None if (reference := references[place]) is None else _cut(reference),
            "answers": [_cut(one.answers[place]) for one in found],
            "exact": [one.exact[place] for one in found],
            "verdicts": [_cut(text) for each in judged for text in each.get(place, ())],
        }
        for place, row in enumerate(common.rows)
    ]
    kept = _choose_rows(rows)
    notes = list(common.notes)
    if len(kept) < len(rows):
        notes.append(
            f"{len(kept):,} of {counted(len(rows), 'test row')} are here, so that the page stays small: the first ones "
            "of every category in turn. The files of predictions have all."
        )
    if any(len(text) > MOST_LETTERS for one in found for text in one.answers):
        notes.append(f"Longer texts are cut after {MOST_LETTERS:,} characters.")
    shown = sorted(found, key=lambda one: one.asked.is_client)[:MOST_SHOWN]
    models = [{"label": one_line(one.label), "series": one.asked.look, "shown": one in shown} for one in found]
    by = common.tests.grouped_by if common.tests is not None else "category"
    return {"models": models, "rows": kept, "notes": notes, "grouped_by": by}


def _choose_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that fit into MOST_BYTES: one of each group after another, then in their own order."""
    waiting: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        waiting.setdefault(row["group"], []).append(row)
    kept, left = [], MOST_BYTES
    for group in cycle(waiting):
        if not any(waiting.values()):
            break
        if waiting[group]:
            row = waiting[group].pop(0)
            left -= len(json_line(row).encode("utf-8", "surrogatepass"))
            if left < 0:
                break
            kept.append(row)
    return sorted(kept, key=lambda row: row["number"])


def _cut(text: str) -> str:
    more = len(text) - MOST_LETTERS
    return text if more <= 0 else f"{text[:MOST_LETTERS]}\u2026 (and {more:,} more characters)"
