"""The `loss` stage: how probable the replies of a file are to the base, the global adapter or a client's.

Nothing is trained. Losses are measured row by row, so that each has an interval and any two models are compared on the
same rows. Where rows name `choices`, the model's choice is the most probable of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config.loss import LossConfig
from fedlora.console import Progress, say
from fedlora.data.client_files import is_silo_folder
from fedlora.data.held_out import HeldOutRows, read_test_rows
from fedlora.engines.losses import LossMeter
from fedlora.errors import DataError
from fedlora.evaluation.choices import COLUMN, Choice, read_choice
from fedlora.evaluation.score_table import Difference, Estimate, Measure, ScoreTable
from fedlora.federated.base_delta import background_of
from fedlora.llm.base_model import BaseModel
from fedlora.llm.examples import Example
from fedlora.llm.resident_base import ResidentBase
from fedlora.paths import RunPaths
from fedlora.plain_text import NOTHING, Table, counted, number_text, one_line, table_text
from fedlora.results import Result
from fedlora.rows import Row
from fedlora.runs.recorded_base import find_base
from fedlora.runs.run_folder import read_run, read_training
from fedlora.runs.saved_adapters import adapter_file, check_committed, find_additions
from fedlora.runs.subjects import Subject, find_adapters, find_share, shown_names
from fedlora.types import AdapterState

MOST_GROUPS = 6
"""Groups that have a column in a table of several subjects; `as_dict` has all."""
CHOICES = ("choice", "choice_per_byte")
"""Share of rows whose right choice is the most probable: as a whole, and by byte of UTF-8."""


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


@dataclass(frozen=True)
class _Rows:
    """The rows with a response: their groups, and the choices of those that name some."""

    rows: tuple[Row, ...]
    groups: tuple[str, ...]
    choices: tuple[Choice | None, ...]

    @property
    def candidates(self) -> list[Row]:
        return [row for choice in self.choices if choice for row in choice.candidates]


@dataclass(frozen=True)
class _Meter:
    """A base with the layers of a run, and the rows as the run encodes them."""

    meter: LossMeter
    examples: Sequence[Example]
    candidates: Sequence[Example]

    @property
    def num_labels(self) -> list[int]:
        return [example.num_labels for example in self.examples]


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
                    **one.overall.record(),
                    "groups": {name: group.record() for name, group in one.groups.items()},
                    "less_base": {name: found.record() for name, found in one.difference.items()},
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
    """Measure the loss of every subject that `config` names. `load` takes the place of `load_base_model`.

    Everything is found and checked before a base is loaded; runs on one base share it. Raises UsageError for an unknown
    run, round or adapter, DataError where no row has a response.
    """
    load = load or ResidentBase().load
    subjects = find_adapters(
        config.words, run=config.exp_name, round_number=config.communication_rounds, model_dir=config.model_dir
    )
    files = {one: _find_file(config, one) for one in subjects}
    share = find_share(subjects, config.model_dir) if is_silo_folder(config.test_file_path) else None
    rules = replace(config.read_rules, keep_any=(COLUMN,))
    tests = read_test_rows(config.test_file_path, rules=rules, share=share)
    rows = _with_response(config, tests)
    measured: dict[Subject, dict[str, Measure]] = {}
    with Progress(f"loss of {', '.join(shown_names(subjects))}", len(subjects), "adapters") as progress:
        for name in dict.fromkeys(one.run for one in subjects):
            meter = _open(config, name, rows, load)
            for one in (one for one in subjects if one.run == name):
                measured[one] = _measure(config, one, files[one], meter, rows)
                progress.advance()
    table = ScoreTable(measured, rows.groups, [row.prompt for row in rows.rows])
    base = next((one for one in subjects if one.output.kind == "base"), None)
    losses = [_make_loss(one, table, measured[one]["loss"], rows, base) for one in subjects]
    return MeasuredLosses(tuple(losses), tests.grouped_by)


def _with_response(config: LossConfig, tests: HeldOutRows) -> _Rows:
    """The rows that can be measured, by group; DataError where no response has text."""
    pairs = [(row, group) for row, group in zip(tests.rows, tests.groups, strict=True) if row.output.strip()]
    if not pairs:
        raise DataError(f"{config.test_file_path}: every response is empty", hint="give rows with answers")
    rows, groups = zip(*sorted(pairs, key=lambda pair: pair[1]), strict=True)
    return _Rows(rows, groups, _read_choices(rows))


def _read_choices(rows: Sequence[Row]) -> tuple[Choice | None, ...]:
    """The choice of each row that names a usable one; the others are counted and the first is named, because a column
    of that name may hold something else."""
    found: list[Choice | None] = []
    faults: list[str] = []
    for row in rows:
        try:
            found.append(read_choice(row))
        except DataError as error:
            faults.append(f"{error}; {error.hint}")
            found.append(None)
    if faults:
        say(f"warning: {COLUMN} of {len(faults)} of {counted(len(rows), 'row')} cannot be measured: {faults[0]}")
    return tuple(found)


def _find_file(config: LossConfig, subject: Subject) -> Path | None:
    """The adapter's file, compared with its hash; None for the base."""
    if subject.output.kind == "base":
        return None
    paths = RunPaths(config.model_dir, subject.run)
    file = adapter_file(paths, subject.round_number, subject.output)
    check_committed(paths, subject.round_number, file)
    return file


