"""The hyper-parameters of federated methods as fields of a configuration: flat names, checked by the method table.

A configuration holds those that were given in one field, `method_options`; in flags, YAML files, keywords and records
each is a field like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fedlora.config.names import field_names
from fedlora.config.schema import Config, flag
from fedlora.errors import UsageError
from fedlora.methods.outside import locate
from fedlora.methods.row import Method, Option
from fedlora.methods.table import METHODS, find_method
from fedlora.nearest import suggest

KEYWORDS = frozenset({"config", "help", "json", "method_row", "progress", "set"})
"""Names beside its fields that a configuration's flags and keywords have."""


class NamesMethod(Config):
    """Base of configurations that name a method in their field `federation_mode`.

    The field holds the name. The row of a method from outside is kept beside it, and is loaded again from its place
    in another process.
    """

    method_row: Any = Field(None, exclude=True, repr=False)

    @classmethod
    def flat_fields(cls) -> dict[str, FieldInfo]:
        return {name: field for name, field in super().flat_fields().items() if name != "method_row"}

    @classmethod
    def check_file(cls, fields: Mapping[str, Any], file: Path) -> None:
        super().check_file(fields, file)
        check_names_no_code(fields.get("federation_mode"))

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, given: Any) -> Any:
        return cls._with_row(given) if isinstance(given, Mapping) else given

    @classmethod
    def _with_row(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` with the name of its method, and with the row of one from outside."""
        asked, row = given.get("federation_mode"), given.get("method_row")
        if row is not None and not isinstance(row, Method):
            raise UsageError("method_row cannot be set", hint="name the method in federation_mode")
        if isinstance(asked, Method):
            row = locate(asked) if METHODS.get(asked.name) is not asked else asked
        elif isinstance(asked, str) and asked and (row is None or row.name != asked):
            row = find_method(asked)
        elif asked is not None and not isinstance(asked, str):
            raise UsageError(
                f"federation_mode is of type {type(asked).__name__}, not a name or a Method",
                hint='give a name, or fedlora.methods.Method("name", server=..., client=...)',
            )
        rest = {name: value for name, value in given.items() if name not in ("federation_mode", "method_row")}
        if row is None:
            return rest if asked is None else {**rest, "federation_mode": asked}
        if row.source is None:
            return {**rest, "federation_mode": row.name}
        _check_options(row, cls)
        return {**rest, "federation_mode": row.name, "method_row": row}

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "method_row": _as_sent(self.method_row)}}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        row = _as_received(state["__dict__"]["method_row"])
        super().__setstate__({**state, "__dict__": {**state["__dict__"], "method_row": row}})


class MethodOptions(NamesMethod):
    """Base of configurations that name a method and take its hyper-parameters."""

    method_options: dict[str, Any] = flag({}, "options of the method that differ from its defaults")

    @classmethod
    def methods_with_options(cls) -> tuple[Method, ...]:
        """The methods whose hyper-parameters are fields here."""
        return tuple(METHODS.values())

    @classmethod
    def flat_fields(cls) -> dict[str, FieldInfo]:
        fields = {name: field for name, field in super().flat_fields().items() if name != "method_options"}
        return fields | options_as_fields(cls.methods_with_options())

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        given = cls._with_row(given)
        own = (given["method_row"],) if "method_row" in given else ()
        known = options_of((*own, *cls.methods_with_options()))
        flat = {name: value for name, value in given.items() if name in known}
        gathered = {**(given.get("method_options") or {}), **flat}
        if unknown := sorted(gathered.keys() - known.keys()):
            hint = suggest(unknown[0], known) or "`fedlora methods NAME` lists the options of a method"
            raise UsageError(f"{unknown[0]} is not an option of a method", hint=hint)
        rest = {name: value for name, value in given.items() if name not in flat and name != "method_options"}
        if own and (unknown := sorted(rest.keys() - cls.model_fields.keys())):
            hint = suggest(unknown[0], [*field_names(cls.flat_fields()), *(option.name for option in own[0].options)])
            raise UsageError(
                f"unknown field {unknown[0]!r}", hint=hint or "see --help for the fields and what they take"
            )
        read = {name: _read(known[name][0], value) for name, value in sorted(gathered.items())}
        options = {name: value for name, value in read.items() if value is not None}
        return {**rest, "method_options": options} if options else rest


def check_names_no_code(asked: Any) -> None:
    """UsageError where a configuration file names a method by the place of its code."""
    if ":" in str(asked):
        raise UsageError(
            f"federation_mode={asked!r} names code; a file must not choose which code runs",
            hint="name it with --federation_mode; a file may name installed methods",
        )


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


def read_values(row: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a method's options, as their types; UsageError for an option that it does not have."""
    for name in given:
        if row.option(name) is None:
            names = [option.name for option in row.options]
            hint = suggest(name, names) or (f"its options are {', '.join(names)}" if names else "it has no options")
            raise UsageError(f"method {row.name} has no option {name}", hint=hint)
    return {option.name: _read(option, given[option.name]) for option in row.options if option.name in given}


def _check_options(row: Method, config: type[Config]) -> None:
    """UsageError where an option of a method from outside has the name of a field, a flag or a keyword."""
    taken = {*field_names(config.model_fields), *KEYWORDS}
    if clash := sorted(option.name for option in row.options if option.name in taken):
        raise UsageError(
            f"method {row.name}: its option {clash[0]} has the name of a flag", hint="rename the field of its class"
        )


def check_can_be_sent(row: Method) -> None:
    """UsageError for a method that another process cannot load."""
    if row.source is not None and not row.source.place:
        raise UsageError(
            f"method {row.name} exists in this process only, and no other can load it",
            hint="save it to a file and name it as file.py:name, or train on one device",
        )


def _as_sent(row: Any) -> Any:
    """What another process needs to load a row again: its place, and the hashes of what it will find there."""
    if row is None:
        return None
    check_can_be_sent(row)
    return row.source.place, dict(row.source.files)


def _as_received(sent: Any) -> Method | None:
    if sent is None:
        return None
    place, files = sent
    row = find_method(place)
    if row.source is None or row.source.files != files:
        raise UsageError(f"{place}: changed since the run was started", hint="start the command again")
    return row


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
