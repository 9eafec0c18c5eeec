"""The `reaggregate` stage: what another aggregation would have made of the updates that a run has stored.

Nothing is trained. Every round starts from the adapter that the run really had, so each line of the table is a what-if
of that one round; the adapters of two rounds do not build on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedlora.config.reaggregate import ReaggregateConfig
from fedlora.config.train import TrainConfig
from fedlora.console import Progress, say
from fedlora.data.client_names import client_numbers, name_of_file, shown_client
from fedlora.data.held_out import read_validation_rows
from fedlora.engines.what_if import Change, Outcome, WhatIf, check_methods
from fedlora.engines.workbench import make_workbench
from fedlora.errors import DataError, StorageError, UsageError
from fedlora.files import read_text
from fedlora.llm.adapter_files import CONFIG_NAME, GLOBAL_BIN_NAME, read_shapes
from fedlora.llm.examples import encode_rows
from fedlora.llm.layout import Layout
from fedlora.methods.outside import record_method
from fedlora.paths import RunPaths, is_number
from fedlora.reporting.what_ifs import EACH_NOTE, NOTE, LeftOutEach, Reaggregated
from fedlora.rows import Row
from fedlora.runs.checking import find_listed_fault
from fedlora.runs.lock import hold_run
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.reader import RunReader
from fedlora.runs.recorded_base import find_base
from fedlora.runs.run_folder import check_trained, read_run, read_training
from fedlora.runs.run_records import RunRecord
from fedlora.runs.what_if_folder import UNFINISHED, make_room, write_round
from fedlora.runs.writer import RunWriter
from fedlora.types import AdapterState, ClientId

Validate = Callable[[AdapterState], float]


def run(config: ReaggregateConfig) -> Reaggregated | LeftOutEach:
    """Write one adapter per committed round under `new_name`; where each client is left out in turn, only measure."""
    paths = RunPaths(config.model_dir, config.exp_name)
    recorded = read_run(paths)
    check_trained(paths, recorded)
    own = config.method_row if config.federation_mode == recorded.mode else None
    source = read_training(recorded, own, allow_drift=config.allow_drift)
    check_methods(source.method, config.method or source.method)
    target = _make_target(config, source)
    changes = _make_changes(config, recorded)
    rounds = paths.committed_rounds()
    if not rounds:
        raise UsageError(f"{paths.root}: no round is committed", hint="train first")
    held_out = read_validation_rows(config.val_data_path, config.read_rules)
    new = RunPaths(config.model_dir, config.new_name or f"{config.exp_name}-what-if")
    if new.root == paths.root:
        raise UsageError("new_name is the run itself", hint="choose another --new_name")
    first = paths.round_folder(rounds[0])
    if fault := find_listed_fault(first, [first / GLOBAL_BIN_NAME, first / CONFIG_NAME]):
        raise StorageError(fault, hint="restore the file from a copy; `fedlora verify` finds all faults")
    shapes = read_shapes(first / GLOBAL_BIN_NAME)
    reader, hyperparameters = RunReader(paths, shapes), recorded.more.get("hyperparameters")
    what_if = WhatIf(source, target, changes, reader, hyperparameters)
    if config.leaves_out_each:
        validate = _open_validation(config, source, recorded, held_out) if held_out else None
        return _measure_each(config, recorded, what_if, validate)
    with hold_run(new):
        make_room(new, overwrite=config.overwrite)
        validate = _open_validation(config, source, recorded, held_out) if held_out else None
        return _write(config, target, new, recorded, what_if, validate)


def _make_changes(config: ReaggregateConfig, recorded: RunRecord) -> list[Change]:
    """What is asked of the run's clients; UsageError for one that it does not have, or one without a weight."""
    ids, files = list(recorded.training_clients), _files_of(recorded)
    weights = None
    if (given := config.client_weights) is not None:
        weights = {_find_client(name, files, ids): weight for name, weight in given.items()}
    if config.leaves_out_each:
        left_out = [frozenset({client}) for client in ids]
    else:
        left_out = [frozenset(_find_client(name, files, ids) for name in config.leave_out)]
    if weights is not None and (missing := sorted(set(ids) - weights.keys() - left_out[0])):
        raise UsageError(
            f"weights has none for {shown_client(missing[0], files)}",
            hint="name every client of the run, or leave it out with --leave_out",
        )
    return [Change(clients, weights or config.weights or None) for clients in left_out]


def _find_client(name: str, files: Mapping[ClientId, str], ids: Sequence[ClientId]) -> ClientId:
    """The client of this name, or of this number; UsageError when it did not train in the run."""
    client = client_numbers(files).get(name, int(name) if is_number(name) else None)
    if client is None or client not in ids:
        known = ", ".join(name_of_file(files[client]) for client in ids)
        raise UsageError(f"the run has no client {name!r} that trained", hint=f"its clients are {known}")
    return client


def _files_of(recorded: RunRecord) -> dict[ClientId, str]:
    return {facts.client_id: facts.file for facts in recorded.clients}


