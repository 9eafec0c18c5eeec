"""What every configuration has in common: one pydantic model is the flags, the YAML file and the record.

Flags win over the file, the file over the defaults. Values from a file may be strings: YAML reads
`3e-4` as text, and pydantic turns it into the number that was meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from fedlora.config.names import as_fields, field_names, note_spelling
from fedlora.errors import UsageError
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


MOST_RANKS = 100_000
"""Most clients that short forms stand for."""

Names = Annotated[tuple[str, ...], BeforeValidator(split_names)]
OptionalInt = Annotated[int | None, EMPTY_IS_NONE]
OptionalRanks = Annotated[tuple[int, ...] | None, BeforeValidator(_split_ranks)]
OptionalFloat = Annotated[float | None, EMPTY_IS_NONE]


ONLY_BY_FLAG = frozenset({"trust_remote_code"})
"""Fields that a configuration file, which travels with data and models, must not decide."""


class Config(BaseModel):
    """Base of all stage configurations: immutable, unknown fields refused, defaults checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    @classmethod
    def make(cls, values: Mapping[str, Any], *, file: Path | None = None) -> Self:
        """Build from flag values over an optional YAML file; UsageError names the field that is wrong.

        None in `values` stands for the default, whatever the file has.
        """
        from_file = _fields_of(file, cls) if file else {}
        values = as_fields(values, cls.flat_fields())
        unset = {name for name, value in values.items() if value is None}
        if file:
            cls.check_file(from_file, file)
        try:
            given = {**from_file, **values}
            return cls.model_validate({name: value for name, value in given.items() if name not in unset})
        except ValidationError as error:
            raise UsageError(_explain(error, cls), hint="see --help for the fields and what they take") from None

    @classmethod
    def check_file(cls, fields: Mapping[str, Any], file: Path) -> None:
        """UsageError for what a configuration file, which travels with data and models, must not decide."""
        if ONLY_BY_FLAG & fields.keys():
            raise UsageError(
                f"{file}: trust_remote_code cannot be set in a file",
                hint="give --trust_remote_code on the command line if you trust the model repository's code",
            )

    @classmethod
    def flat_fields(cls) -> dict[str, FieldInfo]:
        """Every name that a flag, a line of a file or a keyword may have, with its type, help and default."""
        return dict(cls.model_fields)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """`make` for Python callers."""
        return cls.make(values)

    def chosen(self, field: str) -> bool:
        """Whether the user set `field`, rather than its default applying."""
        return field in self.model_fields_set


def _fields_of(file: Path, config: type[Config]) -> dict[str, Any]:
    """A file's values under their field names: hyphens as in flags, and no `true` where a number belongs."""
    given: dict[str, Any] = {}
    for key, value in read_yaml(file).items():
        name = key.replace("-", "_")
        if name in given:
            raise UsageError(f"{file}: {name!r} is given twice", hint="keep one of the two")
        given[name] = value
    note_spelling(given)
    fields = as_fields(given, config.flat_fields(), where=f"{file}: ")
    for name, value in fields.items():
        known = config.flat_fields().get(name)
        if isinstance(value, bool) and known is not None and known.annotation is not bool:
            raise UsageError(
                f"{file}: {name}={value} is not a value of this field", hint="see --help for what it takes"
            )
    return fields


def _explain(error: ValidationError, config: type[Config]) -> str:
    parts = []
    for item in error.errors():
        if not item["loc"]:
            parts.append(item["msg"].removeprefix("Value error, "))
            continue
        name = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            close = nearest(name, field_names(config.flat_fields()))
            parts.append(f"unknown field {name!r}" + (f" (did you mean {close}?)" if close else ""))
        elif item["type"] == "missing":
            parts.append(f"{name} is required")
        else:
            parts.append(f"{name}={item['input']!r}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts)


_YAML_HINT = "a configuration file is UTF-8 text with `field: value` lines"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping with string keys; duplicate keys and anything else are refused, with the line."""
    import yaml

    from fedlora.files import read_text

    class StrictLoader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UsageError(f"{path}:{line}: {key!r} is given twice", hint="keep one of the two")
            seen[key] = loader.construct_object(value_node, deep=True)
        return seen

    StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        # a SafeLoader subclass: plain values only, no Python objects
        content = yaml.load(read_text(path), Loader=StrictLoader)  # noqa: S506
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path}: not a configuration ({type(error).__name__}: {str(error)[:80]})", hint=_YAML_HINT
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError(f"{place}: not valid YAML", hint="check indentation and quotes") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{path}: a configuration file holds `field: value` lines", hint="see docs for an example")
    return content
