"""What is exported: one adapter of a run, its base, and the prompts that it was trained with."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedlora.config.export import ExportConfig
from fedlora.config.prompting import PromptSettings
from fedlora.config.train_fields import Quantization
from fedlora.engines.answerers import training_settings
from fedlora.errors import StorageError, UsageError
from fedlora.federated.adapters import Shapes
from fedlora.federated.export import export_model
from fedlora.federated.ranks import shapes_at
from fedlora.files import json_text, read_text
from fedlora.llm import embedded_model
from fedlora.llm.adapter_config import config_at_rank, load_spec
from fedlora.llm.adapter_files import BIN_NAME, CONFIG_NAME, GLOBAL_BIN_NAME, load_adapter, read_shapes
from fedlora.llm.base_identity import find_folder, find_identity, is_hub_id
from fedlora.llm.base_source import open_source
from fedlora.llm.lora import LoraSpec
from fedlora.llm.prompts import PromptEncoder
from fedlora.llm.serving_template import ServingTemplate, make_serving_template
from fedlora.paths import RunPaths
from fedlora.plain_text import one_line
from fedlora.runs.base_chain import load_base
from fedlora.runs.checking import find_listed_fault, load_manifest
from fedlora.runs.recorded_base import RecordedBase, find_base
from fedlora.runs.run_folder import read_run
from fedlora.runs.run_records import RunRecord
from fedlora.runs.saved_adapters import adapter_file, check_committed, find_additions
from fedlora.runs.server_state import STATE_NAME, load_state
from fedlora.runs.subjects import Subject, find_adapters
from fedlora.types import AdapterState, BaseDelta

HIGHEST_RANK = 1 << 20
"""No limit: a sum never needs more than the smaller side of its layer."""


@dataclass(frozen=True)
class Exported:
    """One adapter and everything that another program has to know of it.

    `adapter` is on the base alone: additions of the run are in it. None is the base itself.
    """

    subject: Subject
    paths: RunPaths
    recorded: RunRecord
    base: RecordedBase
    prompting: PromptSettings
    quantization: Quantization
    """How the base was held in training."""
    adapter: AdapterState | None
    spec: LoraSpec | None
    relative_error: float
    """Of a limited rank: norm of what was cut off over that of the update."""
    is_sum: bool
    """Whether the run's additions to the base are part of the adapter."""
    trust_remote_code: bool

    @property
    def is_embedded(self) -> bool:
        """Whether the base is the embedded model, which no hub has with these weights."""
        return self.base.place == embedded_model.NAME

    @cached_property
    def base_folder(self) -> Path | None:
        """Where the base lies on this machine."""
        return find_folder(self.base.place)

    @property
    def base_gguf(self) -> Path | None:
        """The GGUF file that the base was made from, where there is one."""
        return embedded_model.package_file() if self.is_embedded else None

    @property
    def is_base_public(self) -> bool:
        """Whether the base's name resolves on other machines too."""
        return self.base_name == self.base.place and is_hub_id(self.base_name)

    @property
    def shown_base(self) -> str:
        """What a card calls the base; of a folder its own name alone, for its path says something of the machine."""
        name = one_line(self.base.name)
        return name if is_hub_id(name) else Path(name).name

    @property
    def base_name(self) -> str:
        """A name by which transformers finds the base: a hub id, or an absolute folder."""
        if not self.is_embedded and is_hub_id(self.base.place) and not Path(self.base.place).is_dir():
            return self.base.place
        return str((self.base_folder or Path(self.base.place)).absolute())

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Makes the prompts of the run; loads the base's tokenizer and checks the base's identity."""
        tokenizer = open_source(self.base.place, self.trust_remote_code).load_tokenizer()
        # of a base that a hub has just given it was not known before
        self.base.check(find_identity(self.base.place))
        return PromptEncoder(tokenizer, self.prompting)

    @cached_property
    def template(self) -> ServingTemplate:
        """How prompts are framed and what ends an answer."""
        return make_serving_template(self.encoder)

    def load_config(self) -> Any:
        """The base's configuration."""
        return open_source(self.base.place, self.trust_remote_code).load_config("none")

    @cached_property
    def loader(self) -> str:
        """The class of transformers that loads the base: a causal language model, or one that reads images too."""
        source = open_source(self.base.place, self.trust_remote_code)
        return source.find_loader(source.load_config("none")).__name__

    @property
    def rank(self) -> int:
        """Of the adapter; 0 of the base alone."""
        return self.spec.r if self.spec else 0

    @property
    def config_text(self) -> str:
        """The adapter's `adapter_config.json`, with a name of the base that resolves on this machine."""
        file = adapter_file(self.paths, self.subject.round_number, self.subject.output).with_name(CONFIG_NAME)
        value = json.loads(config_at_rank(read_text(file), self.rank))
        return json_text({**value, "base_model_name_or_path": self.base_name})


