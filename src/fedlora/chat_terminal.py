"""`fedlora chat`: questions from a terminal, replies in columns that grow; without a terminal a question per line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

from fedlora.chatting.columns import draw_texts, note_of, plain_texts
from fedlora.chatting.commands import describe, run_command
from fedlora.chatting.session import ChatSession
from fedlora.config.chat import ChatConfig
from fedlora.console import printable, put, say
from fedlora.errors import FedloraError


def run(config: ChatConfig) -> None:
    """Talk until the questions end. Raises UsageError, StorageError; what is wrong with one question is shown."""
    if config.web:
        from fedlora.chatting.web import serve

        serve(config)
        return
    session = ChatSession(config)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        put(printable(describe(session)) + "\n/help lists commands\n\n")
    try:
        for line in _lines(is_terminal):
            _answer(session, line, is_terminal)
    except EOFError:
        return
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _lines(is_terminal: bool) -> Iterator[str]:
    """Questions and commands; empty lines are left out."""
    if is_terminal:
        import readline  # noqa: F401 - makes the line editable, with its history

        while True:
            try:
                line = input("> ")
            except EOFError:
                put("\n")
                return
            if line.strip():
                yield line.strip()
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def _answer(session: ChatSession, line: str, is_terminal: bool) -> None:
    try:
        if line.startswith("/"):
            put(printable(run_command(session, line)) + "\n")
        elif is_terminal:
            _stream(session, line)
        else:
            put(plain_texts(session.ask(line)))
    except FedloraError as error:
        if not is_terminal:
            raise
        say(f"{error}" + (f"\n  hint: {error.hint}" if error.hint else ""))


def _stream(session: ChatSession, question: str) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    texts = dict.fromkeys(session.names, "")

    def hear(name: str, text: str) -> None:
        texts[name] = text
        live.update(draw_texts(texts, console.width))

    with Live(draw_texts(texts, console.width), console=console, transient=True, refresh_per_second=12) as live:
        replies = session.ask(question, hear)
    notes = {name: note_of(reply) for name, reply in replies.items()}
    console.print(draw_texts({name: reply.text for name, reply in replies.items()}, console.width, notes))
