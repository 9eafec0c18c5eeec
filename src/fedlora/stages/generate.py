"""Answer every row of a test file with the base model, the global adapter or a client's.

The base is loaded once; adapters are swapped in it, or answer side by side when the rows are few, and are
never merged: merging into bfloat16 weights loses most of an adapter. Beside each file of answers stands a
sidecar that says what produced it; a second call with the same settings finds it and answers nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from fedlora.config.generate import GenerateConfig
from fedlora.config.train_fields import Quantization, Template
from fedlora.console import say
from fedlora.data.records import read_rows
from fedlora.engines.answering import Answering, Answers, Source, group_names
from fedlora.errors import DataError, UsageError
from fedlora.federated.ranks import shapes_at
from fedlora.files import json_lines, read_json, sha256_of, write_json, write_text
from fedlora.llm.adapter_files import load_adapter
from fedlora.llm.base_model import BaseModel, load_base_model
from fedlora.llm.decoding import choose_decoding
from fedlora.llm.lora import LoraModel
from fedlora.paths import OutputName, ResultPaths, RunPaths
from fedlora.results import Result
from fedlora.runs.environment import library_versions
from fedlora.runs.run_folder import read_run
from fedlora.runs.saved_adapters import adapter_file, adapter_specs, check_committed, find_additions, names_in_round
from fedlora.types import BaseDelta, Row


@dataclass(frozen=True, repr=False)
class Predictions(Result):
    """The files of answers that the chosen adapters have now."""

    files: tuple[Path, ...]

    def text(self) -> str:
        """One file a line."""
        return "\n".join(map(str, self.files))

    def as_dict(self) -> dict[str, Any]:
        return {"files": list(map(str, self.files))}


def run(config: GenerateConfig, *, load: Callable[..., BaseModel] = load_base_model) -> Predictions:
    """Write the predictions of the chosen adapters. `load` may hand out a base loaded already."""
    paths = RunPaths(config.model_dir, config.exp_name)
    source = _find_source(config, paths)
    rows = read_rows(config.test_file_path, rules=config.read_rules)
    if not rows:
        raise DataError(f"{config.test_file_path}: no rows", hint="give a test file with rows")
    names = _choose_names(config, paths)
    adapters = {name: adapter_file(paths, config.communication_rounds, name) for name in names if name.kind != "base"}
    for file in adapters.values():
        check_committed(paths, config.communication_rounds, file)
    results = ResultPaths(config.prediction_dir, config.exp_name, config.communication_rounds)
    additions = find_additions(paths, config.communication_rounds) if any(map(_is_client, names)) else None
    facts = {name: _facts(config, source, adapters.get(name), len(rows)) for name in names}
    if additions is not None:
        facts |= {name: {**facts[name], "base_delta_sha256": additions.sha256} for name in names if _is_client(name)}
    missing = [name for name in names if not _is_answered(results, name, facts[name], overwrite=config.overwrite)]
    if missing:
        unanswered = {name: adapters.get(name) for name in missing}
        base = load(
            source.base_model,
            device=config.device,
            dtype=config.base_dtype,
            quantization=source.quantization,
            trust_remote_code=config.trust_remote_code,
        )
        for name, answers in _answer(config, source, paths, rows, base, unanswered, additions):
            _write_answers(results, name, rows, answers, facts[name])
    return Predictions(tuple(results.predictions(name) for name in names))


def _answer(
    config: GenerateConfig,
    source: Source,
    paths: RunPaths,
    rows: Sequence[Row],
    base: BaseModel,
    adapters: Mapping[OutputName, Path | None],
    additions: BaseDelta | None,
) -> Iterator[tuple[OutputName, Answers]]:
    """Everybody's answers, group by group; clients answer on top of the `additions` to the base."""
    trained = {name: file for name, file in adapters.items() if file is not None}
    specs = adapter_specs(paths, config.communication_rounds, list(trained), base_model=base.name)
    # the layers take adapters of any smaller rank
    lora = LoraModel(base.model, max(specs.values(), key=lambda spec: spec.r)) if specs else None
    answering = Answering(config, source, base, lora, rows)
    for group in group_names(list(adapters), len(rows), specs, apart=additions is not None):
        states = [
            load_adapter(trained[name], shapes_at(lora.shapes(), specs[name].r)) if lora and name in trained else None
            for name in group
        ]
        background = additions.background if additions is not None and _is_client(group[0]) else None
        answers = answering.answer(group, states, background)
        yield from ((name, answers) for name in group)


