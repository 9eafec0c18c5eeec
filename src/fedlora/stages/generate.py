"""Answer every row of a test file with the base model, the global adapter or a client's.

The base is loaded once and adapters are swapped in it, never merged: merging into bfloat16 weights
loses most of an adapter. Beside each file of answers stands a sidecar that says what produced it; a
second call with the same settings finds it and answers nothing twice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.generate import GenerateConfig
from fedlora.config.train import Quantization
from fedlora.console import Progress, say
from fedlora.data.records import read_rows
from fedlora.errors import DataError, UsageError
from fedlora.files import json_lines, read_json, sha256_of, write_json, write_text
from fedlora.llm.adapter_files import load_adapter
from fedlora.llm.base_model import BaseModel, load_base_model
from fedlora.llm.decoding import choose_decoding
from fedlora.llm.generation import generate_answers
from fedlora.llm.lora import LoraModel
from fedlora.llm.prompts import PromptEncoder
from fedlora.paths import OutputName, ResultPaths, RunPaths
from fedlora.runs.adapters import adapter_file, adapter_spec, names_in_round
from fedlora.runs.round_store import read_run
from fedlora.stages.train import library_versions
from fedlora.types import Row


@dataclass(frozen=True)
class Source:
    """Everything the answers depend on, apart from the adapter."""

    base_model: str
    prompt_template: str
    cutoff_len: int
    quantization: Quantization


def run(config: GenerateConfig) -> list[Path]:
    """Write the predictions of the chosen adapters; returns the files."""
    paths = RunPaths(config.model_dir, config.exp_name)
    source = _find_source(config, paths)
    rows = read_rows(config.test_file_path)
    if not rows:
        raise DataError(f"{config.test_file_path}: no rows", hint="give a test file with rows")
    names = _choose_names(config, paths)
    adapters = {name: adapter_file(paths, config.communication_rounds, name) for name in names if name.kind != "base"}
    results = ResultPaths(config.prediction_dir, config.exp_name, config.communication_rounds)
    facts = {name: _facts(config, source, adapters.get(name), len(rows)) for name in names}
    missing = [name for name in names if not _is_answered(results, name, facts[name], overwrite=config.overwrite)]
    if missing:
        base = load_base_model(
            source.base_model,
            device=config.device,
            dtype=config.base_dtype,
            quantization=source.quantization,
            trust_remote_code=config.trust_remote_code,
        )
        lora = _add_lora(base, paths, config, missing)
        for name in missing:
            _set_adapter(lora, adapters.get(name))
            _answer(config, source, base, rows, results, name, facts[name])
    written = [results.predictions(name) for name in names]
    for file in written:
        print(file)
    return written


def _find_source(config: GenerateConfig, paths: RunPaths) -> Source:
    """Base model, template, cutoff and quantization: the run's, unless the base alone answers and there is no run."""
    if config.is_base_model and not paths.run_file.is_file():
        template = "alpaca" if config.prompt_template == "auto" else config.prompt_template
        quantization = "none" if config.quantization == "auto" else config.quantization
        return Source(config.base_model, template, config.cutoff_len or 512, quantization)
    recorded = read_run(paths)
    trained_on = recorded["base_model"]
    if config.chosen("base_model") and config.base_model != trained_on:
        raise UsageError(
            f"base_model={config.base_model!r}, but run {config.exp_name} was trained on {trained_on!r}",
            hint="leave --base_model out, or name the model the adapters belong to",
        )
    chosen = config.prompt_template
    template = recorded["config"]["prompt_template"] if chosen == "auto" else chosen
    # runs older than the field were trained on the base as it is
    trained_in = recorded["config"].get("quantization", "none")
    quantization = trained_in if config.quantization == "auto" else config.quantization
    return Source(trained_on, template, config.cutoff_len or recorded["config"]["cutoff_len"], quantization)


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
        "quantization": source.quantization,
        "decoding": {"preset": config.preset, **choose_decoding(config).record()},
        "test_file": config.test_file_path.name,
        "test_file_sha256": sha256_of(config.test_file_path),
        "num_rows": num_rows,
        "base_dtype_asked": config.base_dtype,
        "versions": library_versions(source.quantization),
    }


def _is_answered(results: ResultPaths, name: OutputName, facts: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether these very predictions lie there already; UsageError when others do and may not be replaced."""
    file, sidecar = results.predictions(name), results.predictions_meta(name)
    if overwrite or not file.is_file():
        return False
    recorded = read_json(sidecar) if sidecar.is_file() else {}
    differing = sorted(key for key, value in facts.items() if recorded.get(key) != value)
    if not differing and recorded.get("predictions_sha256") == sha256_of(file):
        say(f"{file}: already answered with these settings")
        return True
    raise UsageError(
        f"{file}: predictions made with other settings lie there (different: {', '.join(differing) or 'the rows'})",
        hint="give --overwrite to replace them, or another --prediction_dir",
    )


def _add_lora(base: BaseModel, paths: RunPaths, config: GenerateConfig, names: list[OutputName]) -> LoraModel | None:
    trained = [name for name in names if name.kind != "base"]
    if not trained:
        return None
    return LoraModel(base.model, adapter_spec(paths, config.communication_rounds, trained[0]))


def _set_adapter(lora: LoraModel | None, file: Path | None) -> None:
    if lora is not None:
        lora.set_adapter(load_adapter(file, lora.shapes()) if file else None)


def _answer(
    config: GenerateConfig,
    source: Source,
    base: BaseModel,
    rows: list[Row],
    results: ResultPaths,
    name: OutputName,
    facts: dict[str, Any],
) -> None:
    """Generate one file of answers and its sidecar; the sidecar, which vouches for the file, comes last."""
    encoder = PromptEncoder(base.tokenizer, source.prompt_template)
    decoding = choose_decoding(config)
    prompts = [encoder.prompt(row, cutoff=source.cutoff_len, response_length=decoding.max_new_tokens) for row in rows]
    began = time.monotonic()
    with Progress(f"answers of {config.exp_name} {name}", len(rows)) as progress:
        answers = generate_answers(
            base,
            [prompt.ids for prompt in prompts],
            decoding,
            tokens_per_pass=config.tokens_per_pass,
            most_rows=config.batch_size,
            on_rows=progress.advance,
        )
    lines = [
        {
            "instruction": row.instruction,
            "input": row.input,
            "answer": encoder.decode(answer),
            "category": row.category,
        }
        for row, answer in zip(rows, answers, strict=True)
    ]
    file = results.predictions(name)
    write_text(file, json_lines(lines))
    sidecar = {
        **facts,
        "base_dtype": base.dtype_name,
        "device": str(base.device),
        "predictions_sha256": sha256_of(file),
        "num_shortened": sum(prompt.num_removed > 0 for prompt in prompts),
        "num_new_tokens": sum(len(answer) for answer in answers),
        "seconds": round(time.monotonic() - began, 3),
    }
    write_json(results.predictions_meta(name), sidecar)
