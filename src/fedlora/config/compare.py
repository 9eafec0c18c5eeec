"""Configuration of the `compare` stage: one experiment, mostly written as a YAML file.

The data are a folder of silos, or one file of rows that `allocate` divides among clients.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from fedlora.config.contenders import (
    DATA_FIELDS,
    Contender,
    Contenders,
    Data,
    Fields,
    Numbers,
    Rates,
    Setting,
    points_of,
    read_data_fields,
    read_train_fields,
    split_text,
    with_rows,
)
from fedlora.config.method_options import check_names_no_code
from fedlora.config.names import note_spelling
from fedlora.config.reading import READING_FIELDS
from fedlora.config.schema import Config, Names, OptionalInt, flag
from fedlora.files import is_saved_dataset
from fedlora.home import path_at_home
from fedlora.methods.outside import locate
from fedlora.methods.row import Method
from fedlora.methods.table import BASELINES, find_method
from fedlora.paths import check_name
from fedlora.plain_text import counted


class CompareConfig(Config):
    """Compare methods over seeds and settings on one data set under one budget, beside base, pooled and none.

    A call with the same configuration resumes where the last one stopped.
    """

    name: str = flag("comparison", "name of the comparison: its folder under output_dir", everyday=True)
    output_dir: Path = flag(Path("./comparisons"), "root folder of all comparisons")
    modes: Contenders = flag(
        (Contender("homo", "homo"),),
        "methods; in a file also {method: fedprox, name: ..., proximal_mu: 1}",
        everyday=True,
    )
    federation_mode: Names = flag(
        (), "methods from outside to compare too, which `methods` may name: file.py:name", if_none="those of `methods`"
    )
    seeds: Numbers = flag(
        (1, 2, 3), "seeds of data, adapters, cohorts and order; every method has the same", everyday=True
    )
    learning_rates: Rates = flag(
        (3e-4,), "learning rates of the clients; each method uses its best on validation rows", everyday=True
    )
    sweep_seeds: int = flag(1, "seeds on which learning rates are compared", ge=1)
    budget_steps: OptionalInt = flag(
        None, "budget of a run: optimizer steps of all clients", everyday=True, ge=1, if_none="budget_tokens"
    )
    budget_tokens: OptionalInt = flag(
        None, "budget of a run: tokens of prompts and responses", everyday=True, ge=1, if_none="budget_steps"
    )
    train: Fields = flag(
        {},
        "fields of train for every run, such as {rank: 4, batch_size: 16}",
        everyday=True,
        if_none="train's defaults",
    )
    data_path: Data = flag(
        {},
        "folder of the clients' files; or one file of rows, or fields of allocate: {input_file: rows.csv, alpha: 0.1}",
        everyday=True,
        if_none="the skills data",
    )
    test_share: float = flag(
        0.0,
        "share of each client's rows that is held out as its test rows, in [0, 1); of each category's where allocate "
        "divides one file",
        everyday=True,
        ge=0,
        lt=1,
    )
    test_file_path: Path | None = flag(
        None,
        "test rows for all clients, with a folder of clients' files",
        everyday=True,
        if_none="each client's <client>.test.<format>, or test_share of its rows",
    )
    axes: Fields = flag(
        {}, "settings to vary: {rank: [4, 16], skew: [{partition: iid}, {partition: category}]}", if_none="one setting"
    )
    validation_per_cat: int = flag(
        16,
        "examples on which learning rates are chosen: per category, at most half of a test_share; or per client of a "
        "folder, at most a fifth of its rows",
        ge=1,
    )
    test_per_cat: int = flag(32, "examples per category of the test set that allocate holds out", ge=1)
    answers_per_cat: int = flag(
        0, "test examples per category, or per client of a folder, that are answered and scored; 0: none", ge=0
    )
    max_new_tokens: int = flag(32, "longest answer, in tokens", ge=1)
    curves: Names = flag(("seq",), "methods whose loss per category is measured after every round or client")
    keep_runs: bool = flag(True, "keep every run's folder; false: remove it once it is measured")
    retry: bool = flag(False, "repeat runs that failed")
    plan: bool = flag(False, "print the runs and their expected time, and stop", everyday=True)
    trust_remote_code: bool = flag(False, "run code from the model's repository; only this flag can allow it")

    @classmethod
    def check_file(cls, fields: Mapping[str, Any], file: Path) -> None:
        super().check_file(fields, file)
        for text in (fields.get("federation_mode", ""), *split_text(fields.get("modes", ()))):
            check_names_no_code(text.get("mode", text.get("method")) if isinstance(text, Mapping) else text)

    @model_validator(mode="before")
    @classmethod
    def _find_methods(cls, given: Any) -> Any:
        asked = given.get("federation_mode") if isinstance(given, Mapping) else None
        if not asked:
            return given
        places = [asked] if isinstance(asked, Method) else split_text(asked)
        rows = [locate(one) if isinstance(one, Method) else find_method(one) for one in places]
        modes = with_rows(given.get("modes", "homo"), {row.name: row for row in rows})
        return {**given, "federation_mode": tuple(row.name for row in rows), "modes": modes}

    @field_validator("name")
    @classmethod
    def _is_folder(cls, value: str) -> str:
        return check_name(value, "name")

    @field_validator("modes")
    @classmethod
    def _distinct(cls, value: tuple[Contender, ...]) -> tuple[Contender, ...]:
        names = [contender.name for contender in value]
        if not names or len(set(names)) < len(names):
            raise ValueError("name at least one method, and none twice (a second one needs a `name` of its own)")
        for contender in value:
            if contender.name in ("base", *BASELINES) and contender.name != contender.mode:
                raise ValueError(f"{contender.name!r} is the name of another row")
        return value

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("one or more different numbers from 0 on")
        return value

    @field_validator("learning_rates")
    @classmethod
    def _some_rates(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("name at least one")
        return value

    @field_validator("train")
    @classmethod
    def _known_train(cls, value: dict[str, Any]) -> dict[str, Any]:
        return read_train_fields(value, "in train")

    @field_validator("data_path")
    @classmethod
    def _known_data(cls, value: dict[str, Any] | Path) -> dict[str, Any] | Path:
        if isinstance(value, Path):
            return value
        fields = read_data_fields(value, "in data")
        folder = path_at_home(str(fields.get("input_file", "")))
        if fields.get("input_file") and folder.is_dir() and not is_saved_dataset(folder):
            raise ValueError(f"input_file={folder} is a folder: for one file per client, give data={folder}")
        return fields

    @field_validator("test_file_path", mode="before")
    @classmethod
    def _empty_path_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("axes")
    @classmethod
    def _known_axes(cls, value: dict[str, Any]) -> dict[str, Any]:
        note_spelling(value)
        for axis, points in value.items():
            if not isinstance(points, list) or not points:
                raise ValueError(f"{axis}: a list of values")
            list(points_of(axis, points))
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> CompareConfig:
        if (self.budget_steps is None) == (self.budget_tokens is None):
            raise ValueError("give budget_steps or budget_tokens, and not both")
        if self.sweep_seeds > len(self.seeds):
            raise ValueError(f"sweep_seeds={self.sweep_seeds}, but there are {counted(len(self.seeds), 'seed')}")
        if not self.silos and not self.test_share and self.answers_per_cat > self.test_per_cat:
            raise ValueError(f"answers_per_cat={self.answers_per_cat} is more than test_per_cat={self.test_per_cat}")
        if self.silos and self.test_share and self.test_file_path:
            raise ValueError("give test_share or test_file_path, and not both")
        labels = [setting.label for setting in self.settings()]
        if len(set(labels)) < len(labels):
            raise ValueError("axes: the same setting comes twice")
        return self

    @model_validator(mode="after")
    def _fits_the_data(self) -> CompareConfig:
        if self.silos:
            dealing = {name for setting in self.settings() for name in setting.values} & (DATA_FIELDS - READING_FIELDS)
            given = [*sorted(dealing), *(["test_per_cat"] if self.chosen("test_per_cat") else [])]
            where = f"data_path={self.silos} is a folder of clients' files, and allocate divides one file of rows"
        else:
            reading = sorted(READING_FIELDS & self.train.keys())
            given = [*reading, *(["test_file_path"] if self.test_file_path else [])]
            where = "allocate reads and divides the rows" + (", see data" if reading else " and holds some of them out")
            if self.test_share and self.chosen("test_per_cat"):
                raise ValueError("give test_share or test_per_cat, and not both")
        if given:
            raise ValueError(f"{given[0]} has no effect: {where}")
        return self

    @property
    def silos(self) -> Path | None:
        """The folder of the clients' files, None where allocate divides one file of rows.

        A path that does not exist is taken for a folder unless it has a suffix.
        """
        given = self.data_path
        if not isinstance(given, Path) or given.is_file() or (given.suffix and not given.is_dir()):
            return None
        if is_saved_dataset(given):
            return None
        return given

    @property
    def allocation(self) -> dict[str, Any]:
        """Fields of allocate, where there is no folder of clients' files."""
        return {"input_file": self.data_path} if isinstance(self.data_path, Path) else self.data_path

    def contenders(self) -> tuple[Contender, ...]:
        """The methods in their order, followed by the fixed rows unless they are named."""
        named = {contender.mode for contender in self.modes if not contender.fields}
        return (*self.modes, *(Contender(mode, mode) for mode in BASELINES if mode not in named))

    def settings(self) -> tuple[Setting, ...]:
        """Every combination of the axes' points, the last axis fastest."""
        return tuple(
            Setting(", ".join(label for label, _ in chosen), {k: v for _, point in chosen for k, v in point.items()})
            for chosen in itertools.product(*(list(points_of(axis, values)) for axis, values in self.axes.items()))
        )

    def rates_of(self, contender: Contender) -> tuple[float, ...]:
        """The learning rates among which a method chooses."""
        return contender.learning_rates or self.learning_rates

    @property
    def budget_unit(self) -> str:
        """`steps` or `tokens`."""
        return "steps" if self.budget_steps is not None else "tokens"

    @property
    def budget(self) -> int:
        """How many of them a run may take."""
        return self.budget_steps or self.budget_tokens or 0
