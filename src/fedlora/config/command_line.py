"""A command as a person would type it: short names, quoted for a shell, without what the defaults say anyway."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedlora.config.names import short_name
from fedlora.config.schema import Config

_ENDINGS = (".yaml", ".yml")


def command_line(command: str, config: type[Config], values: Mapping[str, Any], *, positional: str = "") -> str:
    """`fedlora <command>` with `values` of the fields of `config`, where they differ from the defaults.

    The value of the field `positional` stands without its flag, unless it would be taken for a flag or a file.
    """
    fields = config.flat_fields()
    words, flags = ["fedlora", *command.split()], []
    for name, value in values.items():
        if name == positional:
            each = list(map(_text, value)) if isinstance(value, tuple) else [_text(value)]
            if not any(word.startswith("-") or word.endswith(_ENDINGS) for word in each):
                words += each
                continue
        if value is not None and value != fields[name].default:
            flags += _flag(name, value, fields)
    return shlex.join([*words, *flags])


def repeated(command: str, target: type[Config], config: Config, typed: Mapping[str, Any], file: Path | None) -> str:
    """`fedlora <command>` with the file and the flags that `config` was made from, without those it does not have.

    Where the file has such fields, everything is a flag.
    """
    fields = target.flat_fields()
    words = ["fedlora", *command.split()]
    from_file = config.model_fields_set - typed.keys() - {"method_options"}
    values = dict(typed)
    if file is not None and from_file <= fields.keys():
        words.append(str(file))
    elif file is not None:
        read = {name: getattr(config, name) for name in from_file}
        values = {**read, **typed, "method_options": getattr(config, "method_options", {})}
    options = values.pop("method_options", {})
    # what `compare --plan` has reported, compare does
    if values.pop("plan", None) is None and "plan" in from_file:
        values["plan"] = False
    flags = [word for name, value in values.items() if name in fields for word in _flag(name, value, fields)]
    for name, value in options.items():
        flags += _flag(name, value, fields) if name in fields else ["--set", f"{name}={_text(value)}"]
    return shlex.join([*words, *flags])


def _flag(name: str, value: Any, fields: Collection[str]) -> list[str]:
    flag, text = f"--{short_name(name, fields)}", _text(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ",".join(f"{name}={_text(each)}" for name, each in value.items())
    return ",".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)
