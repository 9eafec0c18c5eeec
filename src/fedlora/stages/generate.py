"""Answer every row of a test file with the base model, the global adapter or a client's.

The base is loaded once; adapters are swapped in it, or answer side by side when the rows are few, and are
never merged: merging into bfloat16 weights loses most of an adapter. Beside each file of answers stands a
sidecar that says what produced it; a second call with the same settings finds it and answers nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from fedlora.config.generate import GenerateConfig
from fedlora.config.train_fields import Quantization, Template
from fedlora.console import say
from fedlora.data.held_out import HeldOutRows, read_test_rows
from fedlora.data.records import read_rows
from fedlora.engines.answering import Answering, Answers, Source, group_names
from fedlora.errors import UsageError
from fedlora.federated.ranks import shapes_at
from fedlora.files import json_lines, read_json, sha256_of, write_json, write_text
from fedlora.llm.adapter_files import load_adapter
from fedlora.llm.base_model import BaseModel
from fedlora.llm.decoding import choose_decoding
from fedlora.llm.lora import LoraModel
from fedlora.llm.resident_base import ResidentBase
from fedlora.paths import OutputName, ResultPaths, RunPaths
from fedlora.results import Result
from fedlora.runs.environment import library_versions
from fedlora.runs.run_folder import read_run
from fedlora.runs.saved_adapters import adapter_file, adapter_specs, check_committed, find_additions
from fedlora.runs.subjects import Subject, find_adapters, find_share
from fedlora.types import BaseDelta


@dataclass(frozen=True)
class SubjectAnswers:
    """The answers of one subject, in the order of the test file."""

    subject: Subject
    file: Path

    @property
    def name(self) -> str:
        """Who answered, as tables call them."""
        return self.subject.name

    @property
    def texts(self) -> tuple[str, ...]:
        """The answers, read from the file."""
        return tuple(row.output for row in read_rows(self.file, output_key="answer"))


@dataclass(frozen=True, repr=False)
class Predictions(Result):
    """The answers that the chosen adapters have now, each in a file."""

    answers: tuple[SubjectAnswers, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of predictions."""
        return tuple(answer.file for answer in self.answers)

    def text(self) -> str:
        """One file a line."""
        return "\n".join(map(str, self.files))

    def as_dict(self) -> dict[str, Any]:
        """Who answered, from which round, and the file."""
        return {"answers": [{**answer.subject.record(), "file": str(answer.file)} for answer in self.answers]}


@dataclass(frozen=True)
class _Part:
    """Everyone of one round of one run who answers: their adapters, and what decides their answers."""

    paths: RunPaths
    round_number: int
    source: Source
    adapters: Mapping[OutputName, Path | None]
    called: Mapping[OutputName, str]
    additions: BaseDelta | None
    """To the base: the round's clients answer on top of them."""
    facts: Mapping[OutputName, dict[str, Any]]
    results: ResultPaths

    def missing(self, *, overwrite: bool) -> _Part:
        """Of the same round, those who have not answered yet."""
        left = {
            name: adapter
            for name, adapter in self.adapters.items()
            if not _is_answered(self.results, name, self.facts[name], overwrite=overwrite)
        }
        return replace(self, adapters=left)


def run(config: GenerateConfig, *, load: Callable[..., BaseModel] | None = None) -> Predictions:
    """Write the predictions of the chosen adapters. `load` takes the place of `load_base_model`.

    Everything is found and checked before a base is loaded; runs on one base share it.
    """
    load = load or ResidentBase().load
    subjects = find_adapters(
        config.words,
        run=config.exp_name,
        round_number=config.communication_rounds,
        model_dir=config.model_dir,
    )
    share = find_share(subjects, config.model_dir) if config.test_file_path.is_dir() else None
    tests = read_test_rows(config.test_file_path, rules=config.read_rules, share=share)
    places = dict.fromkeys((subject.run, subject.round_number) for subject in subjects)
    parts = {
        place: _make_part(config, *place, [one for one in subjects if (one.run, one.round_number) == place], tests)
        for place in places
    }
    open_parts = [part.missing(overwrite=config.overwrite) for part in parts.values()]
    for part in open_parts:
        if part.adapters:
            _answer_part(config, part, tests, load)
    return Predictions(
        tuple(SubjectAnswers(one, parts[one.run, one.round_number].results.predictions(one.output)) for one in subjects)
    )


