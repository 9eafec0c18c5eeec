"""Configuration of the `generate` stage."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from fedlora.config.reading import ReadingConfig
from fedlora.config.schema import OptionalFloat, OptionalInt, flag
from fedlora.config.train import Precision


class GenerateConfig(ReadingConfig):
    """Answer every row of a test file with the base model, the global adapter or a client's."""

    exp_name: str = flag("fedavg-1B", "experiment whose adapters answer")
    base_model: str = flag("meta-llama/Llama-3.2-1B", "unset: the one the run was trained on")
    model_dir: Path = flag(Path("./models"), "root of all runs")
    is_global_model: bool = flag(True, "answer with the global adapter; false: with client_id's")
    client_id: int = flag(0, "whose adapter answers when is_global_model is false", ge=0)
    communication_rounds: int = flag(20, "round whose adapters answer", ge=1)
    test_file_path: Path = flag(Path("./data/dataset1/dolly_test_200.jsonl"), "rows to answer")
    prediction_dir: Path = flag(Path("./predictions"), "root of all predictions")
    batch_size: OptionalInt = flag(None, "most rows answered at once; unset, the token budget decides", ge=1)
    tokens_per_pass: OptionalInt = flag(None, "most tokens, answers included, held at once; unset: what fits", ge=1)
    is_base_model: bool = flag(False, "answer with the untrained base model")
    all: bool = flag(False, "answer with base, global and every client of the round in one model load")

    preset: Literal["greedy", "reference"] = flag("greedy", "reference: the earlier research code's sampling")
    temperature: OptionalFloat = flag(None, "0 is greedy; the reference preset has 0.1", ge=0)
    top_p: OptionalFloat = flag(None, "nucleus; the reference preset has 0.75", gt=0, le=1)
    top_k: OptionalInt = flag(None, "0 is off; the reference preset has 50", ge=0)
    repetition_penalty: OptionalFloat = flag(None, "1 is off; the reference preset has 1.1", gt=0)
    max_new_tokens: int = flag(128, "most tokens of an answer", ge=1)
    seed: int = flag(309, "seed of the sampling; every row draws from a stream of its own", ge=0)

    prompt_template: Literal["auto", "alpaca", "chat"] = flag("auto", "auto: the one the run was trained with")
    cutoff_len: OptionalInt = flag(None, "most tokens of a prompt, the answer comes on top; unset: the run's", ge=8)
    device: str = flag("auto", "auto, cpu, cuda or cuda:<n>")
    base_dtype: Precision = flag("auto", "type of the frozen base; auto takes bfloat16 where the device is fast at it")
    quantization: Literal["auto", "none", "int8", "nf4"] = flag("auto", "how the base is held; auto: as in training")
    trust_remote_code: bool = flag(False, "run code that a model repository ships (only this flag can allow it)")
    overwrite: bool = flag(False, "replace predictions that are already there")

    @model_validator(mode="after")
    def _one_subject(self) -> GenerateConfig:
        if self.all and (self.is_base_model or not self.is_global_model or self.chosen("client_id")):
            raise ValueError("all answers with everyone: leave is_base_model, is_global_model and client_id alone")
        return self
