"""What every configuration has in common: one pydantic model is the flags, the YAML file and the record.

Flags win over the file, the file over the defaults. Values from a file may be strings: YAML reads
`3e-4` as text, and pydantic turns it into the number that was meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedlora.config.names import as_fields, field_names, note_spelling
from fedlora.config.yaml_file import find_place, read_yaml
from fedlora.errors import UsageError
from fedlora.home import expand_home, path_at_home
from fedlora.nearest import nearest

GROUPS = ("run", "data", "method", "local training", "LoRA", "privacy", "robustness", "machine")
"""Headings of a help, in their order."""
OF_METHODS = "options of single methods"
"""The heading of flags that only some methods have."""


def flag(
    default: Any, help_text: str, *, group: str = "", everyday: bool = False, if_none: str = "", **limits: Any
) -> Any:
    """A field with a default, the help text its flag shows, and pydantic's limits (gt, ge, le ...).

    `group` is the heading that help lists it under, `everyday` whether help shows it unless all flags are asked for.
    Where the default is None or empty, `if_none` says what that means.
    """
    shown = {"group": group, "everyday": everyday, "if_none": if_none}
    return Field(default, description=help_text, json_schema_extra=shown, **limits)


def place_of_base(*, everyday: bool = False) -> Any:
    """The field `base_model` of a command that works on a run."""
    about = "where the run's base model lies now: a local folder, or a hub id"
    return flag("", about, everyday=everyday, if_none="where it was in training")


def split_names(value: Any) -> Any:
    """Accept `q_proj,v_proj`, `[q_proj, v_proj]` and `["q_proj", "v_proj"]` for a list of names."""
    if isinstance(value, str):
        parts = value.strip().strip("[]").split(",")
        return [name for part in parts if (name := part.strip().strip("\"'"))]
    return value


def _empty_is_none(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip() == "" else value


EMPTY_IS_NONE = BeforeValidator(_empty_is_none)


def _split_ranks(value: Any) -> Any:
    """Accept `8,4x2` (`[8, 4x2]`) for (8, 4, 4), one number for one, and nothing for None."""
    parts = split_names(value)
    if isinstance(parts, int):
        return (parts,)
    if not isinstance(parts, list | tuple):
        return parts
    ranks: list[Any] = []
    for part in parts:
        rank, _, count = part.partition("x") if isinstance(part, str) else (part, "", "")
        if count and not (count.isdecimal() and len(count) < 10 and 0 < int(count) <= MOST_RANKS - len(ranks)):
            raise ValueError(
                f"{part!r} is not a rank, or a rank times a number of clients, of at most {MOST_RANKS} in all"
            )
        ranks += [rank] * int(count or 1)
    return tuple(ranks) or None


def _split_pairs(value: Any) -> Any:
    """Accept `name=column,other=column` for a mapping, and nothing for an empty one."""
    if not isinstance(value, str):
        return {} if value is None else value
    pairs: dict[str, str] = {}
    for part in split_names(value):
        name, equals, column = (word.strip() for word in part.partition("="))
        if not name or not equals or not column:
            raise ValueError(f"{part!r} is not name=column")
        if name in pairs:
            raise ValueError(f"{name!r} is given twice")
        pairs[name] = column
    return pairs


MOST_RANKS = 100_000
"""Most clients that short forms stand for."""

PathText = Annotated[str, AfterValidator(expand_home)]
"""A path, or nothing."""
Names = Annotated[tuple[str, ...], BeforeValidator(split_names)]
Pairs = Annotated[dict[str, str], BeforeValidator(_split_pairs)]
OptionalInt = Annotated[int | None, EMPTY_IS_NONE]
OptionalRanks = Annotated[tuple[int, ...] | None, BeforeValidator(_split_ranks)]
OptionalFloat = Annotated[float | None, EMPTY_IS_NONE]


ONLY_BY_FLAG = {
    "trust_remote_code": "if you trust the model repository's code",
    "run_model_code": "if this machine may run code that a model writes",
}
"""Fields that a configuration file, which travels with data and models, must not decide, and when to give them."""


class Config(BaseModel):
    """Base of all stage configurations: immutable, unknown fields refused, defaults checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _below_home(cls, value: Any) -> Any:
        return path_at_home(value) if isinstance(value, Path) else value

    @classmethod
    def make(cls, values: Mapping[str, Any], *, file: Path | None = None) -> Self:
        """Build from flag values over an optional YAML file; UsageError names the field that is wrong.

        None in `values` stands for the default, whatever the file has.
        """
        file = path_at_home(file) if file else None
        values = as_fields(values, cls.flat_fields())
        unset = {name for name, value in values.items() if value is None}
        try:
            from_file = _fields_of(file, cls) if file else {}
            if file:
                cls.check_file(from_file, file)
            given = {**from_file, **values}
            return cls.model_validate({name: value for name, value in given.items() if name not in unset})
        except ValidationError as error:
            parts = []
            for item in error.errors():
                text = _explain(item, cls)
                place = find_place(file, text, field=_field_of(item), overridden=values) if file else ""
                parts.append(f"{place}{text}")
            raise UsageError("; ".join(parts), hint="see --help for the fields and what they take") from None
        except UsageError as error:
            if file is None or str(error).startswith(str(file)):
                raise
            raise UsageError(f"{find_place(file, str(error), overridden=values)}{error}", hint=error.hint) from None

    @classmethod
    def check_file(cls, fields: Mapping[str, Any], file: Path) -> None:
        """UsageError for what a configuration file, which travels with data and models, must not decide."""
        for name, condition in ONLY_BY_FLAG.items():
            if name in fields:
                raise UsageError(
                    f"{name} cannot be set in a file", hint=f"give --{name} on the command line {condition}"
                )

    @classmethod
    def flat_fields(cls) -> dict[str, FieldInfo]:
        """Every name that a flag, a line of a file or a keyword may have, with its type, help and default."""
        return dict(cls.model_fields)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """`make` for Python callers."""
        return cls.make(values)

    @classmethod
    def find_value_fault(cls, field: str, value: Any) -> str | None:
        """Why a value cannot be that of a field, whatever the other fields are; None when it can."""
        try:
            cls.model_validate({field: value})
        except ValidationError as error:
            return next((_explain(item, cls) for item in error.errors() if _field_of(item) == field), None)
        except UsageError as error:
            return str(error) if str(error).startswith(f"{field}={value!r}: ") else None
        return None

    def chosen(self, field: str) -> bool:
        """Whether the user set `field`, rather than its default applying."""
        return field in self.model_fields_set


