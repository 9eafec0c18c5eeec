"""Configuration of the `export` stage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import field_validator, model_validator

from fedlora.config.schema import Config, OptionalInt, flag, place_of_base
from fedlora.config.who import ROUNDS, Subjects, WhichRound

Format = Literal["peft", "merged", "gguf-lora", "gguf"]
_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


class ExportConfig(Config):
    """Write an adapter of a run for other programs: as a PEFT folder, merged into its base, or for llama.cpp and
    Ollama. A model card lies beside it, with the commands that load it.

    The folder appears when everything in it is written. Nothing leaves this machine without `--push`.
    """

    exp_name: str = flag("fedavg-1B", "run whose adapter is exported", everyday=True)
    communication_rounds: WhichRound = flag(
        None, f"round of the adapter: {ROUNDS}", everyday=True, if_none="the run's last"
    )
    of_subjects: Subjects = flag(
        None,
        "whose adapter: global, a client's name or number, or NAME/ROUND/who; base: the base model alone, as gguf",
        everyday=True,
        if_none="global",
    )
    to: Path = flag(Path("./export"), "folder to write; it must be new or empty", everyday=True)
    format: Format = flag(
        "peft",
        "peft: adapter and tokenizer; merged: a whole model; gguf-lora, gguf: the same two for llama.cpp and Ollama",
        everyday=True,
    )
    dtype: Literal["float32", "bfloat16", "float16"] = flag(
        "float32", "number type of a whole model (merged, gguf)", everyday=True
    )
    export_rank: OptionalInt = flag(
        None,
        "largest rank of the adapter of a method that adds to the base; beyond it the best approximation is written",
        ge=1,
        if_none="as high as the sum needs",
    )
    license: str = flag("", "licence for the model card, such as apache-2.0", if_none="no licence is named")
    base_model: str = place_of_base(everyday=True)
    model_dir: Path = flag(Path("./models"), "root folder of all runs", everyday=True)
    evaluation_dir: Path = flag(Path("./evaluations_rouge"), "root folder of the scores that the card shows")
    push: str = flag(
        "",
        "upload the folder to this repository of the model hub: USER/NAME; it is private if it is new",
        everyday=True,
        if_none="nothing is uploaded",
    )
    trust_remote_code: bool = flag(False, "run code from the model's repository; only this flag can allow it")

    @field_validator("of_subjects")
    @classmethod
    def _one_adapter(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (len(value) != 1 or value[0].rpartition("/")[2] == "all"):
            raise ValueError("one adapter is exported at a time: name one of them")
        return value

    @field_validator("push")
    @classmethod
    def _is_repository(cls, value: str) -> str:
        if value and _REPOSITORY.fullmatch(value) is None:
            raise ValueError("not a repository of a hub: give USER/NAME")
        return value

    @model_validator(mode="after")
    def _fits_the_format(self) -> ExportConfig:
        if self.chosen("dtype") and self.format not in ("merged", "gguf"):
            raise ValueError(f"dtype is of a whole model: format={self.format} holds the adapter, in float32")
        if self.words[0].rpartition("/")[2] == "base" and self.format != "gguf":
            raise ValueError(f"format={self.format} holds an adapter, and base has none: give format=gguf")
        return self

    @property
    def words(self) -> tuple[str, ...]:
        """Whose adapter, as `of` has it."""
        return self.of_subjects or ("global",)
