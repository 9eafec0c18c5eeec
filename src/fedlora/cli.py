"""The command line: it reads the flags, runs the command and prints its result.

Every error leaves through `main`: those a user can cause as one message and one hint, unexpected ones as a traceback,
both without the keys this process knows.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Generator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fedlora import __version__
from fedlora.command_table import COMMANDS, Command
from fedlora.config.names import spell, spelling
from fedlora.console import printable, put
from fedlora.errors import FedloraError, PendingError, UsageError, refusal_of
from fedlora.nearest import suggest
from fedlora.openmp import limit_spinning
from fedlora.redaction import redact
from fedlora.results import Result
from fedlora.stopping import stop_on_signals

if TYPE_CHECKING:
    from fedlora.config.schema import Config
    from fedlora.flags import Given

SHELLS = ("bash", "zsh", "tcsh")
HELP = {"-h", "--help"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the arguments are those of the process by default."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    limit_spinning()
    with spelling():
        return _end_of(arguments)


def _end_of(arguments: list[str]) -> int:
    """Run the command; whatever ends it becomes an exit code and a message."""
    try:
        with stop_on_signals():
            _dispatch(arguments)
            sys.stdout.flush()
    except PendingError as error:
        code = _show(error)
        _print_message(f"next: {_repeated(arguments)}")
        return code
    except FedloraError as error:
        return _show(error)
    except KeyboardInterrupt:
        resume = _repeated(arguments)
        _print_message(f"interrupted{f'; to resume: {resume}' if resume else ''}")
        return 128 + signal.SIGINT
    except SystemExit as stop:
        if not isinstance(stop.code, int):
            raise
        return stop.code
    except BrokenPipeError:
        _silence_stdout()
        return 128 + signal.SIGPIPE
    except Exception as error:
        return _show_unexpected(error)
    return 0


def _repeated(arguments: list[str]) -> str:
    """The command that resumes what was interrupted, as it was typed, without --overwrite; empty where none does."""
    try:
        name, _ = _split_command(arguments)
    except (UsageError, IndexError):
        return ""
    if name not in COMMANDS or not COMMANDS[name].resumes:
        return ""
    rest = list(arguments)
    while "--overwrite" in rest:
        at = rest.index("--overwrite")
        del rest[at : at + (2 if rest[at + 1 : at + 2] in (["true"], ["false"]) else 1)]
    rest = [word for word in rest if not word.startswith("--overwrite=")]
    program = Path(sys.argv[0])
    # one of the programs at the root of the repository
    typed = ["python", str(program), *rest[1:]] if program.stem == rest[0] else ["fedlora", *rest]
    return shlex.join(typed)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in HELP:
        put(_overview() + "\n")
    elif arguments[0] == "--version":
        put(f"fedlora {__version__}\n")
    elif arguments[0] == "completion":
        _print_completion(arguments[1:])
    else:
        _run_command(arguments)


def _run_command(arguments: list[str]) -> None:
    name, rest = _split_command(arguments)
    if name not in COMMANDS:
        put(_overview(name) + "\n")
        return
    command = COMMANDS[name]
    if HELP & set(rest):
        put(_help(name, command, rest) + "\n")
        return
    from fedlora.flags import make_parser, read_flags

    config_class = load(command.config)
    given = read_flags(make_parser(name, config_class), rest, config_class, command.positional)
    config = config_class.make(given.values, file=given.file)
    if command.requires:
        load(command.requires)()
    try:
        result = load(command.run)(config)
        if isinstance(result, Generator):
            result = _show_stream(result, as_json=given.as_json)
        _print_result(result, as_json=given.as_json)
    except FedloraError as error:
        _print_result(error.result, as_json=given.as_json)
        raise
    if result is not None:
        _print_next(result, config, given)


def _show_stream(stream: Generator[Any, None, Result | None], *, as_json: bool) -> Result | None:
    """Show results as they come; an interrupt ends that without a word, for nothing of it is lost."""
    from fedlora.live_output import show_live

    try:
        return show_live(stream, as_json=as_json)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _print_next(result: Result, config: Config, given: Given) -> None:
    """The command to type next, to standard error; as it is typed, so its names are not those that were typed."""
    command = result.next_command
    if same := result.next_with_same_flags:
        from fedlora.config.command_line import repeated

        command = repeated(same, load(COMMANDS[same].config), config, given.values, given.file)
    if command:
        _print_message(f"next: {command}")


def _help(name: str, command: Command, arguments: list[str]) -> str:
    """The help of a command: everyday flags, every flag (`--help all`), and those of the method that is named."""
    from fedlora.command_help import command_help
    from fedlora.flags import find_value
    from fedlora.methods.table import find_method

    method = find_value(arguments, "method", "federation_mode")
    return command_help(
        name,
        load(command.config),
        command.positional,
        everything="all" in arguments,
        method=find_method(method) if method else None,
    )


def _print_result(result: Result | None, *, as_json: bool = False) -> None:
    if result is None:
        return
    if as_json:
        from fedlora.files import json_text

        put(json_text(result.as_dict(), only_ascii=not _speaks_utf8(sys.stdout)))
    elif text := result.terminal_text() if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else result.text():
        put(text + "\n")


def _split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name and its own arguments; the name of a group when only help on it is asked."""
    words = [argument.replace("-", "_") for argument in arguments[:2]]
    if " ".join(words) in COMMANDS:
        return " ".join(words), arguments[2:]
    if words[0] in COMMANDS:
        return words[0], arguments[1:]
    if any(name.startswith(f"{words[0]} ") for name in COMMANDS):
        if len(arguments) == 1 or arguments[1] in HELP:
            return words[0], []
        wanted, shown = " ".join(words), " ".join(arguments[:2])
    else:
        wanted, shown = words[0], arguments[0]
    raise UsageError(f"unknown command {shown!r}", hint=suggest(wanted, COMMANDS) or "see fedlora --help")


