"""Configuration of the `plan` stage."""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator, model_validator

from fedlora.config.judge_models import JudgeNames, JudgePrices, check_prices
from fedlora.config.schema import flag
from fedlora.config.train import TrainConfig


class PlanConfig(TrainConfig):
    """Report time, memory, traffic and faults of the data before any training; nothing is written.

    It takes the configuration of `train`, as a file, as flags, or both.
    """

    test_file_path: Path | None = flag(
        None,
        "test rows: a file, or a folder of clients' files; checked for training rows, and planned for the judge",
        everyday=True,
        if_none="the clients' own test rows",
    )
    probe: bool = flag(
        True, "load the model and time two training steps; false: read only the model's configuration", everyday=True
    )
    plan_file: Path | None = flag(None, "new JSON file for the whole plan", if_none="no file")
    gpt_model: JudgeNames = flag(
        "gpt-4.1", "model that judges, or several with commas, whose prices are given", min_length=1
    )
    judge_batch_size: int = flag(20, "samples per request to the judge: batch_size of evaluate_llm", ge=1, le=100)
    judge_repeats: int = flag(1, "times that a judge is asked in each order: repeats of evaluate_llm", ge=1, le=20)
    judge_price_in: JudgePrices = flag(
        None,
        "price of a million tokens that a judge reads: one, or one for each judge",
        if_none="no forecast of the price",
    )
    judge_price_out: JudgePrices = flag(
        None,
        "price of a million tokens that a judge writes: one, or one for each judge",
        if_none="no forecast of the price",
    )

    @field_validator("test_file_path", "plan_file", mode="before")
    @classmethod
    def _empty_path_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _prices_of_the_judges(self) -> PlanConfig:
        check_prices(self.judge_price_in, self.judge_price_out, self.gpt_model)
        return self

    @property
    def judge_fields(self) -> list[str]:
        """The fields about the judge that were given: they need test rows."""
        fields = [name for name in PlanConfig.model_fields if name.startswith("judge_") or name == "gpt_model"]
        return [name for name in fields if self.chosen(name)]

    def training(self) -> TrainConfig:
        """The configuration that `train` would be called with."""
        fields = self.model_fields_set & TrainConfig.model_fields.keys()
        return TrainConfig.model_validate({name: getattr(self, name) for name in fields})
