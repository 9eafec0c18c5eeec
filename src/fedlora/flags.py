"""From a configuration to flags: the parser, the values it reads, the completion script.

argparse only cuts the command line into strings. Types, limits and defaults stay with the
configuration, so a flag and a line of a YAML file go through the same checks.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from fedlora.config.reading import READING_FIELDS
from fedlora.config.schema import Config
from fedlora.errors import UsageError

API_KEY_HINT = "put the key into the environment (api_key or OPENAI_API_KEY), or into a file named by --api_key_file"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse's own would hide that the pipe is closed


def make_parser(name: str, config: type[Config], positional: str = "") -> Parser:
    """The parser of one command; `positional` is the field that is given without a flag, or `config` for the file."""
    place = f"[{positional}] " if positional else ""
    file = "[FILE.yaml]" if positional == "config" else f"{place}[--config FILE.yaml]"
    parser = Parser(
        prog=f"fedlora {name}",
        usage=f"fedlora {name} {file} [--flag value ...]",
        allow_abbrev=False,
    )
    _add_flags(parser, config, positional)
    return parser


def read_flags(parser: Parser, arguments: Sequence[str]) -> tuple[dict[str, str], Path | None]:
    """The fields that were given, as text, and the file of `--config`; UsageError for what is unknown."""
    known, unknown = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    if unknown:
        raise _unknown_argument(parser, unknown[0])
    values = {name: ",".join(value) if isinstance(value, list) else value for name, value in vars(known).items()}
    file = values.pop("config", None)
    return values, Path(file) if file is not None else None


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean ...?` when something known is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def completion_script(shell: str, commands: Mapping[str, tuple[str, type[Config], str]], shells: Sequence[str]) -> str:
    """The script that completes `commands` (name -> summary, configuration, positional) in `shell`."""
    import shtab

    root = Parser(prog="fedlora")
    groups = {"": root.add_subparsers()}
    for name, (summary, config, positional) in commands.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            groups[group] = groups[""].add_parser(group, help=f"{group} ...").add_subparsers()
        parser = groups[group].add_parser(last, help=summary)
        for action in _add_flags(parser, config, positional):
            if action.metavar == "PATH":
                setattr(action, "complete", shtab.FILE)  # noqa: B010  (shtab's own protocol, unknown to argparse)
    groups[""].add_parser("completion", help="print this script").add_argument("shell", choices=shells)
    return shtab.complete(root, shell=shell)


def _add_flags(parser: argparse.ArgumentParser, config: type[Config], positional: str) -> list[argparse.Action]:
    parser.description = inspect.cleandoc(config.__doc__ or "")
    parser.formatter_class = _Formatter
    file_help = "YAML file of `field: value` lines; flags win over it"
    # the file may stand without its flag, but not twice
    group = parser.add_mutually_exclusive_group()
    actions = [group.add_argument("--config", metavar="PATH", default=argparse.SUPPRESS, help=file_help)]
    if positional == "config":
        file = group.add_argument(
            "config",
            nargs="?",
            metavar="PATH",
            default=argparse.SUPPRESS,
            help="the file of --config, without the flag",
        )
        actions.append(file)
    # inherited first, but shown last; the order is otherwise the configuration's
    for name, field in sorted(config.flat_fields().items(), key=lambda item: item[0] in READING_FIELDS):
        shape = _shape(field.annotation)
        help_text = f"{field.description} (default: {_shown(field.default)})".replace("%", "%%")
        if name == positional:
            actions.append(
                parser.add_argument(name, default=str(field.default), help=help_text, **{**shape, "nargs": "?"})
            )
        else:
            actions.append(parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=help_text, **shape))
    return actions


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def _shape(annotation: Any) -> dict[str, Any]:
    """What argparse must know of a type: how many words a value may have, and what help calls it."""
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    if annotation is bool:
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    if get_origin(annotation) in (tuple, list):
        return {"nargs": "+", "metavar": "NAME"}
    kinds = (annotation, *get_args(annotation))
    if choices := [str(each) for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)]:
        return {"metavar": "|".join(choices)}
    names = {int: "INT", float: "FLOAT", Path: "PATH"}
    return {"metavar": next((names[kind] for kind in kinds if kind in names), "TEXT")}


def _shown(default: Any) -> str:
    if default is None or default in ("", {}):
        return "unset"
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _with_underscores(argument: str) -> str:
    """`--exp-name=a-b` as `--exp_name=a-b`: hyphens in a flag are as good as underscores."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _unknown_argument(parser: Parser, argument: str) -> UsageError:
    """Names the flag and never its value, which may be a secret given in the wrong place."""
    help_hint = f"see {parser.prog} --help"
    if not argument.startswith("--"):
        return UsageError(f"unexpected argument {argument!r}", hint=help_hint)
    name = argument.partition("=")[0]
    if name in ("--api_key", "--openai_api_key"):
        return UsageError(f"there is no {name}: a command line is visible to everyone here", hint=API_KEY_HINT)
    known = (option for action in parser._actions for option in action.option_strings)
    return UsageError(f"unknown flag {name}", hint=suggest(name, known) or help_hint)