def load(place: str) -> Any:
    """What `module:name` names; the module is imported now."""
    module, name = place.split(":")
    return getattr(import_module(module), name)


def _overview(group: str = "") -> str:
    """The everyday commands and the others; of a group, such as `data`, its commands."""
    if group:
        about, parts = f"usage: fedlora {group} <command> [--flag value ...]", {"commands": (group, None)}
    else:
        about = (
            "usage: fedlora <command> [FILE.yaml] [--flag value ...]\n\nFederated LoRA fine-tuning of language models."
        )
        parts = {"everyday commands": ("", True), "more": ("", False)}
    width = max(len(name) for name in COMMANDS)
    for heading, (start, everyday) in parts.items():
        rows = {
            name: command.summary
            for name, command in COMMANDS.items()
            if name.startswith(start) and everyday in (None, command.everyday)
        }
        if everyday is False:
            rows["completion"] = f"print the completion script of {', '.join(SHELLS)}"
        about += f"\n\n{heading}:\n" + "\n".join(f"  {name:<{width}}  {summary}" for name, summary in rows.items())
    return about + "\n\nFlags of a command: fedlora <command> --help. Version: fedlora --version."


def _print_completion(arguments: list[str]) -> None:
    if arguments and arguments[0] in HELP:
        about = "Print the script that completes commands and flags."
        put(f"usage: fedlora completion {{{','.join(SHELLS)}}}\n\n{about}\n")
        return
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise UsageError("completion takes one shell", hint=f"one of {', '.join(SHELLS)}")
    from fedlora.flags import completion_script

    entries = {name: (command.summary, load(command.config), command.positional) for name, command in COMMANDS.items()}
    put(completion_script(arguments[0], entries, SHELLS) + "\n")


def _show(error: FedloraError) -> int:
    _print_message(spell(f"error: {error}" + (f"\n  hint: {error.hint}" if error.hint else "")))
    return error.exit_code


def _show_unexpected(error: Exception) -> int:
    if (named := refusal_of(error)) is not None:
        return _show(named)
    import traceback

    _print_message("".join(traceback.format_exception(error)).rstrip())
    return 1


def _print_message(text: str) -> None:
    put(f"{printable(redact(text))}\n", sys.stderr)


def _speaks_utf8(stream: TextIO) -> bool:
    """Whether a stream carries every character; JSON has another way to write those that it lacks."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").replace("_", "") == "utf8"


def _silence_stdout() -> None:
    """The reader is gone: buffered text must not raise again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
