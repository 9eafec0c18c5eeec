"""The hyper-parameters of federated methods as fields of a configuration: flat names, checked by the method table.

A configuration holds those that were given in one field, `method_options`; in flags, YAML files, keywords and records
each is a field like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fedlora.config.schema import Config, flag
from fedlora.errors import UsageError
from fedlora.methods.row import Method, Option
from fedlora.methods.table import METHODS


class MethodOptions(Config):
    """Base of configurations that name a method and take its hyper-parameters."""

    method_options: dict[str, Any] = flag({}, "options of the method that differ from its defaults")

    @classmethod
    def methods_with_options(cls) -> tuple[Method, ...]:
        """The methods whose hyper-parameters are fields here."""
        return tuple(METHODS.values())

    @classmethod
    def flat_fields(cls) -> dict[str, FieldInfo]:
        fields = {name: field for name, field in cls.model_fields.items() if name != "method_options"}
        return fields | options_as_fields(cls.methods_with_options())

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        known = options_of(cls.methods_with_options())
        flat = {name: value for name, value in given.items() if name in known}
        gathered = {**(given.get("method_options") or {}), **flat}
        if unknown := sorted(gathered.keys() - known.keys()):
            raise UsageError(f"method_options: no method has {unknown[0]}", hint="see docs/methods.md")
        rest = {name: value for name, value in given.items() if name not in flat and name != "method_options"}
        read = {name: _read(known[name][0], value) for name, value in sorted(gathered.items())}
        options = {name: value for name, value in read.items() if value is not None}
        return {**rest, "method_options": options} if options else rest


def options_of(methods: tuple[Method, ...]) -> dict[str, list[Option]]:
    """Name -> the options of that name, one for each method that has it."""
    found: dict[str, list[Option]] = {}
    for method in methods:
        for option in method.options:
            found.setdefault(option.name, []).append(option)
    return found


@cache
def options_as_fields(methods: tuple[Method, ...]) -> dict[str, FieldInfo]:
    """Name -> what a flag needs to know of it; the default names the methods that have it."""
    fields = {}
    for name, (first, *_) in options_of(methods).items():
        defaults: dict[str, list[str]] = {}
        for method in methods:
            if own := method.option(name):
                defaults.setdefault(own.shown_default, []).append(method.name)
        shown = "; ".join(f"{value} with {', '.join(names)}" for value, names in defaults.items())
        if len(methods) == 1:
            shown = next(iter(defaults))
        fields[name] = FieldInfo(annotation=first.kind, description=first.help, default=shown)
    return fields


def _read(option: Option, value: Any) -> Any:
    """A value as its type, None where it is left out; UsageError for one that is not of its type, or out of bounds."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        return _reader(option.kind, tuple(option.limits.items())).validate_python(value)
    except ValidationError as error:
        what = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"{option.name}={value!r}: {what}", hint="see --help for the fields and what they take"
        ) from None


@cache
def _reader(kind: Any, limits: tuple[tuple[str, float], ...]) -> TypeAdapter[Any]:
    finite: dict[str, Any] = {"allow_inf_nan": False} if kind is float else {}
    bounded: Any = Annotated[kind, Field(**dict(limits), **finite)]
    return TypeAdapter(bounded)
