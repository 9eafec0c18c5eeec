"""Replies side by side, or one under the other where the terminal is narrow; text of models drives no terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.console import printable
from fedlora.engines.streamed_answers import Reply
from fedlora.plain_text import counted

NARROWEST = 36
"""Characters of a column, at least."""
COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "red")


def draw_texts(texts: Mapping[str, str], width: int, notes: Mapping[str, str] | None = None) -> Any:
    """A panel for each model, with its text so far and a note below."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    panels = [
        Panel(
            Text(printable(text)),
            title=Text(printable(name)),
            subtitle=Text((notes or {}).get(name, "")),
            border_style=COLOURS[number % len(COLOURS)],
        )
        for number, (name, text) in enumerate(texts.items())
    ]
    if width // len(panels) < NARROWEST:
        return Group(*panels)
    columns = Table.grid(expand=True)
    for _ in panels:
        columns.add_column(ratio=1)
    columns.add_row(*panels)
    return columns


def note_of(reply: Reply) -> str:
    """Tokens and their pace, and whether the limit cut the reply."""
    pace = f", {reply.num_tokens / reply.seconds:.0f} tokens/s" if reply.seconds else ""
    return counted(reply.num_tokens, "token") + pace + (", cut by max_new_tokens" if reply.is_cut else "")


def plain_texts(replies: Mapping[str, Reply]) -> str:
    """Name and text of each, for where there is no terminal."""
    return "".join(f"{printable(name)}: {printable(reply.text)}\n" for name, reply in replies.items())
