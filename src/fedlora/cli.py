"""The command line: one table of commands, each a configuration and the function that takes it.

A command's modules are named as text and imported when it is called, so that `fedlora --help` loads
neither pydantic nor torch. Every error leaves through `main`: those a user can cause as one message
and one hint, those nobody expected as a traceback, both without the keys this process knows.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from fedlora import __version__
from fedlora.console import printable
from fedlora.errors import FedloraError, StorageError, UsageError
from fedlora.flower.commands import FLOWER_COMMANDS
from fedlora.redaction import redact
from fedlora.results import Result
from fedlora.stopping import stop_on_signals

SHELLS = ("bash", "zsh", "tcsh")
SPIN_COUNT = "10000"
"""How long OpenMP threads spin before they sleep. torch's default, 300,000, costs a factor of ten or more as soon as
another process wants the same cores; sleeping at once costs a quarter of the speed of an idle machine. See
docs/architecture.md."""
HELP = {"-h", "--help"}


class Command(NamedTuple):
    """A line of the overview, `module:Config`, `module:function` that returns a Result or nothing, the field given
    without a flag, and who checks that an extra is installed."""

    summary: str
    config: str
    run: str
    positional: str = ""
    requires: str = ""


COMMANDS = {
    "allocate": Command(
        "split one file of rows into client files and a test set",
        "fedlora.config.data:AllocateConfig",
        "fedlora.stages.allocate:run",
    ),
    "plan": Command(
        "what a run will take and what is wrong with its data, before training",
        "fedlora.config.plan:PlanConfig",
        "fedlora.stages.plan:run",
        positional="config",
    ),
    "train": Command(
        "train a federation: homo, seq, none or pooled",
        "fedlora.config.train:TrainConfig",
        "fedlora.stages.train:run",
    ),
    "generate": Command(
        "answer a test file with the base model or trained adapters",
        "fedlora.config.generate:GenerateConfig",
        "fedlora.stages.generate:run",
    ),
    "evaluate_rouge": Command(
        "score answers with ROUGE and exact match",
        "fedlora.config.evaluate:EvaluateRougeConfig",
        "fedlora.stages.evaluate_rouge:run",
    ),
    "evaluate_llm": Command(
        "let an LLM judge compare two sets of answers",
        "fedlora.config.evaluate:EvaluateLlmConfig",
        "fedlora.stages.evaluate_llm:run",
    ),
    "report": Command(
        "tables and a plot over several experiments",
        "fedlora.config.evaluate:ReportConfig",
        "fedlora.stages.report:run",
    ),
    "compare": Command(
        "methods over seeds and settings under one budget: table, figures, LaTeX",
        "fedlora.config.compare:CompareConfig",
        "fedlora.stages.compare:run",
        positional="config",
    ),
    "runs": Command(
        "list the runs: state, progress, best round, size",
        "fedlora.config.runs:RunsConfig",
        "fedlora.stages.runs:run",
    ),
    "verify": Command(
        "recheck the hashes of a run and recompute its aggregates",
        "fedlora.config.runs:VerifyConfig",
        "fedlora.stages.verify:run",
        positional="exp_name",
    ),
    **{name: Command(*row, requires="fedlora.flower.library:check_flower") for name, row in FLOWER_COMMANDS.items()},
    "reaggregate": Command(
        "what if: a run's stored updates without a client, weighed or combined otherwise",
        "fedlora.config.reaggregate:ReaggregateConfig",
        "fedlora.stages.reaggregate:run",
        positional="exp_name",
    ),
    "data skills": Command(
        "write the skills data: short tasks with one right answer",
        "fedlora.config.data:SkillsConfig",
        "fedlora.stages.data_skills:run",
    ),
    "data dolly": Command(
        "fetch databricks-dolly-15k from the hub",
        "fedlora.config.data:DollyConfig",
        "fedlora.stages.data_dolly:run",
    ),
    "model": Command(
        "install the embedded model, smollm2-135m",
        "fedlora.config.data:ModelConfig",
        "fedlora.stages.model:run",
        positional="name",
    ),
    "demo": Command(
        "the whole pipeline on the embedded model and data",
        "fedlora.config.demo:DemoConfig",
        "fedlora.demo:run",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the arguments are those of the process by default."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        with stop_on_signals():
            _dispatch(arguments)
            sys.stdout.flush()
    except FedloraError as error:
        return _show(error)
    except KeyboardInterrupt:
        _print_error("interrupted")
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


def _dispatch(arguments: list[str]) -> None:
    if not arguments:
        raise UsageError("no command given", hint="see fedlora --help")
    if arguments[0] in HELP:
        print(_overview())
    elif arguments[0] == "--version":
        print(f"fedlora {__version__}")
    elif arguments[0] == "completion":
        _print_completion(arguments[1:])
    else:
        _run_command(arguments)


def _run_command(arguments: list[str]) -> None:
    name, rest = _split_command(arguments)
    if name not in COMMANDS:
        print(_overview(name))
        return
    from fedlora.flags import make_parser, read_flags

    command = COMMANDS[name]
    config_class = load(command.config)
    values, file = read_flags(make_parser(name, config_class, command.positional), rest)
    config = config_class.make(values, file=file)
    if command.requires:
        load(command.requires)()
    try:
        _print_result(load(command.run)(config))
    except FedloraError as error:
        _print_result(error.result)
        raise


def _print_result(result: Result | None) -> None:
    if result is not None and (text := result.text()):
        print(text, flush=True)


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
    from fedlora.flags import suggest

    raise UsageError(f"unknown command {shown!r}", hint=suggest(wanted, COMMANDS) or "see fedlora --help")


def load(place: str) -> Any:
    """What `module:name` names; the module is imported now."""
    module, name = place.split(":")
    return getattr(import_module(module), name)


def _overview(group: str = "") -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items() if name.startswith(group)]
    if not group:
        lines.append(f"  {'completion':<{width}}  print the completion script of {', '.join(SHELLS)}")
    usage = f"usage: fedlora {f'{group} ' if group else ''}<command> [--config FILE.yaml] [--flag value ...]"
    about = "" if group else "\nFederated LoRA fine-tuning: allocate, train, generate, evaluate, report.\n"
    end = "\n\nfedlora <command> --help lists the flags of a command; fedlora --version prints the version."
    return f"{usage}\n{about}\ncommands:\n" + "\n".join(lines) + end


def _print_completion(arguments: list[str]) -> None:
    if arguments and arguments[0] in HELP:
        print(
            f"usage: fedlora completion {{{','.join(SHELLS)}}}\n\nPrint the script that completes commands and flags."
        )
        return
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise UsageError("completion takes one shell", hint=f"one of {', '.join(SHELLS)}")
    from fedlora.flags import completion_script

    entries = {name: (command.summary, load(command.config), command.positional) for name, command in COMMANDS.items()}
    print(completion_script(arguments[0], entries, SHELLS))


def _show(error: FedloraError) -> int:
    _print_error(f"error: {error}" + (f"\n  hint: {error.hint}" if error.hint else ""))
    return error.exit_code


def _show_unexpected(error: Exception) -> int:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        hint = "take fewer tokens or rows at once (tokens_per_pass, batch sizes, cutoff_len), or a smaller model"
        return _show(StorageError("out of memory", hint=hint))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _show(StorageError(f"{error.filename or 'disk'}: no space left", hint="free space, then run again"))
    refused = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO, errno.ENAMETOOLONG)
    if isinstance(error, OSError) and error.errno in refused:
        place = error.filename or "file system"
        return _show(StorageError(f"{place}: {error.strerror}", hint="fix the path or its permissions, then run again"))
    import traceback

    _print_error("".join(traceback.format_exception(error)).rstrip())
    return 1


def _print_error(text: str) -> None:
    print(printable(redact(text)), file=sys.stderr, flush=True)


def _silence_stdout() -> None:
    """Nobody reads any more: what is still buffered must not raise again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
