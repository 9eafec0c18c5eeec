"""What a stage gives back.

A stage prints nothing: the command line prints the result's text, a notebook shows its table, and a caller in Python
reads its fields.
"""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from fedlora.plain_text import Table


class Result(ABC):
    """Base of the results: one text, shown alike by the command line, a prompt and a notebook.

    A subclass is a frozen dataclass with `repr=False`. It writes `as_dict`, and either `text` or, where there are
    tables in it, `parts`. The text ends with the place of the files.
    """

    @property
    def next_command(self) -> str:
        """What to type next on the command line, complete; empty where nothing follows."""
        return ""

    @property
    def next_with_same_flags(self) -> str:
        """The command that takes next what this one was given; empty where none does."""
        return ""

    def parts(self) -> Sequence[str]:
        """The text in pieces, each of which begins a line; tables are pieces of their own."""
        return (self.text(),)

    def text(self) -> str:
        """What the command line prints on standard output; empty when the messages on the way have said everything."""
        return "\n".join(part for part in self.parts() if part)

    def terminal_text(self) -> str:
        """The text for a terminal that has colours."""
        return self.text()

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values: what `--json` prints. docs/reference/json.md has the schema."""

    def __repr__(self) -> str:
        return self.text() or f"{type(self).__name__}({self.as_dict()})"

    def _repr_html_(self) -> str:
        return "\n".join(_html_of(part) for part in self.parts() if part) or _html_of(repr(self))


class LiveResult(Result):
    """A result that later ones of its kind replace.

    A function that gives several is a generator of them, whose return value is the last result or None. The command
    line draws the newest on a terminal; elsewhere it prints `news`.
    """

    @abstractmethod
    def news(self, shown: LiveResult | None) -> Sequence[str]:
        """The lines that say what has changed since `shown`, the last one that had any; None: there was none."""

    @abstractmethod
    def picture(self) -> Any:
        """What rich draws on a terminal."""


def _html_of(part: str) -> str:
    """A piece of text for a notebook, escaped."""
    if not isinstance(part, Table):
        return f"<pre>{html.escape(part)}</pre>"
    sides = ["left" if column in part.left else "right" for column in range(len(part.heads))]
    head = _row_of("th", part.heads, sides)
    return (
        f"<table><thead>{head}</thead><tbody>{''.join(_row_of('td', row, sides) for row in part.rows)}</tbody></table>"
    )


def _row_of(kind: str, cells: Sequence[str], sides: Sequence[str]) -> str:
    texts = (
        f'<{kind} style="text-align: {side}">{html.escape(cell)}</{kind}>'
        for cell, side in zip(cells, sides, strict=True)
    )
    return f"<tr>{''.join(texts)}</tr>"
