"""Keywords of a public function where editors, notebooks and `help` look: in its signature and its docstring."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

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
        names = {name for name in config.flat_fields() if name not in decided}
        fields = [
            inspect.Parameter(
                short_name(name, config.flat_fields()),
                inspect.Parameter.KEYWORD_ONLY,
                default=_Shown(shown_default(field)),
                annotation=field.annotation,
            )
            for name, field in config.flat_fields().items()
            if name in names
        ]
        open_end = [each for each in signature.parameters.values() if each.kind is inspect.Parameter.VAR_KEYWORD]
        more = open_end if issubclass(config, MethodOptions) else []
        function.__signature__ = signature.replace(parameters=[*own, *fields, *more])
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{_keywords_text(config, names)}"
        return function

    return describe


def _keywords_text(config: type[Config], names: set[str]) -> str:
    """Every keyword with its help and its default, in the groups of the command's help."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    fields = config.flat_fields()
    for name, field in fields.items():
        if name in names:
            group = shown_of(field)["group"] or OTHER if name in config.model_fields else OF_METHODS
            with spelling():
                text = spell(f"{short_name(name, fields)}: {field.description} (default: {shown_default(field)})")
            lines = textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="        ")
            groups.setdefault(group, []).extend(lines)
    parts = [f"{'keywords' if group == OTHER else group}:\n" + "\n".join(lines) for group, lines in groups.items() if lines]
    return "\n\n".join(parts)
