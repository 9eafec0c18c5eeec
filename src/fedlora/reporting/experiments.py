"""Everything the stages left about one experiment, read once and unchanged.

Missing files are not errors here: a comparison is made of what is there, and every gap carries the commands that
close it. A file that is there and cannot be read is an error.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.evaluate import ReportConfig
from fedlora.data.client_names import shown_client
from fedlora.errors import UsageError
from fedlora.files import read_json, read_text, sha256_of
from fedlora.methods.row import Method
from fedlora.methods.table import find_recorded
from fedlora.paths import OutputName, ResultPaths, RunPaths


@dataclass(frozen=True)
class Answers:
    """What is known about the answers of one adapter (or of the base model) after one round."""

    rouge: Mapping[str, Any] | None
    meta: Mapping[str, Any] | None
    judge: Mapping[str, Any] | None
    doubts: tuple[str, ...]
    """Why the scores may not be those of the adapter that is there now."""
    missing: str
    """What is missing of the scores ("" when nothing is), ..."""
    commands: tuple[str, ...]
    """... and the commands that write it."""


@dataclass(frozen=True)
class Experiment:
    """One run up to `round_number`: its record, its metrics and its answers by output name (`global`, `client_0`)."""

    name: str
    round_number: int
    run: Mapping[str, Any]
    client_rows: Sequence[Mapping[str, Any]]
    round_rows: Sequence[Mapping[str, Any]]
    answers: Mapping[str, Answers]

    @property
    def mode(self) -> str:
        return self.run["mode"]

    @property
    def has_global_adapter(self) -> bool:
        return _has_global_model(self.run)

    @property
    def method(self) -> Method:
        """The row of its method; of one from outside what run.json says of it."""
        return find_recorded(self.mode, self.run.get("method"))

    @property
    def clients(self) -> list[Mapping[str, Any]]:
        """What run.json says of each client that has rows to train on; the others never take part."""
        return _training_clients(self.run)

    def shown(self, client: int) -> str:
        """What tables and messages call a client."""
        return shown_client(client, {one["client_id"]: one["file"] for one in self.run["clients"]})

    @property
    def rounds_done(self) -> int:
        """The last round, up to `round_number`, in the metrics."""
        return max((row["round"] for row in self.round_rows), default=0)


def load_experiment(config: ReportConfig, exp_name: str) -> Experiment | None:
    """The experiment `exp_name`, or None when it has no run.json. UsageError when a file cannot be read."""
    paths = RunPaths(config.model_dir, exp_name)
    if not paths.run_file.is_file():
        return None
    run = read_json(paths.run_file)
    known = run.get("format") if isinstance(run, dict) else None
    if known != 1:
        raise UsageError(
            f"{paths.run_file}: format {known!r} is unknown", hint="report with the fedlora that trained it"
        )
    if "reaggregated_from" in run:
        raise UsageError(
            f"{paths.root}: a what-if of {run['reaggregated_from']['exp_name']}, which took no steps of its own",
            hint="compare it by the table of `fedlora reaggregate`, or by evaluate_rouge",
        )
    rows = [row for row in _read_metrics(paths.metrics_file) if row["round"] <= config.communication_rounds]
    names = [OutputName("base"), *_subjects(run)]
    return Experiment(
        name=exp_name,
        round_number=config.communication_rounds,
        run=run,
        client_rows=[row for row in rows if row["kind"] == "client"],
        round_rows=[row for row in rows if row["kind"] == "round"],
        answers={str(name): _load_answers(config, exp_name, name) for name in names},
    )


def train_command(exp_name: str, rounds: int) -> str:
    """How an experiment gets to round `rounds`."""
    return f"fedlora train --exp_name {exp_name} --num_communication_rounds {rounds}"


def _subjects(run: Mapping[str, Any]) -> list[OutputName]:
    if _has_global_model(run):
        return [OutputName("global")]
    return [OutputName("client", client["client_id"]) for client in _training_clients(run)]


def _has_global_model(run: Mapping[str, Any]) -> bool:
    return bool(run.get("has_global_model", find_recorded(run["mode"], run.get("method")).has_global_model))


def _training_clients(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [client for client in run["clients"] if client["num_examples"] > 0]


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            hint = "the last line may be cut: delete it, or train again"
            raise UsageError(f"{path}:{number}: not a JSON object", hint=hint) from None
    return rows


def _load_answers(config: ReportConfig, exp_name: str, name: OutputName) -> Answers:
    predicted = ResultPaths(config.prediction_dir, exp_name, config.communication_rounds)
    scored = ResultPaths(config.rouge_dir, exp_name, config.communication_rounds).rouge(name)
    judged = ResultPaths(config.llm_dir, exp_name, config.communication_rounds).judge(name)
    predictions = predicted.predictions(name)
    rouge = _read_result(scored, "fedlora", "fedlora evaluate_rouge")
    meta = _read_result(predicted.predictions_meta(name), "adapter_sha256", "fedlora generate")
    doubts = []
    if rouge and predictions.is_file() and sha256_of(predictions) != rouge["fedlora"]["predictions_sha256"]:
        doubts.append("predictions changed after they were scored")
    if meta and _adapter_was_replaced(config, exp_name, meta["adapter_sha256"]):
        doubts.append("predictions were made with another adapter than the run has now")
    missing, commands = "", []
    if rouge is None:
        missing, commands = "not scored", [_command(config, "evaluate_rouge", exp_name, name)]
        if not predictions.is_file():
            missing, commands = "no predictions", [_command(config, "generate", exp_name, name), *commands]
    judge = _read_result(judged, "win", "fedlora evaluate_llm")
    return Answers(rouge, meta, judge, tuple(doubts), missing, tuple(commands))


def _adapter_was_replaced(config: ReportConfig, exp_name: str, adapter_sha256: str | None) -> bool:
    """Whether the round was trained again since: it holds another adapter than the one that answered."""
    manifest = RunPaths(config.model_dir, exp_name).round_folder(config.communication_rounds) / "manifest.json"
    if adapter_sha256 is None or not manifest.is_file():
        return False
    return adapter_sha256 not in {file["sha256"] for file in read_json(manifest)["files"].values()}


def _read_result(path: Path, key: str, command: str) -> dict[str, Any] | None:
    """The JSON object at `path`, None when there is none; `key` distinguishes our files from those of other
    programs."""
    if not path.is_file():
        return None
    result = read_json(path)
    if not isinstance(result, dict) or key not in result:
        raise UsageError(f"{path}: not written by fedlora ({key!r} is missing)", hint=f"run `{command}` again")
    return result


def _command(config: ReportConfig, stage: str, exp_name: str, name: OutputName) -> str:
    words = ["fedlora", stage, "--exp_name", exp_name, "--communication_rounds", str(config.communication_rounds)]
    if name.kind == "base":
        words += ["--is_base_model", "true"]
    elif name.kind == "client":
        words += ["--is_global_model", "false", "--client_id", str(name.client_id)]
    own_root = ("--model_dir", "model_dir") if stage == "generate" else ("--evaluation_dir", "rouge_dir")
    for flag, field in (("--prediction_dir", "prediction_dir"), own_root):
        if config.chosen(field):
            words += [flag, str(getattr(config, field))]
    return shlex.join(words)
