"""What a comparison compares: the rows of its table and the settings they are compared under, as they are written.

`train`, `data` and the values of `axes` hold fields of the train and allocate stages, under their own names or the
short ones. What a comparison must decide itself (seed, rounds, method, learning rate, folders) is refused there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from fedlora.config.data import AllocateConfig
from fedlora.config.method_options import read_values
from fedlora.config.names import SHORT_NAMES, as_fields, note_spelling
from fedlora.config.reading import READING_FIELDS
from fedlora.config.schema import ONLY_BY_FLAG
from fedlora.config.train import TrainConfig
from fedlora.errors import UsageError
from fedlora.methods.outside import locate
from fedlora.methods.row import Method
from fedlora.methods.table import METHODS, find_method
from fedlora.paths import check_name

INSTEAD = {
    "data_path": "data",
    "test_file_path": "test",
    "test_share": "test_share",
    "seed": "seeds",
    "federation_mode": "methods",
    "local_learning_rate": "learning_rates",
    "test_per_cat": "test_per_cat",
    "num_communication_rounds": "budget_steps or budget_tokens",
    "local_val_set_size": "validation_per_cat",
    "val_data_path": "validation_per_cat",
    "exp_name": "name",
    "model_dir": "output_dir",
}
"""Fields of stages that a comparison decides, and its own field that does."""
_DECIDED = INSTEAD.keys() | {"overwrite", "output_root", "dataset_name"}
_ALLOCATE = frozenset(AllocateConfig.model_fields)
_TRAIN = frozenset(TrainConfig.flat_fields()) | {"test_file_path"}
DATA_FIELDS = _ALLOCATE - _DECIDED
TRAIN_FIELDS = _TRAIN - _DECIDED - (DATA_FIELDS - READING_FIELDS) - ONLY_BY_FLAG.keys()


@dataclass(frozen=True)
class Contender:
    """A row of the comparison: a method, with fields of its own where it has some."""

    name: str
    mode: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    row: Any = field(default=None, compare=False, repr=False)
    """Of a method from outside."""

    @property
    def method(self) -> Method:
        """The row of the method."""
        return self.row or METHODS[self.mode]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Setting:
    """One point of the axes: what it sets, and how it is called."""

    label: str
    values: Mapping[str, Any]


def read_train_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of train under their own names; ValueError for those that no comparison takes."""
    return _known(given, _TRAIN, TRAIN_FIELDS, where)


def read_data_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of allocate; ValueError for those that no comparison takes."""
    return _known(given, _ALLOCATE, DATA_FIELDS, where)


def read_axis_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of train or allocate under their own names."""
    return _known(given, _TRAIN | _ALLOCATE, TRAIN_FIELDS | DATA_FIELDS, where)


def points_of(axis: str, values: list[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every point of an axis: what it is called, in the names that were typed, and the fields that it sets."""
    for value in values:
        typed = value if isinstance(value, dict) else {axis: value}
        label = ", ".join(f"{name} {given}" for name, given in typed.items())
        yield label, read_axis_fields(typed, f"in axis {axis}")


def _known(given: Mapping[str, Any], spelled: Collection[str], known: Collection[str], where: str) -> dict[str, Any]:
    note_spelling(given)
    try:
        fields = as_fields(given, spelled)
    except UsageError as error:
        raise ValueError(f"{error} {where}") from None
    for name in fields:
        if name in INSTEAD:
            typed = next(one for one in given if one in (name, SHORT_NAMES.get(name)))
            raise ValueError(f"{typed} {where}: compare decides it; give {INSTEAD[name]} of the comparison")
        if name in _DECIDED:
            raise ValueError(f"{name} {where}: compare decides it")
        if name in ONLY_BY_FLAG:
            raise ValueError(f"{name} {where}: only the flag can set it")
        if name not in known:
            raise ValueError(f"unknown field {name!r} {where}")
        stage = TrainConfig if name in TrainConfig.flat_fields() else AllocateConfig
        if fault := stage.find_value_fault(name, fields[name]):
            raise ValueError(f"{fault} ({where})")
    return fields


def read_mapping(value: Any) -> Any:
    """A mapping, or the text of one, as a flag gives it: `{lora_r: 4}`."""
    if not isinstance(value, str):
        return value
    import yaml

    try:
        return yaml.safe_load(value) if value.strip() else {}
    except yaml.YAMLError:
        raise ValueError("not a mapping; write {field: value, ...}") from None


def _read_data(value: Any) -> Any:
    """A mapping or its text; any other text is a path."""
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        return Path(value.strip()) if value.strip() else {}
    return read_mapping(value)


def split_text(value: Any) -> Any:
    """`a,b` as a list; anything else unchanged."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _read_contenders(value: Any) -> Any:
    value = split_text(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError("a list of methods")
    return tuple(entry if isinstance(entry, Contender) else _read_contender(entry) for entry in value)


def _read_contender(entry: Any) -> Contender:
    """`homo`, or `{method: fedprox, name: strong pull, proximal_mu: 1, learning_rates: [1e-3]}`."""
    given = {"mode": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    named = [given.pop(key) for key in ("mode", "method", "federation_mode") if key in given]
    if len(named) > 1:
        raise ValueError("mode and method are the same field: keep one of the two")
    asked = named[0] if named else None
    row = locate(asked) if isinstance(asked, Method) else find_method(str(asked))
    name = str(given.pop("name", row.name.replace("/", "-")))
    try:
        check_name(name, "name")
    except UsageError as error:
        raise ValueError(f"{error}; {error.hint}") from None
    if len(name) > 40:
        raise ValueError(f"name={name!r} is longer than 40 characters")
    rates = _read_rates(given.pop("learning_rates", ()))
    own = {key: given.pop(key) for key in list(given) if row.source is not None and row.option(key)}
    try:
        options = read_values(row, own)
    except UsageError as error:
        raise ValueError(f"{error} of {name}") from None
    fields = read_train_fields(given, f"of {name}") | options
    return Contender(name, row.name, fields, rates, row if row.source is not None else None)


def with_rows(entries: Any, rows: Mapping[str, Method]) -> Any:
    """`methods` with the rows that their names stand for; those that no entry names come after them."""
    given = [{"mode": each} if isinstance(each, str) else each for each in split_text(entries)]
    named: list[dict[str, Any]] = [dict(each) for each in given if isinstance(each, Mapping)]
    for each in named:
        for key in ("mode", "method", "federation_mode"):
            if each.get(key) in rows:
                each[key] = rows[each[key]]
    used = {value.name for each in named for value in each.values() if isinstance(value, Method)}
    kept = [each for each in given if not isinstance(each, Mapping)]
    return [*kept, *named, *({"mode": row} for name, row in rows.items() if name not in used)]


def _read_rates(value: Any) -> tuple[float, ...]:
    if isinstance(value, (str, int, float)):
        value = split_text(str(value))
    try:
        rates = tuple(sorted({float(rate) for rate in value}))
    except (TypeError, ValueError):
        raise ValueError("a list of numbers") from None
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError("learning rates are positive numbers")
    return rates


Contenders = Annotated[tuple[Contender, ...], BeforeValidator(_read_contenders)]
Rates = Annotated[tuple[float, ...], BeforeValidator(_read_rates)]
Fields = Annotated[dict[str, Any], BeforeValidator(read_mapping)]
Numbers = Annotated[tuple[int, ...], BeforeValidator(split_text)]
Data = Annotated[dict[str, Any] | Path, BeforeValidator(_read_data)]
"""Fields of allocate, a folder of silos, or a file of rows."""
