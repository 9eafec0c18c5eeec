"""The `loss` stage: how probable the replies of a file are to the base, the global adapter or a client's.

Nothing is trained. Losses are measured row by row, so that each has an interval and any two models are compared on the
same rows; the rows lie in a file beside the totals. Where rows name `choices`, the model's choice is the most probable
of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config.loss import LossConfig
from fedlora.console import Progress
from fedlora.data.client_files import is_silo_folder
from fedlora.data.held_out import HeldOutRows, read_test_rows
from fedlora.engines.row_meter import CHOICES, LabelledRows, find_labelled, find_stored, open_meter
from fedlora.evaluation.choices import COLUMN
from fedlora.evaluation.score_table import Difference, Estimate, Measure, ScoreTable
from fedlora.files import json_lines, write_json, write_text
from fedlora.llm.base_model import BaseModel
from fedlora.llm.resident_base import ResidentBase
from fedlora.paths import ResultPaths
from fedlora.plain_text import NOTHING, Table, number_text, one_line, table_text
from fedlora.results import Result
from fedlora.runs.subjects import Subject, find_adapters, find_share, shown_names

MOST_GROUPS = 6
"""Groups that have a column in a table of several subjects; `as_dict` has all."""


@dataclass(frozen=True)
class GroupLoss:
    """The loss on one category of rows, on one client's, or on all."""

    loss: float
    num_examples: int
    num_tokens: int
    """Response tokens."""
    interval: tuple[float, float]
    """95 %, over the choice of rows."""
    choices: Mapping[str, Estimate]
    """CHOICES, where rows name some."""

    @property
    def perplexity(self) -> float:
        """The number of equally probable tokens that the loss amounts to."""
        return math.exp(self.loss)

    def record(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "interval": list(self.interval),
            "perplexity": self.perplexity,
            "num_examples": self.num_examples,
            "num_tokens": self.num_tokens,
            **{name: one.record() for name, one in self.choices.items()},
        }


@dataclass(frozen=True)
class SubjectLoss:
    """The loss of one subject, by group and over all rows (the mean per response token), and less that of the base."""

    subject: Subject
    groups: Mapping[str, GroupLoss]
    overall: GroupLoss
    difference: Mapping[str, Difference]
    """Measure -> this model less the base on the same rows; empty where the base was not measured."""
    totals_file: Path
    rows_file: Path

    def totals(self) -> dict[str, Any]:
        """The loss per response token, the same by category or client, and less the base, as JSON values."""
        return {
            **self.overall.record(),
            "groups": {name: group.record() for name, group in self.groups.items()},
            "less_base": {name: found.record() for name, found in self.difference.items()},
        }


@dataclass(frozen=True, repr=False)
class MeasuredLosses(Result):
    """The loss of everyone who was asked for, in that order."""

    losses: tuple[SubjectLoss, ...]
    grouped_by: str

    def parts(self) -> Sequence[str]:
        """Of one subject the table by group, of several a row each and their differences to the base."""
        if len(self.losses) == 1:
            return (self._groups_table(self.losses[0]),)
        groups = list(self.losses[0].groups)
        shown = groups if 1 < len(groups) <= MOST_GROUPS else []
        names = list(map(one_line, shown_names([one.subject for one in self.losses])))
        rows = [
            (
                name,
                f"{one.overall.num_examples:,}",
                *_cells(one.overall),
                *(number_text(one.groups[group].loss, 4) for group in shown),
            )
            for name, one in zip(names, self.losses, strict=True)
        ]
        heads = ("of", "examples", "loss", *self._heads, *(one_line(group) or NOTHING for group in shown))
        return table_text(heads, rows), *self._differences_table(names)

    def as_dict(self) -> dict[str, Any]:
        """Per subject who it is, the loss per response token, the same by category or client, and less the base."""
        return {
            "grouped_by": self.grouped_by,
            "losses": [
                {
                    **one.subject.record(),
                    "totals_file": str(one.totals_file),
                    "rows_file": str(one.rows_file),
                    **one.totals(),
                }
                for one in self.losses
            ],
        }

    @property
    def _heads(self) -> tuple[str, ...]:
        return "95 %", "perplexity", *(name.replace("_", " ") for name in self.losses[0].overall.choices)

    def _groups_table(self, one: SubjectLoss) -> Table:
        heads = (self.grouped_by, "examples", "response tokens", f"loss of {one_line(one.subject.name)}", *self._heads)
        named = [(one_line(name) or NOTHING, group) for name, group in one.groups.items()]
        entries = [*named, ("all", one.overall)] if len(named) > 1 else named
        rows = [(name, f"{group.num_examples:,}", f"{group.num_tokens:,}", *_cells(group)) for name, group in entries]
        return table_text(heads, rows, rules=(0, len(named)) if len(named) > 1 else (0,))

    def _differences_table(self, names: Sequence[str]) -> list[Table]:
        found = [(name, one.difference) for name, one in zip(names, self.losses, strict=True) if one.difference]
        if not found:
            return []
        rows = [(name, *map(_difference_cell, difference.values())) for name, difference in found]
        return [table_text(("less base", *(name.replace("_", " ") for name in found[0][1])), rows)]


