"""A comparison as runs: data sets, configurations and the names of runs.

A run is named by a hash of everything it computes from, its data included. So an experiment that is changed keeps the
runs that are still asked for, and what is the same under two settings (`pooled` where only privacy varies) is run
once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.comparing.known_bases import KnownBases
from fedlora.config.compare import CompareConfig
from fedlora.config.contenders import DATA_FIELDS, Contender, Setting
from fedlora.config.data import AllocateConfig
from fedlora.config.train import COMBINING_FIELDS, TrainConfig
from fedlora.errors import UsageError
from fedlora.files import sha256_of_json
from fedlora.paths import ComparisonPaths
from fedlora.rows import Row

DIGEST = 10


@dataclass(frozen=True)
class Cell:
    """One method under one setting: a row of the table, with one run per seed."""

    setting: Setting
    contender: Contender

    @property
    def key(self) -> tuple[str, str]:
        """What distinguishes it from every other cell."""
        return self.setting.label, self.contender.name


@dataclass(frozen=True)
class SiloFacts:
    """The clients of a folder of silos, and what became of their rows."""

    names: Mapping[str, str]
    """Number -> name."""
    grouped_by: str
    """What losses are grouped by: `client`, `category`, or `file` where all test rows are one group."""
    rows: Mapping[str, Sequence[int]]
    """Name -> rows for training, for validation, and test rows of its own."""
    num_test: int
    num_leaks: int
    """Test rows whose prompt some client trains on."""


@dataclass(frozen=True)
class DataSet:
    """The clients' files, the held-out rows, and a hash of all of it."""

    folder: Path
    validation: Path
    test: Path
    answered: Path
    num_clients: int
    digest: str
    shares: Mapping[str, Mapping[str, float]] | None = None
    """Client -> group of test rows -> how much it counts in the client's own loss; None: as its training rows are."""
    validation_shares: Mapping[str, Mapping[str, float]] | None = None
    silos: SiloFacts | None = None
    is_mixed: bool = False
    """Whether a file holds rows of several kinds."""

    @property
    def own_groups(self) -> dict[str, str]:
        """Client -> the group of its own test rows; empty where test rows belong to no client."""
        if self.silos is None or self.silos.grouped_by != "client":
            return {}
        return {client: next(iter(groups)) for client, groups in (self.shares or {}).items()}


def cells_of(config: CompareConfig) -> list[Cell]:
    """Every row of the table, setting by setting."""
    return [Cell(setting, contender) for setting in config.settings() for contender in config.contenders()]


def allocation_of(config: CompareConfig, setting: Setting, seed: int, paths: ComparisonPaths) -> AllocateConfig:
    """How the data of a setting is dealt out under a seed; the held-out rows do not depend on how."""
    fields = {**config.allocation, **{name: value for name, value in setting.values.items() if name in DATA_FIELDS}}
    held_out: Any = config.validation_per_cat + config.test_per_cat
    size: dict[str, Any] = {"test_per_cat": held_out}
    if config.test_share:
        size, held_out = {"test_share": config.test_share}, {"test_share": config.test_share}
    digest = sha256_of_json([{name: str(value) for name, value in fields.items()}, held_out])[:DIGEST]
    return AllocateConfig.of(
        **{"input_file": paths.rows_file(seed), **fields},
        output_root=paths.data_dir,
        dataset_name=f"{digest}-s{seed}",
        **size,
        seed=seed,
    )


def train_fields_of(config: CompareConfig, cell: Cell) -> dict[str, Any]:
    """The training fields of a cell; later ones win: train, setting, method."""
    setting = {name: value for name, value in cell.setting.values.items() if name not in DATA_FIELDS}
    # the rows were read by these already, and lie in the data set under the fields' own names
    train = {name: value for name, value in config.train.items() if name not in ("row_kind", "columns")}
    shared = {**train, **setting}
    if cell.contender.method.is_baseline:
        shared = {name: value for name, value in shared.items() if name not in COMBINING_FIELDS}
    return {**shared, **cell.contender.fields}


def train_config_of(
    config: CompareConfig, cell: Cell, *, seed: int, rate: float, rounds: int, data: DataSet, bases: KnownBases
) -> TrainConfig:
    """The configuration of one run, under its name; UsageError where it cannot be."""
    paths = ComparisonPaths(config.output_dir, config.name)
    made = TrainConfig.of(
        **train_fields_of(config, cell),
        federation_mode=cell.contender.row or cell.contender.mode,
        seed=seed,
        local_learning_rate=rate,
        num_communication_rounds=rounds,
        num_clients=data.num_clients,
        data_path=data.folder,
        model_dir=paths.model_dir,
        trust_remote_code=config.trust_remote_code,
        **({"row_kind": "any"} if data.is_mixed else {}),
    )
    source = made.method.source
    record = made.full_record() | {"base_model": bases.name_of(made.base_model)}
    record |= {"method_files": dict(source.files)} if source is not None else {}
    mode = made.federation_mode.replace("/", "-")
    named = f"{mode}-s{seed}-lr{rate:g}-{digest_of(record, data)}".replace("+", "")
    return made.model_copy(update={"exp_name": named})


def base_name_of(train: TrainConfig, data: DataSet, bases: KnownBases) -> str:
    """The name under which the base model's own loss on a data set is kept."""
    names = ("base_dtype", "quantization", "cutoff_len")
    fields = {name: getattr(train, name) for name in names} | {"base_model": bases.name_of(train.base_model)}
    return f"base-{digest_of(fields | train.prompting.record(), data)}"


def digest_of(record: Mapping[str, Any], data: DataSet) -> str:
    """The beginning of a hash over a configuration, without its name, and the data."""
    return sha256_of_json([{k: v for k, v in record.items() if k != "exp_name"}, data.digest])[:DIGEST]


def rows_to_answer(tests: Sequence[Row], config: CompareConfig) -> list[Row]:
    """The test rows that are answered and scored. UsageError where one is plain text, before anything is trained."""
    answered, _ = split_rows(tests, config.answers_per_cat)
    if any(row.kind == "text" for row in answered):
        raise UsageError(
            f"answers_per_cat={config.answers_per_cat}: some test rows are plain text, and a text asks nothing",
            hint="compare losses alone, with answers_per_cat: 0",
        )
    return answered


def split_rows(rows: Sequence[Row], first: int) -> tuple[list[Row], list[Row]]:
    """The first so many rows of every category, and all others."""
    seen: dict[str, int] = {}
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        seen[row.category] = seen.get(row.category, 0) + 1
        parts[seen[row.category] > first].append(row)
    return parts
