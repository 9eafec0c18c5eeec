"""The `import` stage: adapters of another program as a run.

Everything is read and compared with the base before a byte is written; files are never unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.command_line import command_line
from fedlora.config.generate import GenerateConfig
from fedlora.config.importing import ImportConfig
from fedlora.errors import UsageError
from fedlora.federated.adapters import Shapes
from fedlora.federated.ranks import shapes_at
from fedlora.files import read_text, sha256_of
from fedlora.llm.adapter_config import load_spec, make_peft_config
from fedlora.llm.adapter_files import load_adapter, read_shapes
from fedlora.llm.base_model import BaseModel, load_outline
from fedlora.llm.lora import LoraModel, is_fan_in_fan_out
from fedlora.llm.lora_layer import LoraSpec
from fedlora.llm.prompts import PromptEncoder
from fedlora.paths import OutputName, RunPaths
from fedlora.plain_text import counted
from fedlora.results import Result
from fedlora.runs.environment import library_versions
from fedlora.runs.foreign_adapters import ForeignAdapter, ForeignRun, find_foreign
from fedlora.runs.imported_run import MODE, make_room, write_rounds
from fedlora.runs.lock import hold_run
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.reader import RunReader
from fedlora.runs.run_records import RunRecord
from fedlora.runs.writer import RunWriter
from fedlora.types import AdapterState

Rounds = Sequence[Mapping[OutputName, AdapterState]]


@dataclass(frozen=True, repr=False)
class ImportedRun(Result):
    """A run made of adapters of another program."""

    paths: RunPaths
    record: Mapping[str, Any]
    """Folder, layout, rounds as the other program counted them, and the SHA-256 of every file."""
    config: ImportConfig

    @property
    def next_command(self) -> str:
        """How the adapters answer rows."""
        asked = {"exp_name": self.paths.exp_name, "test_file_path": "FILE", "model_dir": self.paths.model_dir}
        return command_line("generate", GenerateConfig, asked, positional="exp_name")

    def text(self) -> str:
        """How many adapters of which kind, and the folder."""
        files, rounds = len(self.record["files"]), len(self.record["rounds"])
        what = f"{counted(files, 'adapter')} of {counted(rounds, 'round')}, as {self.record['layout']} writes them"
        return f"{what}\n{self.paths.root}"

    def as_dict(self) -> dict[str, Any]:
        """The run's folder and where it came from."""
        return {"folder": str(self.paths.root), "imported_from": dict(self.record)}


def run(config: ImportConfig) -> ImportedRun:
    """Make the run. Raises UsageError for files that are no adapters of the base, and for a name that is taken."""
    found = find_foreign(config.folder)
    if not config.base_model:
        named = _named_base(found.adapters[0])
        raise UsageError(
            "base_model is not given", hint=f"give --base_model; the adapter's configuration names {named}"
        )
    specs = [load_spec(one.config, base_model=config.base_model) for one in found.adapters]
    widest = max(specs, key=lambda spec: spec.r)
    _check_alike(found, specs, widest)
    base = load_outline(config.base_model, device="cpu", dtype="float32", trust_remote_code=config.trust_remote_code)
    PromptEncoder(base.tokenizer, config.prompting)
    lora = LoraModel(base.model, widest)
    ranks = {one.file: spec.r for one, spec in zip(found.adapters, specs, strict=True)}
    rounds = [
        {one.name: _load(one, shapes_at(lora.shapes(), ranks[one.file])) for one in each.adapters}
        for each in found.rounds
    ]
    paths = RunPaths(config.model_dir, config.exp_name)
    origin = _describe(found)
    record = _make_record(config, base, widest, origin, rounds)
    with hold_run(paths):
        make_room(paths, overwrite=config.overwrite)
        writer = RunWriter(
            RunReader(paths, lora.shapes()),
            peft_config=make_peft_config(
                widest, config.base_model, fan_in_fan_out=is_fan_in_fan_out(base.model), targets=lora.peft_names
            ),
            header=record.header,
            log=MetricsLog(paths.metrics_file),
        )
        write_rounds(writer, record, _numbered(rounds))
    return ImportedRun(paths, origin, config)


def _numbered(rounds: Rounds) -> Iterator[tuple[int, Mapping[OutputName, AdapterState]]]:
    """Rounds count from 1 here, without gaps."""
    return iter(enumerate(rounds, start=1))


def _named_base(adapter: ForeignAdapter) -> str:
    try:
        named = json.loads(read_text(adapter.config)).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError):
        named = None
    return repr(named)[:200] if named else "no base"


def _check_alike(found: ForeignRun, specs: Sequence[LoraSpec], first: LoraSpec) -> None:
    """UsageError where adapters adapt other layers or have another scaling: a run has one of each."""
    for one, spec in zip(found.adapters, specs, strict=True):
        if set(spec.target_modules) != set(first.target_modules) or abs(spec.scaling / first.scaling - 1) > 1e-9:
            raise UsageError(
                f"{one.config}: other layers or another scaling (lora_alpha / r) than the other adapters",
                hint="import them as runs of their own",
            )


def _load(adapter: ForeignAdapter, expected: Shapes) -> AdapterState:
    """The tensors under our keys. PEFT's live models name the adapter in every key, and so do files saved from them."""
    if adapter.file.suffix == ".bin" and any(".default." in key for key in read_shapes(adapter.file)):
        live = {key: key.replace(".weight", ".default.weight") for key in expected}
        state = load_adapter(adapter.file, {live[key]: shape for key, shape in expected.items()})
        return {key: state[named] for key, named in live.items()}
    return load_adapter(adapter.file, expected)


def _describe(found: ForeignRun) -> dict[str, Any]:
    files = {one.file.relative_to(found.folder).as_posix(): sha256_of(one.file) for one in found.adapters}
    rounds = {str(place): one.number for place, one in enumerate(found.rounds, start=1)}
    return {"folder": str(found.folder), "layout": found.layout, "rounds": rounds, "files": files}


def _make_record(
    config: ImportConfig, base: BaseModel, spec: LoraSpec, origin: Mapping[str, Any], rounds: Rounds
) -> RunRecord:
    settings = {
        **config.prompting.record(),
        "cutoff_len": config.cutoff_len,
        "quantization": config.quantization,
        "num_communication_rounds": len(rounds),
        "lora_r": spec.r,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "lora_target_modules": list(spec.target_modules),
        "use_rslora": spec.use_rslora,
        "exp_name": config.exp_name,
        "base_model": config.base_model,
    }
    return RunRecord(
        exp_name=config.exp_name,
        mode=MODE,
        state="finished",
        base_model=config.base_model,
        base_dtype="unknown",
        config=settings,
        versions=library_versions(config.quantization),
        environment={},
        layout={},
        clients=(),
        has_global_model=all(OutputName("global") in one for one in rounds),
        imported_from=origin,
        base_identity=base.identity.record() if base.identity else None,
        more={"format": 1, "lora_scaling": spec.scaling, "has_personal_models": False},
    )
