"""Whether a set of experiments may be compared, and where its numbers come from.

A comparison is honest when everyone had the same base model, data, seed and number of steps, and
answered the same questions under the same rules. Where that does not hold, a sentence says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.reporting.experiments import Experiment
from fedlora.reporting.summary import ModelRow, base_names, base_owner, experiment_titles

_ALWAYS_DIFFERENT = frozenset({"exp_name", "federation_mode"})
_LOSS_TOLERANCE = 0.01


def find_warnings(experiments: Sequence[Experiment], rows: Sequence[ModelRow]) -> list[str]:
    """One sentence for each reason why the rows cannot be compared."""
    facts = {
        "base model": base_names(experiments),
        "device and dtype": {one.name: f"{one.run['device']} {one.run['base_dtype']}" for one in experiments},
        "seed": {one.name: one.run["config"]["seed"] for one in experiments},
        "clients' data": {one.name: _data_id(one) for one in experiments},
        "steps": _steps(rows),
    }
    warnings = [_difference(f"the experiments differ in {what}", values) for what, values in facts.items()]
    warnings += [
        _difference("the answers come from different test files (SHA-256)", _test_files(experiments)),
        _difference("ROUGE was counted with different tokenizers", _rouge_tokenizers(experiments)),
        _difference("the answers were decoded differently", _meta(experiments, "decoding")),
        _difference("the answers were asked for with different prompts", _meta(experiments, "prompt_template")),
        _validation_rows(experiments),
    ]
    for one in experiments:
        doubts: defaultdict[str, list[str]] = defaultdict(list)
        for name, answers in one.answers.items():
            for doubt in answers.doubts:
                doubts[doubt].append(name)
        warnings += [f"{one.name}: {doubt}: {_some(names)}" for doubt, names in doubts.items()]
    return [warning for warning in warnings if warning]


def find_notes(experiments: Sequence[Experiment], rows: Sequence[ModelRow]) -> list[str]:
    """Notes on rows that are correct but easily misread."""
    notes = []
    if any(row.subject == "mean" for row in rows):
        notes.append("costs of a mean row are totals over its clients, to be read beside those of homo, seq and pooled")
    if any(one.has_global_adapter and one.has_personal_models for one in experiments):
        notes.append("personal models and the global adapter come from one run: its costs stand in both their rows")
    if any(row.own is None and row.all is not None for row in rows):
        notes.append("own is empty where the test rows lack a client, or a category that it was trained on")
    if pooled := next((one.mode for one in experiments if one.method.pools_rows), None):
        notes.append(f"{pooled} sends no adapters, but the raw rows of all clients left their owners")
    hidden = [
        f"{one.name}/{name}"
        for one in experiments
        for name, answers in one.answers.items()
        if answers.rouge is not None and "hidden_from_rouge" in answers.rouge["fedlora"]
    ]
    if hidden:
        notes.append(
            f"ROUGE sees less than half of the letters of some texts of {_some(hidden)}; `fedlora score "
            f"--rouge_tokenizer unicode` reads any script"
        )
    for one in experiments:
        empty = [one.shown(client["client_id"]) for client in one.run["clients"] if client["num_examples"] == 0]
        if empty:
            notes.append(f"{one.name}: clients without training rows are left out: {', '.join(empty)}")
        shared = any("val_loss_personal_shared" in row for row in one.round_rows)
        if one.has_personal_models and one.run["config"]["local_val_set_size"] > 0 and not shared:
            notes.append(f"{one.name}: without --val_data_path a client's held-out loss is on its held-back rows alone")
    return notes


def config_differences(experiments: Sequence[Experiment]) -> dict[str, dict[str, Any]]:
    """Configuration field -> experiment -> value, for the fields that are not the same everywhere."""
    fields = sorted({name for one in experiments for name in one.run["config"]} - _ALWAYS_DIFFERENT)
    table = {name: {one.name: one.run["config"].get(name) for one in experiments} for name in fields}
    return {name: values for name, values in table.items() if len({str(value) for value in values.values()}) > 1}


def answer_sources(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """Per output: what the sidecar of its predictions says (adapter, test file, prompt, decoding)."""
    titles = experiment_titles(experiments)
    base = base_owner(experiments)
    return [
        {"experiment": one.name, "answers": f"{titles[one.name]} {name}" if name != "base" else "base", **answers.meta}
        for one in experiments
        for name, answers in one.answers.items()
        if answers.meta is not None and (name != "base" or one is base)
    ]


def _data_id(experiment: Experiment) -> str:
    return " ".join(sorted(client["sha256"][:8] for client in experiment.run["clients"]))


def _steps(rows: Sequence[ModelRow]) -> dict[str, str]:
    return {row.experiment: f"{row.costs.steps:,}" for row in rows if row.costs and row.subject in ("global", "mean")}


def _test_files(experiments: Sequence[Experiment]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in experiments:
        for name, answers in one.answers.items():
            if answers.meta is not None:
                found[f"{one.name}/{name}"] = answers.meta["test_file_sha256"][:12]
            if answers.rouge is not None:
                found[f"{one.name}/{name} as scored"] = answers.rouge["fedlora"]["targets_sha256"][:12]
    return found


def _rouge_tokenizers(experiments: Sequence[Experiment]) -> dict[str, str]:
    return {
        f"{one.name}/{name}": answers.rouge["fedlora"].get("rouge_tokenizer", "ascii")
        for one in experiments
        for name, answers in one.answers.items()
        if answers.rouge is not None
    }


def _meta(experiments: Sequence[Experiment], key: str) -> dict[str, str]:
    return {
        f"{one.name}/{name}": str(answers.meta[key])
        for one in experiments
        for name, answers in one.answers.items()
        if answers.meta is not None
    }


def _validation_rows(experiments: Sequence[Experiment]) -> str:
    """The same untrained model must have the same held-out loss everywhere, or the rows held out differ."""
    losses = {one.name: row["val_loss"] for one in experiments for row in one.round_rows if _is_untrained(row)}
    same_base = len(set(base_names(experiments).values())) == 1
    if not losses or not same_base or max(losses.values()) - min(losses.values()) <= _LOSS_TOLERANCE:
        return ""
    shown = {name: f"{loss:.3f}" for name, loss in losses.items()}
    return _difference("the held-out rows differ: the untrained model's loss is not the same on them", shown)


def _is_untrained(row: Mapping[str, Any]) -> bool:
    return row["round"] == 0 and "val_loss" in row


def _difference(what: str, values: Mapping[str, Any]) -> str:
    """`what: value (who, who), value (who)`, or "" when all values are equal."""
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for name, value in values.items():
        owners[str(value)].append(name)
    if len(owners) < 2:
        return ""
    return f"{what}: " + "; ".join(f"{value} ({_some(names)})" for value, names in owners.items())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