def _make_target(config: ReaggregateConfig, source: TrainConfig) -> TrainConfig:
    """The run's configuration with another server; settings of a server that it no longer has are dropped."""
    name = config.federation_mode or source.federation_mode
    row = config.method_row or (source.method_row if name == source.federation_mode else None)
    fields = {**source.record(), "token_rule": source.token_rule}
    if name != source.federation_mode:
        fields = {field: value for field, value in fields.items() if field not in source.method_options}
        # what clients did with their optimizers is done
        fields |= {"optimizer_state": "reset", "client_ranks": None}
        if not (config.method or source.method).counts_rows(config.method_options):
            # equal weights are below every cap that the run's cohorts allow
            fields["max_client_weight"] = 1.0
    return TrainConfig.of(**{**fields, "federation_mode": row or name, **config.method_options})


def _write(
    config: ReaggregateConfig,
    target: TrainConfig,
    new: RunPaths,
    recorded: RunRecord,
    what_if: WhatIf,
    validate: Validate | None,
) -> Reaggregated:
    paths = what_if.reader.paths
    origin = {**_describe_change(recorded, what_if), "note": NOTE}
    origin["changed"] = {"leave_out": sorted(what_if.changes[0].leave_out), **origin["changed"]}
    more = {name: value for name, value in recorded.more.items() if name not in ("sha256", "best_round")}
    record = replace(
        recorded,
        exp_name=new.exp_name,
        mode=target.federation_mode,
        state=UNFINISHED,
        config={**target.record(), "exp_name": new.exp_name},
        reaggregated_from=origin,
        method=record_method(target.method),
        more={**more, "hyperparameters": what_if.method.hyperparameters},
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
    for (outcome,) in what_if.rounds(list(recorded.training_clients)):
        losses = _losses(outcome, validate, validate(outcome.actual) if validate else None)
        counts = {str(client): count for client, count in sorted(outcome.counts.items())}
        line = {"round": outcome.round, "counts": counts, "distance": outcome.distance, **losses}
        write_round(written, outcome.round, outcome.adapter, {**origin, **line, "source": outcome.source})
        say(f"round {outcome.round} of {paths.committed_rounds()[-1]} done")
        lines.append(line)
    written.write_run(replace(record, state="reaggregated", reaggregated_from={**origin, "rounds": lines}))
    return Reaggregated(new, origin, tuple(lines), _files_of(recorded))


def _measure_each(
    config: ReaggregateConfig, recorded: RunRecord, what_if: WhatIf, validate: Validate | None
) -> LeftOutEach:
    """The numbers of every client and of every round to which it sent an update."""
    files, sizes = _files_of(recorded), recorded.training_clients
    found: dict[ClientId, list[dict[str, Any]]] = {client: [] for client in sizes}
    rounds = what_if.reader.paths.committed_rounds()
    with Progress(f"leave out each client of {config.exp_name}", len(rounds), "rounds") as progress:
        for outcomes in what_if.rounds(list(sizes)):
            loss = validate(outcomes[0].actual) if validate else None
            sent = {client for outcome in outcomes for client in outcome.counts}
            for change, outcome in zip(what_if.changes, outcomes, strict=True):
                (client,) = change.leave_out
                if client in sent:
                    line = {"round": outcome.round, "distance": outcome.distance}
                    found[client].append({**line, **_losses(outcome, validate, loss)})
            progress.advance()
    lines = []
    for client, own in found.items():
        means = {
            name: sum(values) / len(values)
            for name in ("distance", "actual_val_loss", "val_loss")
            if (values := [line[name] for line in own if line.get(name) is not None])
        }
        who = {"client": client, "name": name_of_file(files[client]), "num_examples": sizes[client]}
        lines.append({**who, "distance": None, **means, "rounds": own})
    return LeftOutEach({**_describe_change(recorded, what_if), "note": EACH_NOTE}, tuple(lines))


def _describe_change(recorded: RunRecord, what_if: WhatIf) -> dict[str, Any]:
    """The run, and what is changed beside the clients that are left out."""
    weights = what_if.changes[0].weights
    changed = {
        "weights": dict(weights) if isinstance(weights, Mapping) else weights or "as in the run",
        "federation_mode": what_if.target.federation_mode,
        "hyperparameters": what_if.method.hyperparameters,
    }
    return {"exp_name": recorded.exp_name, "federation_mode": recorded.mode, "changed": changed}


def _losses(outcome: Outcome, validate: Validate | None, actual: float | None) -> dict[str, Any]:
    return {} if validate is None else {"actual_val_loss": actual, "val_loss": validate(outcome.adapter)}


def _open_validation(
    config: ReaggregateConfig, source: TrainConfig, recorded: RunRecord, held_out: Sequence[Row]
) -> Validate:
    """Load the base; what comes back gives the held-out loss of an adapter."""
    fields = {"token_cache": False, "base_dtype": config.base_dtype, "trust_remote_code": config.trust_remote_code}
    train = source.model_copy(update=fields)
    base = find_base(recorded, config.base_model)
    layout = Layout.from_record(recorded.layout)
    bench = make_workbench(train, {}, device=config.device, layout=layout, load=base.load_instead)
    examples = encode_rows(held_out, bench.encoder, cutoff=train.cutoff_len, train_on=train.measured_tokens).examples
    if not examples:
        raise DataError(f"{config.val_data_path}: every response is empty", hint="give rows with answers")
    return lambda adapter: bench.trainer.validate(adapter, [examples])
