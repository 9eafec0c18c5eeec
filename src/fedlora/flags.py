"""From a configuration to flags: the parser, the values it reads, the help it prints, the completion script.

argparse only cuts the command line into strings. Types, limits and defaults stay with the
configuration, so a flag and a line of a YAML file go through the same checks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

from pydantic.fields import FieldInfo

from fedlora.config.method_options import MethodOptions
from fedlora.config.names import field_names, note_spelling, short_name
from fedlora.config.schema import Config
from fedlora.errors import UsageError
from fedlora.nearest import nearest

API_KEY_HINT = "put the key into the environment (api_key or OPENAI_API_KEY), or into a file named by --api_key_file"
FILE_ENDINGS = (".yaml", ".yml")
TRUTH = {"true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "1", "0"}


class Given(NamedTuple):
    """What a command line says: fields as text, the configuration file, and whether the result is printed as JSON."""

    values: dict[str, Any]
    file: Path | None
    as_json: bool


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")


def make_parser(name: str, config: type[Config]) -> Parser:
    """The parser of one command's flags."""
    parser = Parser(prog=f"fedlora {name}", allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    _add_flags(parser, config)
    return parser


def read_flags(parser: Parser, arguments: Sequence[str], config: type[Config], positional: str = "") -> Given:
    """The fields that were given, as text, the file, and `--json`; UsageError for what is unknown.

    A word without a flag is the configuration file when it ends in .yaml, else a value of the field `positional`.
    """
    words = _say_true([_with_underscores(argument) for argument in arguments], config)
    note_spelling(word[2:].partition("=")[0] for word in words if word.startswith("--"))
    known, others = parser.parse_known_args(words)
    if flags := [word for word in others if word.startswith("-")]:
        raise _unknown_flag(parser, flags[0])
    given = vars(known)
    as_json = bool(given.pop("json", False))
    settings = _read_settings(given.pop("set", ()))
    values = {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()}
    values |= {"method_options": settings} if settings else {}
    files = [*filter(None, [values.pop("config", None)]), *(word for word in others if word.endswith(FILE_ENDINGS))]
    if len(files) > 1:
        raise UsageError(f"two configuration files: {files[0]} and {files[1]}", hint="give one")
    if names := [word for word in others if not word.endswith(FILE_ENDINGS)]:
        _take_names(parser, values, names, config, positional)
    return Given(values, Path(files[0]) if files else None, as_json)


def _read_settings(words: Sequence[str]) -> dict[str, str]:
    """`step=0.3` as an option of the method and its value."""
    settings: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise UsageError(f"--set {word}: not an option and its value", hint="write --set name=value")
        if name in settings:
            raise UsageError(f"--set {name} is given twice", hint="keep one of the two")
        settings[name.replace("-", "_")] = value
    return settings


def _take_names(
    parser: Parser, values: dict[str, Any], names: list[str], config: type[Config], positional: str
) -> None:
    """The words without a flag become the positional field."""
    several = positional and get_origin(config.flat_fields()[positional].annotation) is tuple
    spare = names if not positional else [] if several else names[1:]
    if spare:
        raise UsageError(f"unexpected argument {spare[0]!r}", hint=f"see {parser.prog} --help")
    if positional in values:
        flag = f"--{short_name(positional, config.flat_fields())}"
        raise UsageError(f"{names[0]!r} and {flag}={values[positional]!r} name the same thing", hint="give one of them")
    values[positional] = ",".join(names)


def find_value(arguments: Sequence[str], *names: str) -> str:
    """The value of a flag with one of these names; empty when it is not given."""
    words = [_with_underscores(argument) for argument in arguments]
    for index, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in {f"--{name}" for name in names}:
            return value if equals else next(iter(words[index + 1 : index + 2]), "")
    return ""


def completion_script(shell: str, commands: Mapping[str, tuple[str, type[Config], str]], shells: Sequence[str]) -> str:
    """The script that completes `commands` (name -> summary, configuration, positional) in `shell`."""
    import shtab

    root = Parser(prog="fedlora")
    parsers: dict[str, argparse.ArgumentParser] = {}
    groups: dict[str, Any] = {"": root.add_subparsers()}
    for name, (summary, config, positional) in commands.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            known = parsers.get(group) or groups[""].add_parser(group, help=f"{group} ...")
            groups[group] = known.add_subparsers()
        parser = parsers[name] = groups[group].add_parser(last, help=summary)
        file = parser.add_argument("words", nargs="*", help=positional or "configuration file")
        for action in [file, *_add_flags(parser, config)]:
            if action.metavar == "PATH" or action is file:
                setattr(action, "complete", shtab.FILE)  # noqa: B010  (shtab's own protocol, unknown to argparse)
    groups[""].add_parser("completion", help="print this script").add_argument("shell", choices=shells)
    return shtab.complete(root, shell=shell)


def _add_flags(parser: argparse.ArgumentParser, config: type[Config]) -> list[argparse.Action]:
    fields = config.flat_fields()
    actions = [
        parser.add_argument("--config", metavar="PATH", help="the configuration file"),
        parser.add_argument("--json", action="store_true", help="print the result as one JSON object"),
    ]
    if issubclass(config, MethodOptions):
        about = "an option of the method, also of one from outside; may be repeated"
        actions.append(parser.add_argument("--set", action="append", metavar="NAME=VALUE", help=about))
    for name, field in fields.items():
        flags = dict.fromkeys((f"--{short_name(name, fields)}", f"--{name}"))
        help_text = (field.description or "").replace("%", "%%")
        actions.append(parser.add_argument(*flags, dest=name, help=help_text, **_shape(field)))
    return actions


def metavar_of(field: FieldInfo) -> str:
    """What help calls a field's value."""
    shape = _shape(field)
    if "choices" in shape:
        return "|".join(shape["choices"])
    return f"{shape['metavar']},..." if shape.get("nargs") == "+" else shape["metavar"]


def _shape(field: FieldInfo) -> dict[str, Any]:
    """What argparse must know of a type: how many words a value may have, and what help calls it."""
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    if annotation is bool:
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    if get_origin(annotation) in (tuple, list):
        return {"nargs": "+", "metavar": "NAME"}
    if get_origin(annotation) is dict:
        return {"nargs": "+", "metavar": "NAME=VALUE"}
    names = {int: "INT", float: "FLOAT", Path: "PATH"}
    kinds = (annotation, *get_args(annotation))
    if choices := [str(each) for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)]:
        return {"metavar": "|".join([*(names[kind] for kind in kinds if kind in names), *choices])}
    names |= {tuple[str, ...]: "NAME,...", tuple[float, ...]: "FLOAT,..."}
    return {"metavar": next((names[kind] for kind in kinds if kind in names), "TEXT")}


def _with_underscores(argument: str) -> str:
    """`--exp-name=a-b` as `--exp_name=a-b`: hyphens in a flag are as good as underscores."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _say_true(words: Sequence[str], config: type[Config]) -> list[str]:
    """`--overwrite run.yaml` as `--overwrite=true run.yaml`: only a truth value belongs to such a flag."""
    fields = config.flat_fields()
    switches = {f"--{name}" for name, field in field_names(fields).items() if fields[field].annotation is bool}
    following = [*words[1:], ""][: len(words)]
    return [
        f"{word}=true" if word in switches and after.lower() not in TRUTH else word
        for word, after in zip(words, following, strict=True)
    ]


def _unknown_flag(parser: Parser, argument: str) -> UsageError:
    """Names the flag and never its value, which may be a secret given in the wrong place."""
    name = argument.partition("=")[0]
    if name in ("--api_key", "--openai_api_key"):
        return UsageError(f"there is no {name}: a command line is visible to everyone here", hint=API_KEY_HINT)
    close = nearest(name, (option for action in parser._actions for option in action.option_strings))
    note_spelling([close.removeprefix("--")])
    hint = f"did you mean {close}?" if close else f"see {parser.prog} --help"
    return UsageError(f"unknown flag {name}", hint=hint)