def _find_source(config: GenerateConfig, paths: RunPaths) -> Source:
    """Base model, template, cutoff and quantization: the run's, unless the base alone answers and there is no run."""
    if config.is_base_model and not paths.run_file.is_file():
        template = "alpaca" if config.prompt_template == "auto" else config.prompt_template
        quantization = "none" if config.quantization == "auto" else config.quantization
        return Source(config.base_model, template, config.cutoff_len or 512, quantization)
    recorded = read_run(paths)
    trained_on = recorded.base_model
    if config.chosen("base_model") and config.base_model != trained_on:
        raise UsageError(
            f"base_model={config.base_model!r}, but run {config.exp_name} was trained on {trained_on!r}",
            hint="leave --base_model out, or name the model the adapters belong to",
        )
    template, quantization, cutoff_len = _read_training(recorded.config, paths)
    return Source(
        trained_on,
        template if config.prompt_template == "auto" else config.prompt_template,
        config.cutoff_len or cutoff_len,
        quantization if config.quantization == "auto" else config.quantization,
    )


def _read_training(recorded: Mapping[str, Any], paths: RunPaths) -> tuple[str, Quantization, int]:
    """Template, quantization and cutoff that a run was trained with; UsageError for values no run can have."""
    # runs older than the field were trained on the base as it is
    found = {"quantization": "none", **recorded}
    template, quantization, cutoff_len = (found.get(name) for name in ("prompt_template", "quantization", "cutoff_len"))
    if template in get_args(Template) and quantization in get_args(Quantization) and type(cutoff_len) is int:
        return str(template), cast(Quantization, quantization), cutoff_len
    raise UsageError(
        f"{paths.run_file}: damaged: prompt_template, quantization or cutoff_len is none that a run can have",
        hint="restore the file, or train again with --overwrite",
    )


def _choose_names(config: GenerateConfig, paths: RunPaths) -> list[OutputName]:
    if config.all:
        return [OutputName("base"), *names_in_round(paths, config.communication_rounds)]
    return [
        OutputName.choose(
            is_base_model=config.is_base_model, is_global_model=config.is_global_model, client_id=config.client_id
        )
    ]


def _facts(config: GenerateConfig, source: Source, adapter: Path | None, num_rows: int) -> dict[str, Any]:
    """What decides the answers: two equal records mean equal predictions."""
    return {
        "adapter_sha256": sha256_of(adapter) if adapter else None,
        "base_model": source.base_model,
        "prompt_template": source.prompt_template,
        "cutoff_len": source.cutoff_len,
        "answer_room": "context",
        "quantization": source.quantization,
        "decoding": {"preset": config.preset, **choose_decoding(config).record()},
        "test_file": config.test_file_path.name,
        "test_file_sha256": sha256_of(config.test_file_path),
        "num_rows": num_rows,
        # left out where nothing was asked for, as in sidecars older than the rules
        **({"reading": rules} if (rules := config.read_rules.record()) else {}),
        "base_dtype_asked": config.base_dtype,
        "versions": library_versions(source.quantization),
    }


def _is_answered(results: ResultPaths, name: OutputName, facts: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether these very predictions lie there already; UsageError when others do and may not be replaced."""
    file, sidecar = results.predictions(name), results.predictions_meta(name)
    if overwrite or not file.is_file():
        return False
    recorded = read_json(sidecar) if sidecar.is_file() else {}
    if recorded.get("num_shortened") == 0:
        # older answers had their room within the cutoff: the same wherever no prompt was shortened for it
        recorded.setdefault("answer_room", "context")
    differing = sorted(key for key, value in facts.items() if recorded.get(key) != value)
    if not differing and recorded.get("predictions_sha256") == sha256_of(file):
        say(f"{file}: already answered with these settings")
        return True
    raise UsageError(
        f"{file}: predictions made with other settings lie there (different: {', '.join(differing) or 'the rows'})",
        hint="give --overwrite to replace them, or another --prediction_dir",
    )


def _is_client(name: OutputName) -> bool:
    return name.kind == "client"


def _write_answers(
    results: ResultPaths, name: OutputName, rows: list[Row], answers: Answers, facts: dict[str, Any]
) -> None:
    """One file of answers and its sidecar; the sidecar, which vouches for the file, comes last."""
    lines = [
        {"instruction": row.instruction, "input": row.input, "answer": text, "category": row.category}
        for row, text in zip(rows, answers.texts[name], strict=True)
    ]
    file = results.predictions(name)
    write_text(file, json_lines(lines))
    sidecar = {
        **facts,
        **answers.how,
        "num_new_tokens": answers.num_new_tokens[name],
        "predictions_sha256": sha256_of(file),
    }
    write_json(results.predictions_meta(name), sidecar)
