"""The whole pipeline on the embedded model and data: what `make demo` runs.

It calls the stages exactly as the command line does, one after another, so what it shows is what the
stages do. All modes share data, seed, rounds and steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config.data import AllocateConfig, ModelConfig, SkillsConfig
from fedlora.config.demo import DemoConfig
from fedlora.config.evaluate import ReportConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.score import ScoreConfig
from fedlora.config.train import TrainConfig
from fedlora.console import collect_lines, duration, say
from fedlora.paths import DataPaths, RunPaths
from fedlora.plain_text import counted
from fedlora.results import Result

if TYPE_CHECKING:
    from fedlora.stages.report import Report

DATASET = "skills"
MODES = ("homo", "seq", "none", "pooled")
"""What the README shows; every further one costs minutes (`fedlora compare` takes any)."""
MAX_NEW_TOKENS = 24
"""No right answer of the skills is longer; an untrained model would talk on."""


@dataclass(frozen=True, repr=False)
class Demonstration(Result):
    """The report of the demo, where its models and their base lie, and how long it took."""

    report: Report
    adapter: Path
    base: Path
    seconds: float

    def parts(self) -> Sequence[str]:
        """The main table, how to load the global adapter of homo, and last the page for a browser."""
        return (*self.report.parts(), self._loading(), str(self.report.page))

    def as_dict(self) -> dict[str, Any]:
        """What the report has, with the folders of the global adapter of homo and of its base."""
        return {**self.report.as_dict(), "adapter": str(self.adapter), "base": str(self.base)}

    def _loading(self) -> str:
        return (
            "\nThe global adapter of homo in PEFT (`pip install peft`):\n"
            "  from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
            f"  base = AutoModelForCausalLM.from_pretrained({str(self.base)!r})\n"
            f"  model = PeftModel.from_pretrained(base, {str(self.adapter)!r})\n\n"
            f"The whole demo took {duration(self.seconds)}."
        )


def run(config: DemoConfig) -> Demonstration:
    """Allocate, train four methods, generate, score, report, with the progress of what takes time."""
    from fedlora.stages import allocate, data_skills, generate, report, score, train
    from fedlora.stages import model as model_stage

    began = time.monotonic()
    root = config.output_dir
    say("1. model and data: eight clients, one skill each")
    model = model_stage.run(ModelConfig())
    rows_file = root / "data" / "skills.json"
    skills = SkillsConfig.of(
        output_file=rows_file,
        rows_per_category=config.train_per_cat + config.test_per_cat,
        seed=config.seed,
        overwrite=True,
    )
    data = DataPaths(root / "data", DATASET)
    allocation = AllocateConfig.of(
        input_file=rows_file,
        output_root=root / "data",
        dataset_name=DATASET,
        train_per_cat=config.train_per_cat,
        test_per_cat=config.test_per_cat,
        seed=config.seed,
        overwrite=True,
    )
    with collect_lines():
        data_skills.run(skills)
        allocate.run(allocation)
    test_file = data.test_file(config.test_per_cat)
    say(f"2. training: {', '.join(MODES)}, {counted(config.rounds, 'round')} each")
    for mode in MODES:
        train.run(_train_config(config, mode, str(test_file)))
    say("3. answers to the test rows")
    generate.run(_generate_config(config, test_file))
    say("4. scores and report")
    with collect_lines():
        score.run(_score_config(config, test_file))
        written = report.run(_report_config(config))
    adapter = RunPaths(root / "models", "homo").round_folder(config.rounds).resolve()
    return Demonstration(written, adapter, model.folder, time.monotonic() - began)


def _train_config(config: DemoConfig, mode: str, test_file: str) -> TrainConfig:
    return TrainConfig.of(
        exp_name=mode,
        federation_mode=mode,
        base_model="smollm2-135m",
        data_path=config.output_dir / "data" / DATASET,
        model_dir=config.output_dir / "models",
        client_selection_frac=1.0,
        num_communication_rounds=config.rounds,
        local_batch_size=16,
        local_num_epochs=1,
        local_learning_rate=2e-3,
        lora_r=8,
        lora_dropout=0.0,
        lora_target_modules="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        prompt_template="chat",
        val_data_path=test_file,
        seed=config.seed,
        device=config.device,
        overwrite=True,
    )


def _subjects(config: DemoConfig) -> list[str]:
    """`none` answers with the base model and every client, the other methods with their global adapter."""
    return [f"{mode}/{config.rounds}/{'all' if mode == 'none' else 'global'}" for mode in MODES]


def _generate_config(config: DemoConfig, test_file: Path) -> GenerateConfig:
    return GenerateConfig.of(
        of_subjects=_subjects(config),
        model_dir=config.output_dir / "models",
        prediction_dir=config.output_dir / "predictions",
        test_file_path=test_file,
        max_new_tokens=MAX_NEW_TOKENS,
        device=config.device,
        overwrite=True,
    )


def _score_config(config: DemoConfig, test_file: Path) -> ScoreConfig:
    return ScoreConfig.of(
        of_subjects=_subjects(config),
        model_dir=config.output_dir / "models",
        prediction_dir=config.output_dir / "predictions",
        evaluation_dir=config.output_dir / "evaluations_rouge",
        target_file=test_file,
    )


def _report_config(config: DemoConfig) -> ReportConfig:
    return ReportConfig.of(
        exp_names=",".join(MODES),
        communication_rounds=config.rounds,
        model_dir=config.output_dir / "models",
        prediction_dir=config.output_dir / "predictions",
        rouge_dir=config.output_dir / "evaluations_rouge",
        llm_dir=config.output_dir / "evaluations_llm",
        report_dir=config.output_dir / "reports",
        report_name="demo",
    )
