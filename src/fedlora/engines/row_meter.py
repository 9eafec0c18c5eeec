"""Test rows with a response, and what stored adapters of runs make of each: its loss, and its choice.

Nothing here trains. A response that is empty measures nothing, so its row is left out; the places of the others in the
test rows are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlora.config.loss import LossConfig
from fedlora.console import say
from fedlora.data.held_out import HeldOutRows
from fedlora.engines.losses import LossMeter
from fedlora.errors import DataError
from fedlora.evaluation.choices import COLUMN, Choice, read_choice
from fedlora.evaluation.score_table import Measure
from fedlora.federated.base_delta import background_of
from fedlora.files import sha256_of
from fedlora.llm.base_model import BaseModel
from fedlora.llm.examples import Example
from fedlora.paths import RunPaths
from fedlora.plain_text import counted
from fedlora.rows import Row
from fedlora.runs.recorded_base import find_base
from fedlora.runs.run_folder import read_run, read_training
from fedlora.runs.saved_adapters import adapter_file, check_committed, find_additions
from fedlora.runs.subjects import Subject
from fedlora.types import AdapterState

CHOICES = ("choice", "choice_per_byte")
"""Share of rows whose right choice is the most probable: as a whole, and by byte of UTF-8."""


@dataclass(frozen=True)
class LabelledRows:
    """The rows with a response, by group: their places in the test rows, and the choices of those that name some."""

    places: tuple[int, ...]
    rows: tuple[Row, ...]
    groups: tuple[str, ...]
    choices: tuple[Choice | None, ...]

    @property
    def candidates(self) -> list[Row]:
        return [row for choice in self.choices if choice for row in choice.candidates]


@dataclass(frozen=True)
class StoredAdapter:
    """A subject's file, compared with its round's manifest, and its SHA-256; the base has neither."""

    file: Path | None
    sha256: str | None


@dataclass(frozen=True)
class RowMeter:
    """A base with the layers of a run, and the rows as the run encodes them."""

    config: LossConfig
    meter: LossMeter
    rows: LabelledRows
    examples: Sequence[Example]
    candidates: Sequence[Example]

    def measure(self, one: Subject, file: Path | None) -> dict[str, Measure]:
        """Of every row the loss per response token, weighed by its tokens, and CHOICES where a row names some."""
        paths, background = RunPaths(self.config.model_dir, one.run), None
        if one.output.kind == "client":
            # a client's adapter is valid on top of what its run has added to the base
            background = background_of(find_additions(paths, one.round_number))
        tokens = np.array([example.num_labels for example in self.examples], dtype=float)
        sums = self.meter.measure_rows(file, self.examples, background=background)
        loss = {"loss": Measure(np.array(sums) / tokens, tokens)}
        return {**loss, **self._measure_choices(file, background)}

    def _measure_choices(self, file: Path | None, background: AdapterState | None) -> Mapping[str, Measure]:
        """CHOICES of every row, NaN where it names none; nothing where no row does."""
        if not self.candidates:
            return {}
        losses = iter(self.meter.measure_rows(file, self.candidates, background=background))
        found = np.full((len(CHOICES), len(self.rows.rows)), np.nan)
        for place, choice in enumerate(self.rows.choices):
            if choice is not None:
                each = [next(losses) for _ in choice.candidates]
                found[:, place] = choice.is_right(each), choice.is_right(each, per_byte=True)
        return {name: Measure(values, is_share=True) for name, values in zip(CHOICES, found, strict=True)}


def find_labelled(config: LossConfig, tests: HeldOutRows) -> LabelledRows:
    """The rows that can be measured, by group; DataError where no response has text."""
    found = [(group, place) for place, group in enumerate(tests.groups) if tests.rows[place].output.strip()]
    if not found:
        raise DataError(f"{config.test_file_path}: every response is empty", hint="give rows with answers")
    groups, places = zip(*sorted(found), strict=True)
    rows = tuple(tests.rows[place] for place in places)
    return LabelledRows(places, rows, groups, _read_choices(rows))


def find_stored(config: LossConfig, subject: Subject) -> StoredAdapter:
    """The adapter of a subject. Raises UsageError where its file is not the committed one."""
    if subject.output.kind == "base":
        return StoredAdapter(None, None)
    paths = RunPaths(config.model_dir, subject.run)
    file = adapter_file(paths, subject.round_number, subject.output)
    check_committed(paths, subject.round_number, file)
    return StoredAdapter(file, sha256_of(file))


def open_meter(config: LossConfig, run_name: str, rows: LabelledRows, load: Callable[..., BaseModel]) -> RowMeter:
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
    candidates = meter.encode_each(rows.candidates, last_reply=True)
    return RowMeter(config, meter, rows, meter.encode_each(rows.rows), candidates)


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
