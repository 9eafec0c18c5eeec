"""The generated page of the Python functions and classes, from the docstrings of `fedlora.__all__`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from typing import Any

import fedlora
from fedlora.cli import load
from fedlora.command_help import OTHER
from fedlora.command_table import COMMANDS
from fedlora.config.names import field_names
from fedlora.config.schema import GROUPS, OF_METHODS

HEAD = """\
<!-- Written by `make docs` from the docstrings of `fedlora.__all__`: change those, not this page. -->

# Python

```python
import fedlora as fl
```

Importing takes under 0.3 s; torch is imported when a function needs it. A function does the same as the command of its
name and leaves the same files. Each flag of the command is a keyword, under its short or its long name;
`config="run.yaml"` reads a file, and keywords win over it. Functions print nothing but progress, and nothing with
`progress=False`. Errors are classes of [`fedlora.errors`](exit-codes.md).

A result prints as a table, in a terminal and in a notebook; `as_dict()` gives it as [JSON values](json.md). The
notebook `examples/quickstart.ipynb` of the repository goes from rows to a comparison.

"""
KEYWORD_HEADINGS = {f"{heading}:" for heading in (*GROUPS, OF_METHODS, OTHER, "keywords")}
EVERYWHERE = ("parts", "cells", "text", "as_dict")
"""Members that every result has."""
COMMAND_OF = {"judge": "evaluate_llm", "rounds": "train"}
"""Function -> the command whose flags are its keywords, where the names differ."""


def make_python() -> str:
    """Every public function and class."""
    found = {name: getattr(fedlora, name) for name in fedlora.__all__ if not inspect.ismodule(getattr(fedlora, name))}
    functions = {name: value for name, value in found.items() if not inspect.isclass(value)}
    classes = {name: value for name, value in found.items() if inspect.isclass(value)}
    parts = [_function(f"fl.{name}", value, name) for name, value in functions.items()]
    return HEAD + "\n".join(parts + [_class(name, value) for name, value in classes.items()])


def _function(title: str, function: Any, name: str = "", heading: str = "##") -> str:
    command = COMMAND_OF.get(name, name)
    keywords, flags = "", set()
    if command in COMMANDS:
        keywords = f"\nKeywords: the flags of [`fedlora {command}`](commands.md#fedlora-{command}).\n"
        flags = set(field_names(load(COMMANDS[command].config).flat_fields()))
    return f"{heading} `{title}{_signature(function, flags)}`\n\n{as_markdown(_docstring(function))}\n{keywords}"


def _class(name: str, found: type) -> str:
    parts = [f"## `{name}`\n\n{as_markdown(_docstring(found))}\n"]
    for member, value in vars(found).items():
        if member.startswith("_") or member in EVERYWHERE or not inspect.getdoc(value):
            continue
        if isinstance(value, property):
            parts.append(f"### `.{member}`\n\n{as_markdown(_docstring(value))}\n")
        elif inspect.isfunction(value):
            parts.append(_function(f".{member}", value, member, heading="###"))
    return "\n".join(parts)


def _signature(function: Any, flags: Collection[str]) -> str:
    """The parameters of a function, without annotations; those that are flags of its command as `...`."""
    shown, has_keywords, star = [], False, False
    for each in inspect.signature(function).parameters.values():
        if each.name == "self":
            continue
        if each.kind is each.VAR_KEYWORD or (each.kind is each.KEYWORD_ONLY and each.name in flags):
            has_keywords = True
            continue
        if each.kind is each.KEYWORD_ONLY and not star:
            shown.append("*")
            star = True
        prefix = "*" if each.kind is each.VAR_POSITIONAL else ""
        star = star or bool(prefix)
        default = "" if each.default is each.empty else f"={each.default!r}"
        shown.append(f"{prefix}{each.name}{default}")
    return f"({', '.join(shown + ['...'] * has_keywords)})"


def _docstring(found: Any) -> str:
    """The docstring up to the list of keywords, which the page of commands has."""
    lines = (inspect.getdoc(found) or "").splitlines()
    end = next((number for number, line in enumerate(lines) if line in KEYWORD_HEADINGS), len(lines))
    return "\n".join(lines[:end]).strip()


def escape(text: str) -> str:
    """Text whose angle brackets are shown, in code as they are."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def as_markdown(text: str) -> str:
    """A docstring with its examples and indented parts as blocks of code."""
    parts = []
    for part in re.split(r"\n\s*\n", text):
        is_example = part.lstrip().startswith(">>>")
        if is_example or all(line.startswith("    ") for line in part.splitlines()):
            code = inspect.cleandoc(part)
            parts.append(f"```{'pycon' if is_example else 'text'}\n{code}\n```")
        else:
            parts.append(escape(part))
    return "\n\n".join(parts)
