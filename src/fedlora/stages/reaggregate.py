"""The `reaggregate` stage: what another aggregation would have made of the updates that a run has stored.

Nothing is trained. Every round starts from where the run really stood, so each line of the table is a what-if of that
one round; the adapters of two rounds do not build on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.config.reaggregate import ReaggregateConfig
from fedlora.config.train import TrainConfig
from fedlora.console import printable, say
from fedlora.data.records import read_rows
from fedlora.engines.what_if import Change, Outcome, WhatIf, check_methods
from fedlora.engines.workbench import make_workbench
from fedlora.errors import DataError, StorageError, UsageError
from fedlora.files import read_text
from fedlora.llm.adapter_files import CONFIG_NAME, GLOBAL_BIN_NAME, read_shapes
from fedlora.llm.examples import encode_rows
from fedlora.llm.layout import Layout
from fedlora.methods.outside import record_method
from fedlora.paths import RunPaths
from fedlora.plain_text import NOTHING, table_text
from fedlora.results import Result
from fedlora.runs.checking import find_listed_fault
from fedlora.runs.lock import hold_run
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.reader import RunReader
from fedlora.runs.run_folder import read_run, read_training
from fedlora.runs.run_records import RunRecord
from fedlora.runs.what_if_folder import UNFINISHED, make_room, write_round
from fedlora.runs.writer import RunWriter
from fedlora.types import AdapterState, Row

Validate = Callable[[AdapterState], float]

NOTE = (
    "Each line is a what-if of one round: it starts from where the run really stood before that round. How a run would "
    "have gone on from there is not known, for later updates were trained on the actual path."
)


@dataclass(frozen=True, repr=False)
class Reaggregated(Result):
    """Where the what-ifs of a run lie, what was changed for them, and the numbers of each round."""

    paths: RunPaths
    origin: Mapping[str, Any]
    rounds: tuple[Mapping[str, Any], ...]

    @property
    def root(self) -> Path:
        """The folder of the what-ifs."""
        return self.paths.root

    def parts(self) -> Sequence[str]:
        """What was changed, the table by round, and the folder."""
        run = f"{printable(self.origin['exp_name'])} ({self.origin['federation_mode']})"
        head = f"{run} -> {printable(self.paths.exp_name)}: {_say_change(self.origin['changed'])}"
        return (head, table_text(*_table(self.rounds)), NOTE, str(self.root))

    def as_dict(self) -> dict[str, Any]:
        return {"folder": str(self.root), "origin": dict(self.origin), "rounds": list(map(dict, self.rounds))}


def run(config: ReaggregateConfig) -> Reaggregated:
    """Write one adapter per committed round under `new_name`."""
    paths = RunPaths(config.model_dir, config.exp_name)
    recorded = read_run(paths)
    if (origin := recorded.reaggregated_from) is not None:
        raise UsageError(
            f"{paths.root}: holds a what-if, and no updates", hint=f"name the run itself: {origin['exp_name']}"
        )
    own = config.method_row if config.federation_mode == recorded.mode else None
    source = read_training(recorded, own, allow_drift=config.allow_drift)
    check_methods(source.method, config.method or source.method)
    target = _make_target(config, source)
    ids = list(recorded.training_clients)
    _check_clients(config, ids)
    rounds = paths.committed_rounds()
    if not rounds:
        raise UsageError(f"{paths.root}: no round is committed", hint="train first")
    held_out = read_rows(Path(config.val_data_path), rules=config.read_rules) if config.val_data_path else []
    new = RunPaths(config.model_dir, config.new_name or f"{config.exp_name}-what-if")
    if new.root == paths.root:
        raise UsageError("new_name is the run itself", hint="choose another --new_name")
    first = paths.round_folder(rounds[0])
    if fault := find_listed_fault(first, [first / GLOBAL_BIN_NAME, first / CONFIG_NAME]):
        raise StorageError(fault, hint="restore the file from a copy; `fedlora verify` finds all faults")
    shapes = read_shapes(first / GLOBAL_BIN_NAME)
    weights = config.client_weights or (config.weights or None)
    reader, hyperparameters = RunReader(paths, shapes), recorded.more.get("hyperparameters")
    what_if = WhatIf(source, target, Change(config.left_out, weights), reader, hyperparameters)
    with hold_run(new):
        make_room(new, overwrite=config.overwrite)
        validate = _open_validation(config, source, recorded, held_out) if held_out else None
        return _write(config, target, new, recorded, what_if, ids, validate)


def _check_clients(config: ReaggregateConfig, ids: Sequence[int]) -> None:
    """UsageError for a client that the run does not have, or one without a weight where single clients have theirs."""
    weights = config.client_weights
    if unknown := sorted((config.left_out | set(weights or {})) - set(ids)):
        raise UsageError(f"the run has no client {unknown[0]}", hint=f"its clients are {', '.join(map(str, ids))}")
    if weights is not None and (missing := sorted(set(ids) - weights.keys() - config.left_out)):
        raise UsageError(
            f"weights has none for client {missing[0]}",
            hint="name every client of the run, or leave it out with --leave_out",
        )


def _make_target(config: ReaggregateConfig, source: TrainConfig) -> TrainConfig:
    """The run's configuration with another server; settings of a server that it no longer has are dropped."""
    name = config.federation_mode or source.federation_mode
    row = config.method_row or (source.method_row if name == source.federation_mode else None)
    fields = source.record()
    if name != source.federation_mode:
        fields = {field: value for field, value in fields.items() if field not in source.method_options}
        # what clients did with their optimizers is done
        fields |= {"optimizer_state": "reset", "client_ranks": None}
    return TrainConfig.of(**{**fields, "federation_mode": row or name, **config.method_options})