def _open(config: LossConfig, run_name: str, rows: _Rows, load: Callable[..., BaseModel]) -> _Meter:
    """The base of a run with its layers, and the rows encoded as the run encodes them."""
    recorded = read_run(RunPaths(config.model_dir, run_name))
    train = read_training(recorded)
    base = find_base(recorded, config.base_model).load(
        load,
        device=config.device,
        dtype=config.base_dtype,
        quantization=train.quantization,
        trust_remote_code=config.trust_remote_code,
    )
    meter = LossMeter(base, train)
    return _Meter(meter, meter.encode_each(rows.rows), meter.encode_each(rows.candidates, last_reply=True))


def _measure(config: LossConfig, one: Subject, file: Path | None, of: _Meter, rows: _Rows) -> dict[str, Measure]:
    paths, background = RunPaths(config.model_dir, one.run), None
    if one.output.kind == "client":
        # a client's adapter is valid on top of what its run has added to the base
        background = background_of(find_additions(paths, one.round_number))
    tokens = np.array(of.num_labels, dtype=float)
    sums = of.meter.measure_rows(file, of.examples, background=background)
    loss = {"loss": Measure(np.array(sums) / tokens, tokens)}
    return {**loss, **_measure_choices(file, of, rows, background)}


def _measure_choices(file: Path | None, of: _Meter, rows: _Rows, background: AdapterState | None) -> dict[str, Measure]:
    """CHOICES of every row, NaN where it names none; nothing where no row does."""
    if not of.candidates:
        return {}
    losses = iter(of.meter.measure_rows(file, of.candidates, background=background))
    found = np.full((len(CHOICES), len(rows.rows)), np.nan)
    for place, choice in enumerate(rows.choices):
        if choice is not None:
            each = [next(losses) for _ in choice.candidates]
            found[:, place] = choice.is_right(each), choice.is_right(each, per_byte=True)
    return {name: Measure(values, is_share=True) for name, values in zip(CHOICES, found, strict=True)}


def _make_loss(one: Subject, table: ScoreTable, loss: Measure, rows: _Rows, base: Subject | None) -> SubjectLoss:
    tokens, groups = loss.weights, np.array(rows.groups)
    if tokens is None:
        raise ValueError("a loss is weighed by tokens")

    def group_loss(found: Mapping[str, Estimate], places: np.ndarray) -> GroupLoss:
        choices = {name: found[name] for name in CHOICES if name in found}
        return GroupLoss(
            found["loss"].mean, int(places.sum()), int(tokens[places].sum()), found["loss"].interval, choices
        )

    return SubjectLoss(
        one,
        {name: group_loss(found, groups == name) for name, found in table.by_group(one).items()},
        group_loss(table.overall(one), np.full(len(groups), True)),
        table.difference(one, base) if base and base != one else {},
    )
