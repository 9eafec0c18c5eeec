"""The `loss` stage: the loss of the base, the global adapter or a client's on a file of rows, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.loss import LossConfig
from fedlora.console import Progress
from fedlora.data.client_files import is_silo_folder
from fedlora.data.held_out import HeldOutRows, read_test_rows
from fedlora.engines.losses import Groups, LossMeter
from fedlora.errors import DataError
from fedlora.federated.base_delta import background_of
from fedlora.llm.base_model import BaseModel
from fedlora.llm.resident_base import ResidentBase
from fedlora.paths import RunPaths
from fedlora.plain_text import NOTHING, Table, number_text, one_line, table_text
from fedlora.results import Result
from fedlora.runs.recorded_base import find_base
from fedlora.runs.run_folder import read_run, read_training
from fedlora.runs.saved_adapters import adapter_file, check_committed, find_additions
from fedlora.runs.subjects import Subject, find_adapters, find_share, shown_names

MOST_GROUPS = 6
"""Groups that have a column in a table of several subjects; `as_dict` has all."""


@dataclass(frozen=True)
class GroupLoss:
    """The loss on one category of rows, or on one client's."""

    loss: float
    num_examples: int
    num_tokens: int
    """Response tokens."""


@dataclass(frozen=True)
class SubjectLoss:
    """The loss of one subject, by group."""

    subject: Subject
    groups: Mapping[str, GroupLoss]

    @property
    def overall(self) -> GroupLoss:
        """The loss on all rows: the mean per response token."""
        groups = self.groups.values()
        tokens = sum(group.num_tokens for group in groups)
        mean = sum(group.loss * group.num_tokens for group in groups) / tokens
        return GroupLoss(mean, sum(group.num_examples for group in groups), tokens)


@dataclass(frozen=True, repr=False)
class MeasuredLosses(Result):
    """The loss of everyone who was asked for, in that order."""

    losses: tuple[SubjectLoss, ...]
    grouped_by: str

    def parts(self) -> Sequence[str]:
        """Of one subject the table by group, of several a row each."""
        if len(self.losses) == 1:
            return (self._groups_table(self.losses[0]),)
        groups = list(self.losses[0].groups)
        shown = groups if 1 < len(groups) <= MOST_GROUPS else []
        names = shown_names([one.subject for one in self.losses])
        rows = []
        for name, one in zip(names, self.losses, strict=True):
            cells = [number_text(one.groups[group].loss, 4) for group in shown]
            rows.append((one_line(name), f"{one.overall.num_examples:,}", number_text(one.overall.loss, 4), *cells))
        return (table_text(("of", "examples", "loss", *(one_line(group) or NOTHING for group in shown)), rows),)

    def as_dict(self) -> dict[str, Any]:
        """Per subject who it is, the loss per response token, and the same by category or client."""
        return {
            "grouped_by": self.grouped_by,
            "losses": [
                {
                    **one.subject.record(),
                    **vars(one.overall),
                    "groups": {name: dict(vars(group)) for name, group in one.groups.items()},
                }
                for one in self.losses
            ],
        }

    def _groups_table(self, one: SubjectLoss) -> Table:
        heads = (self.grouped_by, "examples", "response tokens", f"loss of {one_line(one.subject.name)}")
        named = [(one_line(name) or NOTHING, group) for name, group in one.groups.items()]
        entries = [*named, ("all", one.overall)] if len(named) > 1 else named
        rows = [
            (name, f"{group.num_examples:,}", f"{group.num_tokens:,}", number_text(group.loss, 4))
            for name, group in entries
        ]
        return table_text(heads, rows, rules=(0, len(named)) if len(named) > 1 else (0,))


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
    tests = read_test_rows(config.test_file_path, rules=config.read_rules, share=share)
    found: dict[Subject, SubjectLoss] = {}
    with Progress(f"loss of {', '.join(shown_names(subjects))}", len(subjects), "adapters") as progress:
        for name in dict.fromkeys(one.run for one in subjects):
            meter, groups = _open(config, name, tests, load)
            for one in (one for one in subjects if one.run == name):
                found[one] = _measure(config, one, files[one], meter, groups)
                progress.advance()
    return MeasuredLosses(tuple(found[one] for one in subjects), tests.grouped_by)


def _find_file(config: LossConfig, subject: Subject) -> Path | None:
    """The adapter's file, compared with its hash; None for the base."""
    if subject.output.kind == "base":
        return None
    paths = RunPaths(config.model_dir, subject.run)
    file = adapter_file(paths, subject.round_number, subject.output)
    check_committed(paths, subject.round_number, file)
    return file


def _open(
    config: LossConfig, run_name: str, tests: HeldOutRows, load: Callable[..., BaseModel]
) -> tuple[LossMeter, Groups]:
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
    groups = meter.encode(tests.rows, tests.groups)
    if not groups:
        raise DataError(f"{config.test_file_path}: every response is empty", hint="give rows with answers")
    return meter, groups


def _measure(config: LossConfig, one: Subject, file: Path | None, meter: LossMeter, groups: Groups) -> SubjectLoss:
    paths, background = RunPaths(config.model_dir, one.run), None
    if one.output.kind == "client":
        # a client's adapter is valid on top of what its run has added to the base
        background = background_of(find_additions(paths, one.round_number))
    losses = meter.measure_file(file, groups, background=background) if file else meter.measure(None, groups)
    return SubjectLoss(
        one,
        {
            name: GroupLoss(losses[name], len(examples), sum(example.num_labels for example in examples))
            for name, examples in groups.items()
        },
    )
