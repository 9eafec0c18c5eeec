"""Everything the stages left about one experiment, read once and unchanged.

Missing files are not errors here: a comparison is made of what is there, and every gap carries the commands that
close it. A file that is there and cannot be read is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.config.command_line import command_line
from fedlora.config.evaluate import EvaluateRougeConfig, ReportConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.runs import RunsConfig
from fedlora.data.client_names import shown_client
from fedlora.errors import UsageError
from fedlora.files import read_json, read_text, sha256_of
from fedlora.methods.row import Method
from fedlora.methods.table import find_recorded
from fedlora.paths import OutputName, ResultPaths, RunPaths

NO_PREDICTIONS = "no predictions"
NOT_SCORED = "not scored"
NEVER_TRAINED = "no adapter: not trained in any round up to this one"
STAYS_ON_NODE = (
    "the adapter stays on its node; its owner may share it (share_own_adapter: true in the node's configuration)"
)


@dataclass(frozen=True)
class Answers:
    """What is known about the answers of one adapter (or of the base model) after one round."""

    rouge: Mapping[str, Any] | None
    meta: Mapping[str, Any] | None
    judged: tuple[Mapping[str, Any], ...]
    """Every judged pair whose baseline it is."""
    doubts: tuple[str, ...]
    """Why the scores may not be those of the adapter that is there now."""
    missing: str
    """What is missing of the scores ("" when nothing is): NO_PREDICTIONS or NOT_SCORED, which commands fill, or why
    there is no adapter."""
    scores: Mapping[str, Any] | None = None
    """What `score` left of the same predictions: every measure with its interval."""
    losses: Mapping[str, Any] | None = None
    """What `loss` left."""


@dataclass(frozen=True)
class Experiment:
    """One run up to `round_number`: its record, its metrics and its answers by output name (`global`, `client_0`)."""

    name: str
    round_number: int
    run: Mapping[str, Any]
    client_rows: Sequence[Mapping[str, Any]]
    round_rows: Sequence[Mapping[str, Any]]
    answers: Mapping[str, Answers]
    private_rows: Sequence[Mapping[str, Any]] = ()
    """Lines of private metrics, in the order of the rounds."""

    @property
    def mode(self) -> str:
        return self.run["mode"]

    @property
    def has_global_adapter(self) -> bool:
        return _has_global_model(self.run)

    @property
    def has_personal_models(self) -> bool:
        """Whether each client has a model of its own, beside a global one or instead of it."""
        return _has_personal_models(self.run)

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


def find_round(config: ReportConfig) -> int:
    """The round to compare: the one named, else the last that all runs with scores have scores of, else the last that
    one has. Without any scores it is the last that all runs have trained.
    """
    if isinstance(config.communication_rounds, int):
        return config.communication_rounds
    scored = [rounds for name in config.exp_names if (rounds := set(ResultPaths(config.rouge_dir, name, 0).rounds))]
    if scored:
        return max(set.intersection(*scored) or set.union(*scored))
    trained = [RunPaths(config.model_dir, name).committed_rounds() for name in config.exp_names]
    return min((rounds[-1] for rounds in trained if rounds), default=1)


def load_experiment(config: ReportConfig, exp_name: str, round_number: int) -> Experiment | None:
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
    if "imported_from" in run:
        raise UsageError(
            f"{paths.root}: imported adapters, whose training is not known",
            hint="compare them by `fedlora score`, or by evaluate_rouge",
        )
    rows = [row for row in _read_metrics(paths.metrics_file) if row["round"] <= round_number]
    client_rows = [row for row in rows if row["kind"] == "client"]
    last = {row["client_id"]: row["round"] for row in client_rows}
    answers = {str(name): _load_answers(config, exp_name, round_number, name) for name in _shared_subjects(run)}
    if _has_personal_models(run):
        for client in _training_clients(run):
            name = OutputName("client", client["client_id"])
            answers[str(name)] = _load_personal(config, exp_name, round_number, name, last)
    return Experiment(
        name=exp_name,
        round_number=round_number,
        run=run,
        client_rows=client_rows,
        round_rows=[row for row in rows if row["kind"] == "round"],
        private_rows=[row for row in rows if row["kind"] == "private"],
        answers=answers,
    )


def runs_command(config: ReportConfig) -> str:
    """How to see which runs there are."""
    return command_line("runs", RunsConfig, {"model_dir": config.model_dir})


def answer_commands(
    config: ReportConfig, experiment: Experiment, names: Sequence[str], missing: str, test_path: Path | None
) -> tuple[str, ...]:
    """What writes the scores of `names` (`global`, `client_0`) that are missing, and their predictions before that.

    `test_path` is the test file, where it is known. No command makes an adapter that is not there.
    """
    if missing not in (NO_PREDICTIONS, NOT_SCORED):
        return ()
    asked = {
        "exp_name": experiment.name,
        "of_subjects": tuple(name.removeprefix("client_") for name in names),
        "communication_rounds": experiment.round_number,
        "prediction_dir": config.prediction_dir,
        "model_dir": config.model_dir,
    }
    generate = command_line("generate", GenerateConfig, {**asked, "test_file_path": test_path}, positional="exp_name")
    scored = {**asked, "target_file": test_path, "evaluation_dir": config.rouge_dir}
    score = command_line("score", EvaluateRougeConfig, scored, positional="exp_name")
    return (generate, score) if missing == NO_PREDICTIONS else (score,)


def _shared_subjects(run: Mapping[str, Any]) -> list[OutputName]:
    return [OutputName("base"), *([OutputName("global")] if _has_global_model(run) else [])]


def _has_global_model(run: Mapping[str, Any]) -> bool:
    return bool(run.get("has_global_model", find_recorded(run["mode"], run.get("method")).has_global_model))


def _has_personal_models(run: Mapping[str, Any]) -> bool:
    """A run without a global model has nothing but its clients', whatever is recorded of its method."""
    stated = run.get("has_personal_models", find_recorded(run["mode"], run.get("method")).keeps_personal_model)
    return bool(stated) or not _has_global_model(run)


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


