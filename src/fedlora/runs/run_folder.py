"""The folder of a run: its record, whether it may be used, and whether a new call resumes it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from fedlora.config.train import LATER_FIELDS, TrainConfig
from fedlora.console import printable, say
from fedlora.errors import StorageError, UsageError
from fedlora.files import read_json, write_json
from fedlora.llm.layout import Layout
from fedlora.methods.outside import find_other_facts
from fedlora.methods.row import Method
from fedlora.methods.table import METHODS
from fedlora.paths import BesideRounds, RunPaths, is_number
from fedlora.runs.checking import is_whole, seal
from fedlora.runs.recorded_base import RecordedBase, find_base
from fedlora.runs.run_records import RunRecord
from fedlora.typed_json import from_json, to_json


def read_run(paths: RunPaths) -> RunRecord:
    """run.json of an experiment; UsageError when there is none."""
    if not paths.run_file.is_file():
        raise UsageError(
            f"{paths.root}: no run of this name", hint="check --model_dir and --exp_name, or run `fedlora train` first"
        )
    value = read_json(paths.run_file)
    try:
        record = from_json(RunRecord, value)
    except ValueError as error:
        raise UsageError(
            f"{paths.run_file}: not the record of a run: {error}",
            hint="restore the file, or train again with --overwrite",
        ) from None
    if not is_whole(value):
        raise UsageError(
            f"{paths.run_file}: damaged: its fields do not match its hash",
            hint="restore the file, or train again with --overwrite",
        )
    return record


def record_layout(paths: RunPaths, layout: Layout) -> None:
    """Replace the layout in run.json: a resumed run trains its clients in the recorded layout."""
    write_json(paths.run_file, seal(to_json(replace(read_run(paths), layout=layout.record()))))


def check_free(paths: RunPaths) -> None:
    """UsageError when the folder holds files that no run writes."""
    if not paths.root.is_dir():
        return
    foreign = sorted(entry.name for entry in paths.root.iterdir() if not _belongs_to_run(entry))
    if foreign or (paths.committed_rounds() and not paths.run_file.exists()):
        what = ", ".join(foreign[:3]) or "rounds without a run.json"
        raise UsageError(
            f"{paths.root}: holds files that no run writes ({what})",
            hint="choose another --exp_name or --model_dir; nothing there is touched, with or without --overwrite",
        )


def clear_run(paths: RunPaths) -> None:
    """Remove what an earlier run left in this folder, all but the lock; run.json goes last, so that what is left
    when the process is killed half-way is still known as a run's."""
    kept = (paths.lock_file, paths.holder_file)
    entries = [entry for entry in paths.root.iterdir() if entry not in kept and _belongs_to_run(entry)]
    for entry in sorted(entries, key=lambda entry: (entry == paths.run_file, entry.name)):
        remove_entry(entry)


