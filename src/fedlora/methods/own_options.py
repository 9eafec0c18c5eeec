"""The options of a method from outside, read from the dataclass fields of its two halves.

A field that the run fills (`OF_THE_RUN`) is none. An `Option` in the row adds a help text and limits to a field.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from fedlora.errors import UsageError
from fedlora.methods.row import Method, Option

OF_THE_RUN = ("client_ranks", "is_guarded", "lora_scaling", "num_communication_rounds")
"""What a half may know of the run it is part of, by the name of its field: no option of the method's own."""
_NEEDED = {
    "server": (
        *("fewest_clients", "find_cohort_fault", "weight_of", "init", "broadcast", "aggregate", "global_adapter"),
        *("asks_everybody", "increment_rank", "export"),
    ),
    "client": ("sends", "sends_smaller", "needs_gradient", "own_ranks", "phases", "upload"),
}
_KINDS = (float, int, bool, str)
_DECORATOR = "write @dataclass(frozen=True) above the class"


def make_half(half: Any) -> Any:
    """The half of a row as an instance: the one it has, or one of the class that `module:Class` names."""
    if not isinstance(half, str):
        return half
    module, _, name = half.partition(":")
    return getattr(import_module(module), name)()


def read_options(method: Method) -> tuple[Option, ...]:
    """An option for every field of the two halves; UsageError for a half or a field that cannot be used."""
    stated = {option.name: option for option in method.options}
    found: dict[str, Option] = {}
    for part in ("server", "client"):
        half = make_half(getattr(method, part))
        _check_half(method.name, part, half)
        for name, kind in _fields_of(half):
            option = _read_option(method.name, half, name, kind, stated.get(name))
            if name in found and found[name].default != option.default:
                raise UsageError(
                    f"method {method.name}: server and client give {name} different defaults", hint="make them equal"
                )
            found[name] = option
    if missing := sorted(stated.keys() - found.keys()):
        raise UsageError(
            f"method {method.name}: option {missing[0]} is a field of neither its server nor its client",
            hint="give each option the name of a dataclass field",
        )
    return tuple(found.values())


def _check_half(name: str, part: str, half: Any) -> None:
    kind = half if isinstance(half, type) else type(half)
    if isinstance(half, type):
        raise UsageError(
            f"method {name}: {part} is the class {kind.__name__}", hint=f"give an instance: {kind.__name__}()"
        )
    missing = [each for each in _NEEDED[part] if not hasattr(half, each)]
    if missing:
        base = "FedAvg" if part == "server" else "TrainAndSend"
        raise UsageError(
            f"method {name}: its {part}, {kind.__name__}, has no {', '.join(missing)}",
            hint=f"derive the class from fedlora.methods.{base}, or write them",
        )
    if not dataclasses.is_dataclass(half):
        raise UsageError(f"method {name}: its {part}, {kind.__name__}, is no dataclass", hint=_DECORATOR)
    for each in kind.__mro__:
        plain = [field for field, hint in inspect.get_annotations(each).items() if "ClassVar" not in str(hint)]
        if plain and "__dataclass_fields__" not in each.__dict__:
            raise UsageError(f"method {name}: {each.__name__}.{plain[0]} is not a dataclass field", hint=_DECORATOR)


def _fields_of(half: Any) -> Iterator[tuple[str, Any]]:
    try:
        hints = get_type_hints(type(half), include_extras=True)
    except NameError as error:
        raise UsageError(
            f"{type(half).__name__}: an annotation cannot be read: {error}", hint="import the name, or quote nothing"
        ) from None
    for field in dataclasses.fields(half):
        if field.init and field.name not in OF_THE_RUN and get_origin(hints[field.name]) is not ClassVar:
            yield field.name, hints[field.name]


def _read_option(method: str, half: Any, name: str, hint: Any, stated: Option | None) -> Option:
    default = getattr(half, name)
    if stated is not None:
        if stated.default != default:
            raise UsageError(
                f"method {method}: option {name} has the default {stated.default!r}, its field {default!r}",
                hint="make them equal",
            )
        return stated
    kind = _plain(hint)
    if kind not in _KINDS and get_origin(kind) is not Literal:
        raise UsageError(
            f"method {method}: field {name} of {type(half).__name__} is no option: its type is {hint}",
            hint="use float, int, bool, str or a Literal, or make it a ClassVar",
        )
    return Option(name, default, f"{name} of {type(half).__name__}", kind, if_none="none" if default is None else "")


def _plain(hint: Any) -> Any:
    """`float` of `float | None` and of `Annotated[float, ...]`."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return _plain(kinds[0]) if len(kinds) == 1 else hint
    return hint
