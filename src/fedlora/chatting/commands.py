"""The commands of a chat in a terminal: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fedlora.chatting.session import SETTINGS, ChatSession
from fedlora.errors import UsageError
from fedlora.nearest import suggest
from fedlora.plain_text import counted


class SlashCommand(NamedTuple):
    """What is typed after the name, what it does, and the function that does it and returns what to show."""

    takes: str
    about: str
    run: Callable[[ChatSession, str], str]


def describe(session: ChatSession) -> str:
    """Who answers, by which template and settings."""
    lines = [f"{name}: template {template}" for name, template in session.templates.items()]
    settings = ", ".join(f"{name}={value}" for name, value in session.settings.items())
    lines += [f"system: {session.system or '(the template has its own, or none)'}", settings]
    if session.forgetful:
        lines.append(f"no memory of earlier turns, because the template has no place for them: {_list(session)}")
    return "\n".join(lines)


def run_command(session: ChatSession, line: str) -> str:
    """Do what a line with a slash says; returns what to show. Raises UsageError."""
    name, _, rest = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        hint = suggest(name, COMMANDS) or "/help lists the commands; a question cannot begin with a slash"
        raise UsageError(f"there is no command /{name}", hint=hint)
    return COMMANDS[name].run(session, rest.strip())


def _help(session: ChatSession, rest: str) -> str:
    heads = {name: f"/{name} {command.takes}".rstrip() for name, command in COMMANDS.items()}
    width = max(map(len, heads.values()))
    return "\n".join(f"{head:<{width}}  {COMMANDS[name].about}" for name, head in heads.items())


def _set(session: ChatSession, rest: str) -> str:
    for pair in rest.split():
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"{pair!r} is not name=value", hint="such as /set temperature=0.7 max_new_tokens=64")
        session.set(name, value)
    return ", ".join(f"{name}={value}" for name, value in session.settings.items())


def _system(session: ChatSession, rest: str) -> str:
    session.set_system(rest)
    return "the conversations start again" + (f" with the system prompt: {rest}" if rest else " without one of yours")


def _template(session: ChatSession, rest: str) -> str:
    if rest:
        session.set_template(rest)
    return describe(session)


def _prompt(session: ChatSession, rest: str) -> str:
    """The prompts as the models saw them; those that are the same are shown once."""
    shown: dict[str, list[str]] = {}
    for name, text in session.prompts.items():
        shown.setdefault(text, []).append(name)
    return "\n\n".join(f"{', '.join(names)}:\n{text}" for text, names in shown.items()) or "nothing was asked yet"


def _reset(session: ChatSession, rest: str) -> str:
    session.reset()
    return "the conversations start again"


def _save(session: ChatSession, rest: str) -> str:
    if not rest:
        raise UsageError("/save needs a file", hint="such as /save talk.jsonl")
    return f"{counted(len(session.rows()), 'conversation')} in {session.save(rest)}"


def _quit(session: ChatSession, rest: str) -> str:
    raise EOFError


def _list(session: ChatSession) -> str:
    return ", ".join(session.forgetful)


COMMANDS = {
    "help": SlashCommand("", "list these commands", _help),
    "models": SlashCommand("", "who answers, by which template and settings", lambda session, rest: describe(session)),
    "set": SlashCommand("NAME=VALUE ...", f"change {', '.join(SETTINGS)}", _set),
    "system": SlashCommand("[TEXT]", "change the system prompt; without a text remove yours", _system),
    "template": SlashCommand("[NAME]", "change the template: alpaca, chat, a file; auto: each run's own", _template),
    "prompt": SlashCommand("", "what the models were given last, with its control tokens", _prompt),
    "reset": SlashCommand("", "forget the conversations", _reset),
    "save": SlashCommand("FILE.jsonl", "write the conversations as rows", _save),
    "quit": SlashCommand("", "end; so does Ctrl-D", _quit),
}
