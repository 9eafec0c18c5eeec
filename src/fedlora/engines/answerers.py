"""Who answers: the adapters of one round of one run, found and checked before a base is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

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
from fedlora.llm.lora_layer import LoraSpec
from fedlora.llm.trainable_layers import find_without_rows
from fedlora.paths import OutputName, RunPaths
from fedlora.rows import Row
from fedlora.runs.recorded_base import RecordedBase, find_base
from fedlora.runs.run_folder import read_run
from fedlora.runs.saved_adapters import adapter_file, adapter_specs, check_committed, find_additions
from fedlora.runs.subjects import Subject
from fedlora.types import AdapterState, BaseDelta


class HowToLoad(Protocol):
    """What a configuration says about loading a base."""

    @property
    def device(self) -> str: ...
    @property
    def base_dtype(self) -> str: ...
    @property
    def trust_remote_code(self) -> bool: ...


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
        opened = self.open(config, load)
        options = {"label": self.paths.exp_name, "called": self.called}
        answering = Answering(config, self.source, opened.base, opened.lora, rows, **options)
        for group in opened.group(len(rows), together=together):
            yield group, answering.answer(group, *opened.load(group))

    def open(self, config: HowToLoad, load: Callable[..., BaseModel]) -> OpenAnswerers:
        """The base in memory, with layers for all of these adapters."""
        base = self.source.base.load(
            load,
            device=config.device,
            dtype=config.base_dtype,
            quantization=self.source.quantization,
            trust_remote_code=config.trust_remote_code,
        )
        trained = [name for name, file in self.adapters.items() if file is not None]
        specs = adapter_specs(self.paths, self.round_number, trained, base_model=self.source.base.name)
        # the layers take adapters of any smaller rank
        lora = LoraModel(base.model, max(specs.values(), key=lambda spec: spec.r)) if specs else None
        return OpenAnswerers(self, base, lora, specs)


@dataclass(frozen=True)
class OpenAnswerers:
    """Answerers on their loaded base."""

    of: Answerers
    base: BaseModel
    lora: LoraModel | None
    specs: Mapping[OutputName, LoraSpec]

    def group(self, num_rows: int, *, together: bool = False) -> list[list[OutputName]]:
        """Who answers `num_rows` prompts side by side; with `together` all that stand on the same base."""
        names, is_added = list(self.of.adapters), self.of.additions is not None
        groups = group_names(names, num_rows, self.specs, apart=is_added)
        if together:
            clients = [name for name in names if is_added and name.kind == "client"]
            groups = [group for group in (clients, [name for name in names if name not in clients]) if group]
        if self.lora is None or all(len(group) == 1 for group in groups):
            return groups
        # which adapter answers a token is known by its row
        if find_without_rows(self.base.model, self.lora.layers, self.base.can.decoder):
            return [[name] for group in groups for name in group]
        return groups

    def load(self, group: Sequence[OutputName]) -> tuple[list[AdapterState | None], AdapterState | None]:
        """The adapters of a group, None for the base, and what they stand on beside it."""
        states = [self._state(name) for name in group]
        is_added = self.of.additions is not None and group[0].kind == "client"
        return states, self.of.additions.background if self.of.additions is not None and is_added else None

    def _state(self, name: OutputName) -> AdapterState | None:
        file = self.of.adapters[name]
        if self.lora is None or file is None:
            return None
        return load_adapter(file, shapes_at(self.lora.shapes(), self.specs[name].r))


def by_round(subjects: Sequence[Subject]) -> dict[tuple[str, int], list[Subject]]:
    """Run and round -> who of it answers."""
    found: dict[tuple[str, int], list[Subject]] = {}
    for one in subjects:
        found.setdefault((one.run, one.round_number), []).append(one)
    return found


def find_answerers(config: GenerateConfig, place: tuple[str, int], subjects: Sequence[Subject]) -> Answerers:
    """Subjects of one run and round, whose files are compared with their hashes. Raises UsageError, StorageError."""
    paths = RunPaths(config.model_dir, place[0])
    source = _find_source(config, paths, base_alone=all(subject.output.kind == "base" for subject in subjects))
    return gather_answerers(paths, place[1], source, subjects)


def gather_answerers(paths: RunPaths, round_number: int, source: Source, subjects: Sequence[Subject]) -> Answerers:
    """`find_answerers` of what is already known."""
    called = {subject.output: subject.name for subject in subjects}
    adapters = {name: None if name.kind == "base" else adapter_file(paths, round_number, name) for name in called}
    for file in filter(None, adapters.values()):
        check_committed(paths, round_number, file)
    additions = find_additions(paths, round_number) if any(name.kind == "client" for name in called) else None
    return Answerers(paths, round_number, source, adapters, called, additions)


def source_without_run(paths: RunPaths, base_model: str, quantization: Quantization | Literal["auto"]) -> Source:
    """A base that stands for itself, under the name of a run that is not there."""
    base = RecordedBase(paths.exp_name, base_model, base_model, find_identity(base_model))
    return Source(base, PromptSettings(), 512, "none" if quantization == "auto" else quantization)


def source_of_run(paths: RunPaths, place: str, quantization: Quantization | Literal["auto"]) -> Source:
    """Base, prompts, cutoff and quantization of a run; `place` is where the base lies now, empty where it was."""
    recorded = read_run(paths)
    base = find_base(recorded, place)
    prompting, recorded_quantization, cutoff_len = training_settings(recorded.config, paths)
    return Source(base, prompting, cutoff_len, recorded_quantization if quantization == "auto" else quantization)


def _find_source(config: GenerateConfig, paths: RunPaths, *, base_alone: bool) -> Source:
    """The run's, with what the user asks for instead, unless the base alone answers and there is no run."""
    if base_alone and not paths.run_file.is_file():
        found = source_without_run(paths, config.base_model, config.quantization)
    else:
        place = config.base_model if config.chosen("base_model") else ""
        found = source_of_run(paths, place, config.quantization)
        if found.prompting.token_rule != TOKEN_RULE:
            say(f"{paths.root}: trained when prompts were tokenised in parts, and answers prompts tokenised like that")
    prompting = _choose_prompting(config, found.prompting)
    return replace(found, prompting=prompting, cutoff_len=config.cutoff_len or found.cutoff_len)


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
