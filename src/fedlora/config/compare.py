"""Configuration of the `compare` stage: one experiment, mostly written as a YAML file.

`train`, `data` and the values of `axes` hold fields of the train and allocate stages under their own names. What a
comparison must decide itself (seed, rounds, mode, learning rate, folders) is refused there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, field_validator, model_validator

from fedlora.config.data import AllocateConfig
from fedlora.config.schema import ONLY_BY_FLAG, Config, Names, OptionalInt, flag
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.methods.table import BASELINES, find_method
from fedlora.paths import check_name

_DECIDED = {
    *("exp_name", "model_dir", "data_path", "val_data_path", "federation_mode", "seed", "num_communication_rounds"),
    *("local_learning_rate", "overwrite", "output_root", "dataset_name", "test_per_cat", "local_val_set_size"),
}
DATA_FIELDS = frozenset(AllocateConfig.model_fields) - _DECIDED
TRAIN_FIELDS = frozenset(TrainConfig.flat_fields()) - _DECIDED - DATA_FIELDS - ONLY_BY_FLAG


@dataclass(frozen=True)
class Contender:
    """A row of the comparison: a method, with fields of its own where it has some."""

    name: str
    mode: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Setting:
    """One point of the axes: what it sets, and how it is called."""

    label: str
    values: Mapping[str, Any]


def _read_mapping(value: Any) -> Any:
    """A mapping, or the text of one, as a flag gives it: `{lora_r: 4}`."""
    if not isinstance(value, str):
        return value
    import yaml

    try:
        return yaml.safe_load(value) if value.strip() else {}
    except yaml.YAMLError:
        raise ValueError("not a mapping; write {field: value, ...}") from None


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _read_contenders(value: Any) -> Any:
    if isinstance(value, str):
        value = _split(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError("a list of modes")
    return tuple(entry if isinstance(entry, Contender) else _read_contender(entry) for entry in value)


def _read_contender(entry: Any) -> Contender:
    """`homo`, or `{mode: fedprox, name: strong pull, proximal_mu: 1, learning_rates: [1e-3]}`."""
    given = {"mode": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    mode = given.pop("mode", None)
    mode = find_method(str(mode)).name
    name = str(given.pop("name", mode))
    try:
        check_name(name, "name")
    except UsageError as error:
        raise ValueError(f"{error}; {error.hint}") from None
    if len(name) > 40:
        raise ValueError(f"name={name!r} is longer than 40 characters")
    rates = given.pop("learning_rates", ())
    _check_fields(given, TRAIN_FIELDS, f"of {name}")
    return Contender(name, mode, given, _read_rates(rates))


def _read_rates(value: Any) -> tuple[float, ...]:
    if isinstance(value, (str, int, float)):
        value = _split(str(value))
    try:
        rates = tuple(sorted({float(rate) for rate in value}))
    except (TypeError, ValueError):
        raise ValueError("a list of numbers") from None
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError("learning rates are positive numbers")
    return rates


def _check_fields(given: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for name in given:
        if name in _DECIDED:
            raise ValueError(f"{name} {where}: compare decides it")
        if name in ONLY_BY_FLAG:
            raise ValueError(f"{name} {where}: only the flag can set it")
        if name not in known:
            raise ValueError(f"unknown field {name!r} {where}")


Contenders = Annotated[tuple[Contender, ...], BeforeValidator(_read_contenders)]
Rates = Annotated[tuple[float, ...], BeforeValidator(_read_rates)]
Fields = Annotated[dict[str, Any], BeforeValidator(_read_mapping)]
Numbers = Annotated[tuple[int, ...], BeforeValidator(_split)]


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
    data: Fields = flag(
        {}, "fields of allocate, such as {input_file: rows.csv}", everyday=True, if_none="the skills data"
    )
    axes: Fields = flag(
        {}, "settings to vary: {rank: [4, 16], skew: [{partition: iid}, {partition: category}]}", if_none="one setting"
    )
    validation_per_cat: int = flag(16, "examples per category on which learning rates are chosen", ge=1)
    test_per_cat: int = flag(32, "examples per category of the test set", ge=1)
    answers_per_cat: int = flag(0, "test examples per category that are answered and scored; 0: none", ge=0)
    max_new_tokens: int = flag(32, "longest answer, in tokens", ge=1)
    curves: Names = flag(("seq",), "methods whose loss per category is measured after every round or client")
    keep_runs: bool = flag(True, "keep every run's folder; false: remove it once it is measured")
    retry: bool = flag(False, "repeat runs that failed")
    plan: bool = flag(False, "print the runs and their expected time, and stop", everyday=True)
    trust_remote_code: bool = flag(False, "run code from the model's repository; only this flag can allow it")

    @field_validator("name")
    @classmethod
    def _is_folder(cls, value: str) -> str:
        return check_name(value, "name")

    @field_validator("modes")
    @classmethod
    def _distinct(cls, value: tuple[Contender, ...]) -> tuple[Contender, ...]:
        names = [contender.name for contender in value]
        if not names or len(set(names)) < len(names):
            raise ValueError("name at least one mode, and none twice (a second one needs a `name` of its own)")
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
        _check_fields(value, TRAIN_FIELDS, "in train")
        return value

    @field_validator("data")
    @classmethod
    def _known_data(cls, value: dict[str, Any]) -> dict[str, Any]:
        _check_fields(value, DATA_FIELDS, "in data")
        return value

    @field_validator("axes")
    @classmethod
    def _known_axes(cls, value: dict[str, Any]) -> dict[str, Any]:
        for axis, points in value.items():
            if not isinstance(points, list) or not points:
                raise ValueError(f"{axis}: a list of values")
            for point in points:
                fields = point if isinstance(point, dict) else {axis: point}
                _check_fields(fields, TRAIN_FIELDS | DATA_FIELDS, f"in axis {axis}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> CompareConfig:
        if (self.budget_steps is None) == (self.budget_tokens is None):
            raise ValueError("give budget_steps or budget_tokens, and not both")
        if self.sweep_seeds > len(self.seeds):
            raise ValueError(f"sweep_seeds={self.sweep_seeds}, but there are {len(self.seeds)} seeds")
        if self.answers_per_cat > self.test_per_cat:
            raise ValueError(f"answers_per_cat={self.answers_per_cat} is more than test_per_cat={self.test_per_cat}")
        labels = [setting.label for setting in self.settings()]
        if len(set(labels)) < len(labels):
            raise ValueError("axes: the same setting comes twice")
        return self

    def contenders(self) -> tuple[Contender, ...]:
        """The methods in their order, with the fixed rows behind them unless they are named."""
        named = {contender.mode for contender in self.modes if not contender.fields}
        return (*self.modes, *(Contender(mode, mode) for mode in BASELINES if mode not in named))

    def settings(self) -> tuple[Setting, ...]:
        """Every combination of the axes' points, the last axis fastest."""
        return tuple(
            Setting(", ".join(label for label, _ in chosen), {k: v for _, point in chosen for k, v in point.items()})
            for chosen in itertools.product(*(list(_points(axis, values)) for axis, values in self.axes.items()))
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


def _points(axis: str, values: list[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for value in values:
        fields = value if isinstance(value, dict) else {axis: value}
        yield ", ".join(f"{name} {given}" for name, given in fields.items()), fields