def find_exported(config: ExportConfig) -> Exported:
    """The adapter that a configuration names, its files compared with their hashes; UsageError for an unknown run,
    round, client or base, StorageError for a damaged file."""
    (subject,) = find_adapters(
        config.words, run=config.exp_name, round_number=config.communication_rounds, model_dir=config.model_dir
    )
    paths = RunPaths(config.model_dir, subject.run)
    recorded = read_run(paths)
    base = find_base(recorded, config.base_model)
    prompting, quantization, _ = training_settings(recorded.config, paths)
    if subject.output.kind == "base":
        adapter, spec, error, is_sum = None, None, 0.0, False
    else:
        adapter, spec, error, is_sum = read_adapter(paths, subject, export_rank=config.export_rank)
    return Exported(
        subject=subject,
        paths=paths,
        recorded=recorded,
        base=base,
        prompting=prompting,
        quantization=quantization,
        adapter=adapter,
        spec=spec,
        relative_error=error,
        is_sum=is_sum,
        trust_remote_code=config.trust_remote_code,
    )


def read_adapter(
    paths: RunPaths, subject: Subject, *, export_rank: int | None = None
) -> tuple[AdapterState, LoraSpec, float, bool]:
    """The adapter on the base alone, its shape, the error of a limited rank, and whether additions are in it."""
    number, output = subject.round_number, subject.output
    file = adapter_file(paths, number, output)
    file = file.with_name(GLOBAL_BIN_NAME if output.kind == "global" else BIN_NAME)
    check_committed(paths, number, file)
    spec = load_spec(file.with_name(CONFIG_NAME))
    shapes = read_shapes(file)
    adapter, additions = load_adapter(file, shapes), _find_additions(paths, subject)
    if additions is None:
        if export_rank is not None:
            raise UsageError(
                f"export_rank={export_rank}: the adapter of {subject.name} has rank {spec.r}, and nothing is "
                "added to its base",
                hint="leave it out",
            )
        return adapter, spec, 0.0, False
    if output.kind == "global":
        adapter = _read_start(paths, number, shapes_at(shapes, _trained_rank(paths)))
    most = export_rank or HIGHEST_RANK
    export = export_model(adapter, additions, scaling=spec.scaling, most_rank=most)
    if export.adapter is None:
        raise ValueError("a sum has an adapter")
    alpha = spec.scaling * (math.sqrt(export.rank) if spec.use_rslora else export.rank)
    return export.adapter, replace(spec, r=export.rank, alpha=alpha), export.relative_error, True


def _find_additions(paths: RunPaths, subject: Subject) -> BaseDelta | None:
    """What the run had added to the base when this adapter was made: it stands on that."""
    if subject.output.kind == "client":
        return find_additions(paths, subject.round_number)
    if load_manifest(paths.round_folder(subject.round_number)).base_delta is None:
        return None
    base = load_base(paths, subject.round_number)
    return base if base is not None and base.links else None


def _trained_rank(paths: RunPaths) -> int:
    return int(read_run(paths).config["lora_r"])


def _read_start(paths: RunPaths, number: int, shapes: Shapes) -> AdapterState:
    """The adapter from which the next round would have trained, beside the additions."""
    folder = paths.round_folder(number)
    if fault := find_listed_fault(folder, [folder / STATE_NAME]):
        raise StorageError(fault, hint="restore the file from a copy; `fedlora verify` finds all faults")
    state = load_state(folder, shapes)
    if state is None:
        raise StorageError(f"{folder}: holds no adapter", hint="restore the folder from a copy")
    return state.adapter
