"""Whole rounds of fedlora as `fedlora train` runs them: federated loop, client pool, store, metrics, manifest.

The settings are those of usual.py: rank 8, alpha 16, no dropout, a constant learning rate, every client in every
round, optimizer steps of `local_batch_size` rows. The token budget of a pass is fedlora's own choice.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rows import CUTOFF, TEMPLATE
from usual import QUERY_VALUE

from fedlora.config.train import TrainConfig
from fedlora.data.client_facts import read_client_files
from fedlora.engines.client_data import ClientExamples
from fedlora.engines.workbench import Workbench, make_workbench
from fedlora.home import tokens_folder
from fedlora.llm.token_files import TokenFiles
from fedlora.methods.choosing import choose_method
from fedlora.paths import RunPaths
from fedlora.training.live_run import Training


def make_config(
    name: str, device: str, *, dtype: str = "auto", targets: Sequence[str] = QUERY_VALUE, **more: Any
) -> TrainConfig:
    """The configuration of a timed run; `more` replaces its fields."""
    fields: dict[str, Any] = {
        "base_model": name,
        "device": device,
        "base_dtype": dtype,
        "lora_target_modules": tuple(targets),
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "prompt_template": TEMPLATE,
        "cutoff_len": CUTOFF,
        "client_selection_strategy": "all",
        "num_communication_rounds": 1,
        "local_batch_size": 24,
        "local_num_epochs": 1,
        "local_learning_rate": 3e-4,
        "seed": 0,
    }
    return TrainConfig.of(**{**fields, **more})


def make_bench(config: TrainConfig, files: Sequence[Path]) -> Workbench:
    """Base, LoRA layers and trainer on the configured device, with one client per file."""
    return make_workbench(config, read_client_files(dict(enumerate(files)), config), device=config.device)


def with_files(bench: Workbench, config: TrainConfig, files: Sequence[Path]) -> Workbench:
    """The same base and trainer with other clients."""
    clients = read_client_files(dict(enumerate(files)), config)
    return replace(bench, examples=ClientExamples(clients, bench.encoder, config, TokenFiles(tokens_folder())))


def time_rounds(
    bench: Workbench, config: TrainConfig, *, prepare: Callable[[Training], None] = lambda training: None
) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of a run of `num_communication_rounds` rounds in a new folder, and its lines of metrics.

    `prepare` sees the run before the clock starts.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = RunPaths(Path(folder), "bench")
        paths.root.mkdir()
        training = Training(config, choose_method(config), paths, bench, [])
        prepare(training)
        began = time.perf_counter()
        training.run()
        seconds = time.perf_counter() - began
        return seconds, [json.loads(line) for line in paths.metrics_file.read_text().splitlines()]