def _cells(group: GroupLoss) -> list[str]:
    shares = [f"{one.mean:.3f} {one.interval[0]:.3f}-{one.interval[1]:.3f}" for one in group.choices.values()]
    low, high = group.interval
    return [number_text(group.loss, 4), f"{low:.4f}-{high:.4f}", f"{group.perplexity:,.3g}", *shares]


def _difference_cell(one: Difference) -> str:
    low, high = one.estimate.interval
    return f"{one.estimate.mean:+.4f} {low:+.4f}..{high:+.4f}"


def run(config: LossConfig, *, load: Callable[..., BaseModel] | None = None) -> MeasuredLosses:
    """Measure the loss of every subject that `config` names, and write its totals and its rows. `load` takes the place
    of `load_base_model`.

    Everything is found and checked before a base is loaded; runs on one base share it. Raises UsageError for an unknown
    run, round or adapter, DataError where no row has a response.
    """
    load = load or ResidentBase().load
    subjects = find_adapters(
        config.words, run=config.exp_name, round_number=config.communication_rounds, model_dir=config.model_dir
    )
    stored = {one: find_stored(config, one) for one in subjects}
    share = find_share(subjects, config.model_dir) if is_silo_folder(config.test_file_path) else None
    rules = replace(config.read_rules, keep_any=(COLUMN,))
    tests = read_test_rows(config.test_file_path, rules=rules, share=share)
    rows = find_labelled(config, tests)
    measured: dict[Subject, dict[str, Measure]] = {}
    with Progress(f"loss of {', '.join(shown_names(subjects))}", len(subjects), "adapters") as progress:
        for name in dict.fromkeys(one.run for one in subjects):
            meter = open_meter(config, name, rows, load)
            for one in (one for one in subjects if one.run == name):
                measured[one] = meter.measure(one, stored[one].file)
                progress.advance()
    table = ScoreTable(measured, rows.groups, [row.prompt for row in rows.rows])
    base = next((one for one in subjects if one.output.kind == "base"), None)
    losses = []
    for one in subjects:
        losses.append(_make_loss(config, one, table, measured[one]["loss"], rows, base))
        about = {"adapter_sha256": stored[one].sha256, "targets_sha256": tests.sha256}
        _write_loss(losses[-1], {"grouped_by": tests.grouped_by, **about}, tests, measured[one], rows)
    return MeasuredLosses(tuple(losses), tests.grouped_by)


def _make_loss(
    config: LossConfig, one: Subject, table: ScoreTable, loss: Measure, rows: LabelledRows, base: Subject | None
) -> SubjectLoss:
    tokens, groups = _tokens_of(loss), np.array(rows.groups)

    def group_loss(found: Mapping[str, Estimate], places: np.ndarray) -> GroupLoss:
        choices = {name: found[name] for name in CHOICES if name in found}
        return GroupLoss(
            found["loss"].mean, int(places.sum()), int(tokens[places].sum()), found["loss"].interval, choices
        )

    paths = ResultPaths(config.evaluation_dir, one.run, one.round_number)
    return SubjectLoss(
        one,
        {name: group_loss(found, groups == name) for name, found in table.by_group(one).items()},
        group_loss(table.overall(one), np.full(len(groups), True)),
        table.difference(one, base) if base and base != one else {},
        paths.scores(one.output, ".json", "losses"),
        paths.scores(one.output, ".jsonl", "losses"),
    )


def _write_loss(
    one: SubjectLoss,
    about: Mapping[str, Any],
    tests: HeldOutRows,
    measured: Mapping[str, Measure],
    rows: LabelledRows,
) -> None:
    """The totals, and one line per row with a response in the order of the test rows, counted from 1."""
    write_json(one.totals_file, {**about, **one.totals()})
    tokens, lines = _tokens_of(measured["loss"]), {}
    for number, place in enumerate(rows.places):
        client = {"client": tests.clients[place]} if tests.clients else {}
        found = {name: float(one.values[number]) for name, one in measured.items()}
        values = {name: round(value, 9) for name, value in found.items() if not math.isnan(value)}
        about_row = {"row": place + 1, "category": tests.rows[place].category, **client}
        lines[place] = {**about_row, **values, "num_tokens": int(tokens[number])}
    write_text(one.rows_file, json_lines(lines[place] for place in sorted(lines)))


def _tokens_of(loss: Measure) -> np.ndarray:
    if loss.weights is None:
        raise ValueError("a loss is weighed by tokens")
    return loss.weights