def _make_part(
    config: GenerateConfig, name: str, round_number: int, subjects: Sequence[Subject], tests: HeldOutRows
) -> _Part:
    called = {subject.output: subject.name for subject in subjects}
    names = list(called)
    paths = RunPaths(config.model_dir, name)
    source = _find_source(config, paths, base_alone=all(name.kind == "base" for name in names))
    adapters = {name: None if name.kind == "base" else adapter_file(paths, round_number, name) for name in names}
    for file in filter(None, adapters.values()):
        check_committed(paths, round_number, file)
    additions = find_additions(paths, round_number) if any(map(_is_client, names)) else None
    facts = {name: _facts(config, source, adapters[name], tests) for name in names}
    if additions is not None:
        facts |= {name: {**facts[name], "base_delta_sha256": additions.sha256} for name in names if _is_client(name)}
    results = ResultPaths(config.prediction_dir, name, round_number)
    return _Part(paths, round_number, source, adapters, called, additions, facts, results)


def _answer_part(config: GenerateConfig, part: _Part, tests: HeldOutRows, load: Callable[..., BaseModel]) -> None:
    """Everybody's answers, group by group, each group written when it is done."""
    base = load(
        part.source.base_model,
        device=config.device,
        dtype=config.base_dtype,
        quantization=part.source.quantization,
        trust_remote_code=config.trust_remote_code,
    )
    trained = {name: file for name, file in part.adapters.items() if file is not None}
    specs = adapter_specs(part.paths, part.round_number, list(trained), base_model=base.name)
    # the layers take adapters of any smaller rank
    lora = LoraModel(base.model, max(specs.values(), key=lambda spec: spec.r)) if specs else None
    options = {"label": part.paths.exp_name, "called": part.called}
    answering = Answering(config, part.source, base, lora, tests.rows, **options)
    for group in group_names(list(part.adapters), len(tests.rows), specs, apart=part.additions is not None):
        states = [
            load_adapter(trained[name], shapes_at(lora.shapes(), specs[name].r)) if lora and name in trained else None
            for name in group
        ]
        background = part.additions.background if part.additions is not None and _is_client(group[0]) else None
        answers = answering.answer(group, states, background)
        for name in group:
            _write_answers(part.results, name, tests, answers, part.facts[name])


def _find_source(config: GenerateConfig, paths: RunPaths, *, base_alone: bool) -> Source:
    """Base model, template, cutoff and quantization: the run's, unless the base alone answers and there is no run."""
    if base_alone and not paths.run_file.is_file():
        template = "alpaca" if config.prompt_template == "auto" else config.prompt_template
        quantization = "none" if config.quantization == "auto" else config.quantization
        return Source(config.base_model, template, config.cutoff_len or 512, quantization)
    recorded = read_run(paths)
    trained_on = recorded.base_model
    if config.chosen("base_model") and config.base_model != trained_on:
        raise UsageError(
            f"base_model={config.base_model!r}, but run {paths.exp_name} was trained on {trained_on!r}",
            hint="leave --base_model out, or choose another --exp_name for answers of that base",
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


def _facts(config: GenerateConfig, source: Source, adapter: Path | None, tests: HeldOutRows) -> dict[str, Any]:
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
        "test_file_sha256": tests.sha256,
        "num_rows": len(tests.rows),
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
    results: ResultPaths, name: OutputName, tests: HeldOutRows, answers: Answers, facts: dict[str, Any]
) -> None:
    """One file of answers and its sidecar; the sidecar, which vouches for the file, comes last."""
    lines = [
        {"instruction": row.instruction, "input": row.input, "answer": text, "category": row.category}
        for row, text in zip(tests.rows, answers.texts[name], strict=True)
    ]
    for line, client in zip(lines, tests.clients, strict=False):
        line["client"] = client
    file = results.predictions(name)
    write_text(file, json_lines(lines))
    sidecar = {
        **facts,
        **answers.how,
        "num_new_tokens": answers.num_new_tokens[name],
        "predictions_sha256": sha256_of(file),
    }
    write_json(results.predictions_meta(name), sidecar)