def _write(
    config: ReaggregateConfig,
    target: TrainConfig,
    new: RunPaths,
    recorded: RunRecord,
    what_if: WhatIf,
    ids: Sequence[int],
    validate: Validate | None,
) -> Reaggregated:
    paths = what_if.reader.paths
    changed = {
        "leave_out": sorted(config.left_out),
        "weights": config.client_weights or config.weights or "as in the run",
        "federation_mode": target.federation_mode,
        "hyperparameters": what_if.method.hyperparameters,
    }
    origin = {"exp_name": config.exp_name, "federation_mode": recorded.mode, "changed": changed, "note": NOTE}
    more = {name: value for name, value in recorded.more.items() if name not in ("sha256", "best_round")}
    record = replace(
        recorded,
        exp_name=new.exp_name,
        mode=target.federation_mode,
        state=UNFINISHED,
        config={**target.record(), "exp_name": new.exp_name},
        reaggregated_from=origin,
        method=record_method(target.method),
        more={**more, "hyperparameters": changed["hyperparameters"]},
    )
    first = paths.round_folder(paths.committed_rounds()[0])
    written = RunWriter(
        RunReader(new, what_if.reader.shapes),
        peft_config=read_text(first / CONFIG_NAME),
        header=record.header,
        log=MetricsLog(new.metrics_file),
    )
    written.write_run(record)
    lines: list[dict[str, Any]] = []
    for outcome in what_if.rounds(ids):
        line = _describe(outcome, validate)
        write_round(written, outcome.round, outcome.adapter, {**origin, **line, "source": outcome.source})
        say(f"round {outcome.round} of {paths.committed_rounds()[-1]} done")
        lines.append(line)
    written.write_run(replace(record, state="reaggregated", reaggregated_from={**origin, "rounds": lines}))
    return Reaggregated(new, origin, tuple(lines))


def _describe(outcome: Outcome, validate: Validate | None) -> dict[str, Any]:
    line: dict[str, Any] = {
        "round": outcome.round,
        "counts": {str(client): count for client, count in sorted(outcome.counts.items())},
        "distance": outcome.distance,
    }
    if validate is not None:
        line |= {"actual_val_loss": validate(outcome.actual), "val_loss": validate(outcome.adapter)}
    return line


def _table(lines: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[Sequence[str]]]:
    heads = ["round", "clients", "distance / step"]
    if "val_loss" in lines[0]:
        heads += ["held-out loss, actual", "what-if", "difference"]
    rows = []
    for line in lines:
        cells = [str(line["round"]), str(len(line["counts"])), _number(line["distance"], ".4f")]
        if "val_loss" in line:
            before, after = line["actual_val_loss"], line["val_loss"]
            cells += [f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"]
        rows.append(cells)
    return heads, rows


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _say_change(changed: Mapping[str, Any]) -> str:
    parts = [f"server {changed['federation_mode']}", f"weights {changed['weights']}"]
    if changed["leave_out"]:
        parts.append(f"without client {', '.join(map(str, changed['leave_out']))}")
    return ", ".join(parts)


def _open_validation(
    config: ReaggregateConfig, source: TrainConfig, recorded: RunRecord, held_out: Sequence[Row]
) -> Validate:
    """Load the base; what comes back gives the held-out loss of an adapter."""
    fields = {"token_cache": False, "base_dtype": config.base_dtype, "trust_remote_code": config.trust_remote_code}
    train = source.model_copy(update=fields)
    bench = make_workbench(train, {}, device=config.device, layout=Layout.from_record(recorded.layout))
    examples = encode_rows(held_out, bench.encoder, cutoff=train.cutoff_len).examples
    if not examples:
        raise DataError(f"{config.val_data_path}: every response is empty", hint="give rows with answers")
    return lambda adapter: bench.trainer.validate(adapter, [examples])
