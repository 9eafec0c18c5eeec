"""The generated pages of the reference: commands and flags, exit codes, and the Python functions.

`make_docs.py` writes them; each is made from the code that it describes.
"""

from __future__ import annotations

import inspect

from pydantic.fields import FieldInfo
from python_page import escape

from fedlora import errors
from fedlora.cli import load
from fedlora.command_help import OTHER, shown_default, shown_of
from fedlora.command_table import COMMANDS, Command
from fedlora.config.names import short_name, spell, spelling
from fedlora.config.schema import GROUPS, Config
from fedlora.config.train import TrainConfig
from fedlora.flags import metavar_of

WRITTEN = "<!-- Written by `make docs` from {}: change that, not this page. -->\n\n"
COMMANDS_HEAD = (
    WRITTEN.format("src/fedlora/command_table.py and the configurations in src/fedlora/config")
    + """\
# Commands and flags

`fedlora <command> [FILE.yaml] [--flag value ...]`. Every flag is also a line `flag: value` of FILE.yaml, and a keyword
of the Python function of the same name. Flags win over the file. A word that ends in `.yaml` is always the file; any
other word without a flag is the command's NAME.

- Both names of a flag are valid everywhere. The short one is for everyday use; the long one is the name that the
  reference project uses, and the name in run.json.
- Hyphens in a flag are as good as underscores. A flag that takes `true` or `false` means `true` without a value.
- `--json` prints the result as one JSON object on standard output. Progress is on standard error.
- `fedlora <command> --help` shows the everyday flags, `--help all` every flag.
- `fedlora completion bash` (or `zsh`, `tcsh`) prints a completion script.

Flags that belong to single methods are on the page of [methods](methods.md).

"""
)
CODES_HEAD = (
    WRITTEN.format("src/fedlora/errors.py")
    + """\
# Exit codes

Every error is one message with what is wrong and where, and a hint with what to do. In Python each is an exception of
`fedlora.errors`, and `FedloraError` is the base of all.

| code | class | meaning |
| ---: | --- | --- |
| 0 | | done |
| 1 | | an unexpected error: please report it with its traceback |
"""
)
CODES_END = """\
| 130, 143 | | ended by Ctrl-C or by SIGTERM; the same command resumes |
| 141 | | the reader of a pipe closed it |
"""


def make_commands() -> str:
    """Every command with its flags, in groups."""
    listed: dict[str, tuple[str, Command]] = {}
    for name, command in COMMANDS.items():
        listed.setdefault(f"{command.config} {command.run}", (name, command))
    with spelling():
        return COMMANDS_HEAD + "\n".join(_describe(name, command) for name, command in listed.values())


def _describe(name: str, command: Command) -> str:
    config = load(command.config)
    fields = {field: shown for field, shown in config.flat_fields().items() if field in config.model_fields}
    trains = config is not TrainConfig and issubclass(config, TrainConfig)
    if trains:
        fields = {field: shown for field, shown in fields.items() if field not in TrainConfig.model_fields}
    others = [other for other, row in COMMANDS.items() if other != name and row[1:3] == command[1:3]]
    also = f" Also `fedlora {others[0]}`." if others else ""
    place = f" NAME is `--{short_name(command.positional, config.flat_fields())}`." if command.positional else ""
    groups: dict[str, dict[str, FieldInfo]] = {group: {} for group in GROUPS}
    for field_name, field in fields.items():
        groups.setdefault(str(shown_of(field)["group"]) or OTHER, {})[field_name] = field
    shown = {group: members for group, members in groups.items() if members}
    about = spell(" ".join(inspect.cleandoc(config.__doc__ or "").split()))
    if trains:
        about += " All flags of [`fedlora train`](#fedlora-train)" + (", and these:" if fields else ".")
    parts = [f"## `fedlora {name}`\n\n{_sentence(command.summary)}{also}{place}\n\n{about}\n"]
    for group, members in shown.items():
        heading = f"### {name}: {group}\n\n" if len(shown) > 1 else ""
        parts.append(heading + _flags(members, config))
    return "\n".join(parts)


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _flags(fields: dict[str, FieldInfo], config: type[Config]) -> str:
    lines = ["| flag | takes | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        short = short_name(name, config.flat_fields())
        names = f"`--{short}`" + (f" (`--{name}`)" if short != name else "")
        takes = " or ".join(f"`{value}`" for value in metavar_of(field).split("|"))
        lines.append(f"| {names} | {takes} | {spell(shown_default(field))} | {_about(field)} |")
    return "\n".join(lines) + "\n"


def _about(field: FieldInfo) -> str:
    return _cell(spell(field.description or ""))


def _cell(text: str) -> str:
    """Text as a table's cell."""
    return escape(text.replace("|", " or "))


def make_exit_codes() -> str:
    """The classes of errors by exit code."""
    found_there = inspect.getmembers(errors, inspect.isclass)
    classes = [found for _, found in found_there if issubclass(found, errors.FedloraError)]
    rows = sorted(
        (found.exit_code, found.__name__, inspect.getdoc(found) or "") for found in classes if found.exit_code > 1
    )
    lines = [f"| {code} | `{name}` | {_cell(' '.join(about.split()))} |\n" for code, name, about in rows]
    return CODES_HEAD + "".join(lines) + CODES_END
