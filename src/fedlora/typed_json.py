"""Frozen dataclasses as JSON objects and back, to the same bytes.

A field without a default must be there and is always written; one with a default is written where its value is another.
What a class does not know is kept in its field `more`, and so is a default that was spelled out: what an older or newer
release wrote can be read, and written again as it was.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

_JSON_TYPES: dict[Any, type] = {Mapping: dict, Sequence: list, tuple: list}
_NAMES = {dict: "an object", list: "an array", str: "text", int: "a whole number", bool: "true or false"}


def from_json(kind: type[T], value: Any) -> T:
    """The object of a dataclass that `value` describes; ValueError that names the field for any other value."""
    if type(value) is not dict:
        raise ValueError("not a JSON object")
    hints, known, make = get_type_hints(kind), {}, cast(Callable[..., T], kind)
    for field in _known_fields(kind):
        if field.name in value and not _is_default(field, value[field.name]):
            known[field.name] = _read(field.name, value[field.name], hints[field.name])
        elif field.name not in value and _is_needed(field):
            raise ValueError(f"{field.name} is missing")
    return make(**known, more={name: each for name, each in value.items() if name not in known})


def to_json(record: Any) -> dict[str, Any]:
    """A record's fields as JSON values."""
    written = {
        field.name: _write(value)
        for field in _known_fields(type(record))
        if not _is_default(field, value := getattr(record, field.name))
    }
    return {**record.more, **written}


def _known_fields(kind: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.name != "more"]


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return value == field.default_factory()
    return type(value) is type(field.default) and value == field.default


def _read(name: str, value: Any, hint: Any) -> Any:
    kinds = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    wanted = [_JSON_TYPES.get(get_origin(kind) or kind, kind) for kind in kinds]
    if type(value) not in wanted:
        raise ValueError(f"{name} is {repr(value)[:60]}, not {_NAMES[wanted[0]]}")
    if get_origin(hint) is tuple:
        return tuple(from_json(get_args(hint)[0], each) for each in value)
    return value


def _write(value: Any) -> Any:
    return [to_json(each) for each in value] if type(value) is tuple else value
