"""The help of one command, from its configuration: flags in groups, with units, ranges and real defaults.

A configuration with many flags shows its everyday ones; `--help all` shows every flag, and `--method NAME --help` those
of that method.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any, get_origin

from pydantic.fields import FieldInfo

from fedlora.config.method_options import MethodOptions, options_as_fields
from fedlora.config.names import short_name, spell
from fedlora.config.schema import GROUPS, OF_METHODS, Config
from fedlora.flags import metavar_of
from fedlora.methods.row import Method

OTHER = "flags"
COLUMN = 30
"""Where descriptions begin."""


def command_help(
    name: str, config: type[Config], positional: str = "", *, everything: bool = False, method: Method | None = None
) -> str:
    """The help of a command; `everything` shows every flag with both of its names."""
    fields = config.flat_fields()
    own = method.options if method is not None and issubclass(config, MethodOptions) else ()
    options = {name for name in fields if name not in config.model_fields}
    everyday = {name for name, field in fields.items() if shown_of(field)["everyday"]}
    has_more = bool(everyday) and not everything
    listed = {name: field for name, field in fields.items() if not has_more or name in everyday}
    groups: dict[str, dict[str, FieldInfo]] = {group: {} for group in (OTHER, *GROUPS)}
    for field_name, field in listed.items():
        group = OF_METHODS if field_name in options else shown_of(field)["group"] or OTHER
        groups.setdefault(group, {})[field_name] = field
    named = f"method {method.name}" if method is not None else ""
    if own and method is not None:
        groups[named] = options_as_fields((method,))
    is_outside = method is not None and method.source is not None
    width = min(max(shutil.get_terminal_size().columns, 60), 120)
    lines = [_usage(name, config, positional), "", *_wrapped(spell(inspect.cleandoc(config.__doc__ or "")), width)]
    for group, members in groups.items():
        if members:
            lines += ["", f"{group}:"]
            for field_name, field in members.items():
                if group == named and is_outside:
                    lines += _lines(f"  --set {field_name}={metavar_of(field)}", field, width)
                else:
                    lines += _entry(field_name, field, fields, width, both=everything)
    lines += ["", *_end(name, has_more=has_more, has_methods=bool(options))]
    return "\n".join(lines)


def shown_of(field: FieldInfo) -> Mapping[str, Any]:
    """Group, whether it is an everyday flag, and what no value means."""
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {"group": "", "everyday": False, "if_none": ""}


def shown_default(field: FieldInfo) -> str:
    """The default as help prints it."""
    default = field.default
    if default is None or default in ("", {}, ()):
        return str(shown_of(field)["if_none"] or "nothing")
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _usage(name: str, config: type[Config], positional: str) -> str:
    fields = config.flat_fields()
    several = positional and get_origin(fields[positional].annotation) is tuple
    word = short_name(positional, fields).upper()
    place = f" [{word}{' ...' if several else ''}]" if positional else ""
    return f"usage: fedlora {name}{place} [FILE.yaml] [--flag value ...]"


def _wrapped(text: str, width: int) -> list[str]:
    """Paragraphs, each wrapped on its own."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return "\n\n".join(textwrap.fill(part, width) for part in paragraphs).split("\n")


def _entry(name: str, field: FieldInfo, fields: Mapping[str, FieldInfo], width: int, *, both: bool) -> list[str]:
    short = short_name(name, fields)
    names = f"--{short}, --{name}" if both and short != name else f"--{short}"
    return _lines(f"  {names} {metavar_of(field)}", field, width)


def _lines(head: str, field: FieldInfo, width: int) -> list[str]:
    about = spell(f"{field.description} (default: {shown_default(field)})")
    body = textwrap.wrap(about, width - COLUMN, break_on_hyphens=False, break_long_words=False)
    first = [f"{head:<{COLUMN}}{body[0]}"] if len(head) < COLUMN - 1 else [head, " " * COLUMN + body[0]]
    return [*first, *(" " * COLUMN + line for line in body[1:])]


def _end(name: str, *, has_more: bool, has_methods: bool) -> list[str]:
    lines = []
    if has_more:
        lines.append(f"Every flag, with its long name: fedlora {name} --help all")
    if has_methods:
        lines.append(f"Flags of one method: fedlora {name} --method NAME --help; methods: fedlora methods")
        lines.append("--set NAME=VALUE sets an option of any method, also of one in a file: --method FILE.py:NAME.")
    lines.append("FILE.yaml holds lines `flag: value`; flags win over it. --json prints the result as JSON.")
    return lines
