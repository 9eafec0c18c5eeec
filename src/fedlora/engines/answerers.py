"""Who answers: the adapters of one round of one run, found and checked before a base is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from fedlora.config.generate import GenerateConfig
from fedlora.config.prompting import TEMPLATES, TOKEN_RULE, PromptSettings
from fedlora.config.train import LATER_FIELDS
from fedlora.config.train_fields import Quantization
from fedlora.console import say
from fedlora.engines.answering import Answering, Answers, Source, group_names
from fedlora.errors import UsageError
from fedlora.federated.ranks import shapes_at
from fedlora.llm.adapter_files import load_adapter
from fedlora.llm.base_identity import find_identity
from fedlora.llm.base_model import BaseModel
from fedlora.llm.lora import LoraModel
from fedlora.llm.trainable_layers import see_rows
from fedlora.paths import OutputName, RunPaths
from fedlora.rows import Row
from fedlora.runs.recorded_base import RecordedBase, find_base
from fedlora.runs.run_folder import read_run
from fedlora.runs.saved_adapters import adapter_file, adapter_specs, check_committed, find_additions
from fedlora.runs.subjects import Subject
from fedlora.types import BaseDelta


@dataclass(frozen=True)
class Answerers:
    """Adapters of one round, None for the base model, and what their answers depend on."""

    paths: RunPaths
    round_number: int
    source: Source
    adapters: Mapping[OutputName, Path | None]
    called: Mapping[OutputName, str]
    """What messages call them."""
    additions: BaseDelta | None
    """To the base: the round's clients answer on top of them."""

    def answer(
        self, config: GenerateConfig, rows: Sequence[Row], load: Callable[..., BaseModel], *, together: bool = False
    ) -> Iterator[tuple[list[OutputName], Answers]]:
        """Everybody's answers to `rows`, group by group.

        `together` is for a few questions: all that stand on the same base answer in one batch, the base with them.
        """
        base = self.source.base.load(
            load,
            device=config.device,
            dtype=config.base_dtype,
            quantization=self.source.quantization,
            trust_remote_code=config.trust_remote_code,
        )
        trained = {name: file for name, file in self.adapters.items() if file is not None}
        specs = adapter_specs(self.paths, self.round_number, list(trained), base_model=self.source.base.name)
        # the layers take adapters of any smaller rank
        lora = LoraModel(base.model, max(specs.values(), key=lambda spec: spec.r)) if specs else None
        options = {"label": self.paths.exp_name, "called": self.called}
        answering = Answering(config, self.source, base, lora, rows, **options)
        names = list(self.adapters)
        groups = group_names(names, len(rows), specs, apart=self.additions is not None)
        if together:
            clients = [name for name in names if self.additions is not None and name.kind == "client"]
            groups = [group for group in (clients, [name for name in names if name not in clients]) if group]
        if (
            lora is not None
            and any(len(group) > 1 for group in groups)
            and not see_rows(base.model, lora.layers.values())
        ):
            # which adapter answers a token is known by its row
            groups = [[name] for group in groups for name in group]
        for group in groups:
            states = [
                load_adapter(trained[name], shapes_at(lora.shapes(), specs[name].r))
                if lora and name in trained
                else None
                for name in group
            ]
            is_added = self.additions is not None and group[0].kind == "client"
            background = self.additions.background if self.additions is not None and is_added else None
            yield group, answering.answer(group, states, background)


def by_round(subjects: Sequence[Subject]) -> dict[tuple[str, int], list[Subject]]:
    """Run and round -> who of it answers."""
    found: dict[tuple[str, int], list[Subject]] = {}
    for one in subjects:
        found.setdefault((one.run, one.round_number), []).append(one)
    return found


def find_answerers(config: GenerateConfig, place: tuple[str, int], subjects: Sequence[Subject]) -> Answerers:
    """Subjects of one run and round, whose files are compared with their hashes. Raises UsageError, StorageError."""
    paths, round_number = RunPaths(config.model_dir, place[0]), place[1]
    called = {subject.output: subject.name for subject in subjects}
    source = _find_source(config, paths, base_alone=all(name.kind == "base" for name in called))
    adapters = {name: None if name.kind == "base" else adapter_file(paths, round_number, name) for name in called}
    for file in filter(None, adapters.values()):
        check_committed(paths, round_number, file)
    additions = find_additions(paths, round_number) if any(name.kind == "client" for name in called) else None
    return Answerers(paths, round_number, source, adapters, called, additions)


def _find_source(config: GenerateConfig, paths: RunPaths, *, base_alone: bool) -> Source:
    """Base model, prompts, cutoff and quantization: the run's, unless the base alone answers and there is no run."""
    if base_alone and not paths.run_file.is_file():
        quantization = "none" if config.quantization == "auto" else config.quantization
        base = RecordedBase(paths.exp_name, config.base_model, config.base_model, find_identity(config.base_model))
        prompting = _choose_prompting(config, PromptSettings())
        return Source(base, prompting, config.cutoff_len or 512, quantization)
    recorded = read_run(paths)
    base = find_base(recorded, config.base_model if config.chosen("base_model") else "")
    prompting, quantization, cutoff_len = training_settings(recorded.config, paths)
    if prompting.token_rule != TOKEN_RULE:
        say(f"{paths.root}: trained when prompts were tokenised in parts, and answers prompts tokenised like that")
    return Source(
        base,
        _choose_prompting(config, prompting),
        config.cutoff_len or cutoff_len,
        quantization if config.quantization == "auto" else config.quantization,
    )


def _choose_prompting(config: GenerateConfig, trained: PromptSettings) -> PromptSettings:
    """A run's prompts with what the user asks for instead."""
    found = trained
    asked = (config.prompt_template, config.template_text)
    if config.prompt_template != "auto" and asked != (trained.template, trained.text):
        found = PromptSettings(*asked, date=trained.date)
    if config.chosen("template_kwargs"):
        found = replace(found, kwargs=config.template_kwargs, token_rule=TOKEN_RULE)
    return replace(found, date=config.template_date) if config.template_date else found


def training_settings(recorded: Mapping[str, Any], paths: RunPaths) -> tuple[PromptSettings, Quantization, int]:
    """Prompts, quantization and cutoff that a run was trained with; UsageError for values no run can have."""
    # runs older than a field were trained without what it adds
    found = {"quantization": "none", **LATER_FIELDS, **recorded}
    quantization, cutoff_len = found["quantization"], found.get("cutoff_len")
    names = ("prompt_template", "template_text", "template_kwargs", "template_date", "token_rule")
    prompting: list[Any] = [found.get(name) for name in names]
    is_known = [type(value) for value in prompting] == [str, str, dict, str, int] and 1 <= prompting[-1] <= TOKEN_RULE
    has_template = prompting[0] in TEMPLATES or bool(prompting[1])
    if is_known and has_template and quantization in get_args(Quantization) and type(cutoff_len) is int:
        return PromptSettings(*prompting), cast(Quantization, quantization), cutoff_len
    raise UsageError(
        f"{paths.run_file}: damaged: prompt_template, quantization or cutoff_len has an impossible value",
        hint="restore the file, or train again with --overwrite",
    )