def _fields_of(file: Path, config: type[Config]) -> dict[str, Any]:
    """A file's values under their field names: hyphens as in flags, and no `true` where a number belongs."""
    given: dict[str, Any] = {}
    for key, value in read_yaml(file).items():
        name = key.replace("-", "_")
        if name in given:
            raise UsageError(f"{name!r} is given twice", hint="keep one of the two")
        given[name] = value
    note_spelling(given)
    fields = as_fields(given, config.flat_fields())
    for name, value in fields.items():
        known = config.flat_fields().get(name)
        if isinstance(value, bool) and known is not None and known.annotation is not bool:
            raise UsageError(f"{name}={value} is not a value of this field", hint="see --help for what it takes")
    return fields


def _field_of(item: ErrorDetails) -> str:
    """The field that is wrong; empty where several do not fit together."""
    return str(item["loc"][0]) if item["loc"] else ""


def _explain(item: ErrorDetails, config: type[Config]) -> str:
    name, what = _field_of(item), item["msg"].removeprefix("Value error, ")
    if not name:
        return what
    if item["type"] == "extra_forbidden":
        close = nearest(name, field_names(config.flat_fields()))
        return f"unknown field {name!r}" + (f" (did you mean {close}?)" if close else "")
    if item["type"] == "missing":
        return f"{name} is required"
    # a mapping or a list is long, and the message quotes what is wrong in it
    is_long = isinstance(item["input"], dict | list | tuple)
    return f"{name}: {what}" if is_long else f"{name}={item['input']!r}: {what}"