def _load_personal(
    config: ReportConfig, exp_name: str, round_number: int, name: OutputName, last: Mapping[int, int]
) -> Answers:
    """The answers of a client's model; `last` holds the last round that each client trained in."""
    found = _load_answers(config, exp_name, round_number, name)
    if found.missing != NO_PREDICTIONS or not last:
        return found
    if name.client_id not in last:
        return replace(found, missing=NEVER_TRAINED)
    update = RunPaths(config.model_dir, exp_name).round_folder(last[name.client_id]) / str(name) / "update.json"
    stays = update.is_file() and read_json(update).get("adapter_stays")
    return replace(found, missing=STAYS_ON_NODE) if stays else found


def _load_answers(config: ReportConfig, exp_name: str, round_number: int, name: OutputName) -> Answers:
    predicted = ResultPaths(config.prediction_dir, exp_name, round_number)
    scored = ResultPaths(config.rouge_dir, exp_name, round_number)
    judged = ResultPaths(config.llm_dir, exp_name, round_number)
    predictions = predicted.predictions(name)
    rouge = read_result(scored.rouge(name), "fedlora", "fedlora score")
    meta = read_result(predicted.predictions_meta(name), "adapter_sha256", "fedlora generate")
    doubts = []
    if rouge and predictions.is_file() and sha256_of(predictions) != rouge["fedlora"]["predictions_sha256"]:
        doubts.append("predictions changed after they were scored")
    if meta and _adapter_was_replaced(config, exp_name, round_number, meta["adapter_sha256"]):
        doubts.append("predictions were made with another adapter than the run has now")
    scores = read_result(scored.scores(name, ".json"), "overall", "fedlora score")
    if scores and rouge and scores["predictions_sha256"] != rouge["fedlora"]["predictions_sha256"]:
        scores = None
    losses = read_losses(config, exp_name, round_number, name)
    if losses is None and scored.scores(name, ".json", "losses").is_file():
        doubts.append("its loss was measured with another adapter than the run has now, and is left out")
    missing = "" if rouge else NOT_SCORED if predictions.is_file() else NO_PREDICTIONS
    results = [read_result(file, "win", "fedlora evaluate_llm") for file in (judged.judge(name), *judged.pairs(name))]
    pairs = [result for number, result in enumerate(results) if result is not None and result not in results[:number]]
    return Answers(rouge, meta, tuple(pairs), tuple(doubts), missing, scores, losses)


def read_losses(config: ReportConfig, exp_name: str, round_number: int, name: OutputName) -> Mapping[str, Any] | None:
    """The totals that `loss` left of a model; None where it left none, or measured another adapter than is there."""
    file = ResultPaths(config.rouge_dir, exp_name, round_number).scores(name, ".json", "losses")
    losses = read_result(file, "adapter_sha256", "fedlora loss")
    if losses is None or _adapter_was_replaced(config, exp_name, round_number, losses["adapter_sha256"]):
        return None
    return losses


def _adapter_was_replaced(config: ReportConfig, exp_name: str, round_number: int, adapter_sha256: str | None) -> bool:
    """Whether the round was trained again since: it holds another adapter than the one that answered."""
    manifest = RunPaths(config.model_dir, exp_name).round_folder(round_number) / "manifest.json"
    if adapter_sha256 is None or not manifest.is_file():
        return False
    return adapter_sha256 not in {file["sha256"] for file in read_json(manifest)["files"].values()}


def read_result(path: Path, key: str, command: str) -> dict[str, Any] | None:
    """The JSON object at `path`, None when there is none; `key` distinguishes our files from those of other
    programs."""
    if not path.is_file():
        return None
    result = read_json(path)
    if not isinstance(result, dict) or key not in result:
        raise UsageError(f"{path}: not written by fedlora ({key!r} is missing)", hint=f"run `{command}` again")
    return result
