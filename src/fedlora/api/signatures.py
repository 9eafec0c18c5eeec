"""Keywords of a public function where editors, notebooks and `help` look: in its signature and its docstring."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from fedlora.command_help import OTHER, shown_default, shown_of
from fedlora.config.method_options import MethodOptions
from fedlora.config.names import short_name, spell, spelling
from fedlora.config.schema import GROUPS, OF_METHODS, Config

Function = TypeVar("Function", bound=Callable[..., Any])
WIDTH = 100


class _Shown:
    """A default of a signature, shown as help shows it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def takes(config: type[Config], *decided: str) -> Callable[[Function], Function]:
    """Decorate a function `(..., **keywords)` whose keywords are the fields of `config`, but those it has `decided`."""

    def describe(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = {name: config.flat_fields()[name] for name in _in_order(config) if name not in decided}
        named = [
            inspect.Parameter(
                short_name(name, fields),
                inspect.Parameter.KEYWORD_ONLY,
                default=_default_of(field, is_option=name not in config.model_fields),
                annotation=field.annotation,
            )
            for name, field in fields.items()
        ]
        open_end = [each for each in signature.parameters.values() if each.kind is inspect.Parameter.VAR_KEYWORD]
        more = open_end if issubclass(config, MethodOptions) else []
        function.__signature__ = signature.replace(parameters=[*own, *named, *more])
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{_keywords_text(config, fields)}"
        return function

    return describe


def _in_order(config: type[Config]) -> list[str]:
    """Everyday fields first, and otherwise by groups as in help."""
    places = {group: place for place, group in enumerate((*GROUPS, OTHER, ""))}

    def place(item: tuple[str, FieldInfo]) -> tuple[bool, bool, int]:
        name, field = item
        shown = shown_of(field)
        return name not in config.model_fields, not shown["everyday"], places.get(shown["group"], 0)

    return [name for name, _ in sorted(config.flat_fields().items(), key=place)]


def _default_of(field: FieldInfo, *, is_option: bool) -> Any:
    if is_option:
        return _Shown(shown_default(field))
    return str(field.default) if isinstance(field.default, Path) else field.default


def _keywords_text(config: type[Config], fields: Mapping[str, FieldInfo]) -> str:
    """Every keyword with its help and its default, in the groups of the command's help."""
    groups: dict[str, list[str]] = {}
    for name, field in fields.items():
        group = shown_of(field)["group"] or OTHER if name in config.model_fields else OF_METHODS
        default = repr(field.default) if isinstance(field.default, bool) else shown_default(field)
        with spelling():
            text = spell(f"{short_name(name, fields)}: {field.description} (default: {default})")
        lines = textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)
        groups.setdefault(group, []).extend(lines)
    named = {"keywords" if group == OTHER else group: lines for group, lines in groups.items()}
    return "\n\n".join(f"{group}:\n" + "\n".join(lines) for group, lines in named.items())