def remove_entry(entry: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; StorageError when the file system refuses."""
    try:
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    except OSError as error:
        raise StorageError(
            f"{error.filename or entry}: {error.strerror}", hint="check the permissions of the folder"
        ) from error


def _belongs_to_run(entry: Path) -> bool:
    """Whether a run writes something of this name: its own files, their temporary forms, rounds open or closed."""
    if entry.is_dir():
        return is_number(entry.name.removesuffix(".partial").removesuffix(".damaged"))
    own = ("run.json", "metrics.jsonl", "nodes.json", "start.safetensors", ".lock", ".holder.json")
    names = (*own, *get_args(BesideRounds))
    return entry.name in names or any(entry.name.startswith(f".{name}.tmp-") for name in names)


def find_differences(recorded: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """`field: then -> now` for every field that would change the result of a recorded run.

    More rounds are no difference where no client's learning rate depends on their number. A field that is younger
    than the record had its default's effect.
    """
    rounds = "num_communication_rounds"
    now = {name: getattr(config, name) for name in LATER_FIELDS} | config.record()
    fields = TrainConfig.model_fields
    younger = {name: fields[name].default for name in now.keys() - recorded.keys() if name in fields}
    then = younger | dict(LATER_FIELDS) | dict(recorded)
    differing = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if rounds in differing and rounds not in config.identity() and now[rounds] > then[rounds]:
        differing.remove(rounds)
    return [
        f"{name}: other text" if name == "template_text" else f"{name}: {then.get(name)!r} -> {now.get(name)!r}"
        for name in differing
    ]


def check_trained(paths: RunPaths, recorded: RunRecord) -> None:
    """UsageError when `reaggregate` or `import` made the folder: it has no updates of clients."""
    if recorded.imported_from is not None:
        raise UsageError(
            f"{paths.root}: holds adapters that `fedlora import` took over, and no updates",
            hint=f"train on from them with --init_from {paths.exp_name}/last, or choose another --exp_name",
        )
    if (origin := recorded.reaggregated_from) is not None:
        raise UsageError(
            f"{paths.root}: holds what `fedlora reaggregate` made of run {origin['exp_name']}, and no updates",
            hint="name that run instead, or choose another --exp_name",
        )


def check_same(paths: RunPaths, config: TrainConfig, place: str = "") -> RecordedBase:
    """UsageError with the difference when the recorded run is not the one that `config` asks for; else the run's base,
    at `place` or where `config` says."""
    recorded = read_run(paths)
    check_trained(paths, recorded)
    # a base is known by its identity, not by how it is spelled
    known = recorded.base_identity is not None
    alike = config.model_copy(update={"base_model": recorded.base_model}) if known else config
    if differences := find_differences(recorded.config, alike):
        hint = "choose another --exp_name, or give --overwrite to delete it and start again"
        if config.method.bound_to_length is None and "num_communication_rounds" in differences[0]:
            hint = f"{hint}; a run can get more rounds where the method's row states bound_to_length=False"
        if recorded.config.get("token_rule", 1) != config.token_rule:
            hint = f"{hint}; prompts of that run were tokenised by an earlier rule, so it answers but is not resumed"
        raise UsageError(
            f"{paths.root}: a run of this name exists with another configuration ({'; '.join(differences)})", hint=hint
        )
    check_source(recorded, config.method, allow_drift=config.allow_drift)
    return find_base(recorded, (known and place) or config.base_model)


def read_training(recorded: RunRecord, method: Any = "", *, allow_drift: bool = False) -> TrainConfig:
    """The configuration that a run was trained with.

    `method` is the method from outside that the user names. An installed one is found by the name that the run
    recorded. No other code is run because a file names it. UsageError where the method is not given, is another one,
    or has another source than the run recorded.
    """
    if recorded.imported_from is not None:
        # how it was trained is not known; what prompts and layers need is recorded
        return TrainConfig.of(**recorded.config)
    mode, told = recorded.mode, recorded.method or {}
    # a run that records no rule has the first
    fields = {"token_rule": 1, **recorded.config}
    asked = method.name if isinstance(method, Method) else method
    if asked and asked != mode:
        raise UsageError(
            f"federation_mode={asked}: run {recorded.exp_name} was trained with {printable(mode)}",
            hint="name the method that the run was trained with, or none",
        )
    if mode in METHODS:
        return TrainConfig.of(**fields)
    if not asked and (told.get("from") != "entry point" or ":" in mode):
        place = printable(str(told.get("place") or "file.py:name"))
        raise UsageError(
            f"run {recorded.exp_name} was trained with the method {printable(mode)}, whose code is not given",
            hint=f"give --federation_mode {place}",
        )
    config = TrainConfig.of(**{**fields, "federation_mode": method or mode})
    check_source(recorded, config.method, allow_drift=allow_drift)
    return config


def check_source(recorded: RunRecord, method: Method, *, allow_drift: bool) -> None:
    """UsageError where the source of a method from outside is not the one that a run was started with, unless drift is
    allowed."""
    if method.source is None:
        return
    changes = [*method.source.find_changes(recorded.method or {}), *find_other_facts(method, recorded.method)]
    if changes and not allow_drift:
        raise UsageError(
            f"method {method.name}: its source is not the one that run {recorded.exp_name} was started with "
            f"({'; '.join(changes)})",
            hint="restore it, start a new run, or give --allow_drift: the result is then not that of one method",
        )
    for change in changes:
        say(f"warning: the source of method {method.name} has changed: {change}")
