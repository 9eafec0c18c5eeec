"""One record of a file before it is a row: its values, its place, and what is wrong with it.

A source yields a RecordError for a record that may be skipped, because the next one is known to be whole,
and raises it where nothing after it can be trusted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fedlora.console import printable
from fedlora.errors import DataError

_EXCERPT = 80
_NAME_SHOWN = 40

ROW_HINT = (
    "a row has instruction, context or input, and response or output; or messages or conversations; or prompt and "
    "completion; or text; for other names give --columns, such as --columns prompt=question,response=answer"
)
SIZE_HINT = "raise --max_record_bytes if a row is meant to be so large"
UTF8_HINT = "save the file as UTF-8"


class Record(NamedTuple):
    """What a source decoded: `place` is `:line:column` or `: row <n>`, `excerpt` shows the record in a message."""

    value: Any
    place: str
    excerpt: str = ""


class RecordError(ValueError):
    """A record that cannot be used, and its place."""

    def __init__(self, place: str, what: str, *, excerpt: str = "", hint: str = ROW_HINT) -> None:
        super().__init__(what)
        self.place = place
        self.excerpt = excerpt
        self.hint = hint

    def make_error(self, path: Path, note: str = "") -> DataError:
        """The error a user sees: file, place, what is wrong, and the beginning of the record."""
        shown = printable(self.excerpt)
        return DataError(f"{path}{self.place}: {self}{note}" + (f"\n    {shown}" if shown else ""), hint=self.hint)


class Number(str):
    """A number in the spelling that the file has, so that it can become text without a change."""


def excerpt_of(text: str, start: int = 0) -> str:
    """What a message shows of a record: one line, not longer than a terminal is wide."""
    return text[start : start + _EXCERPT].split("\n")[0].rstrip()


def shorten(name: str) -> str:
    """A name from a file as a message quotes it."""
    return repr(name if len(name) <= _NAME_SHOWN else name[:_NAME_SHOWN] + "...")


def shown_name(name: str) -> str:
    """A name from a file as a list shows it: without quotes, its control characters escaped."""
    return shorten(name)[1:-1] or "''"


def too_large(place: str, limit: int, excerpt: str = "") -> RecordError:
    """The error of a record that exceeds `limit` bytes."""
    return RecordError(place, f"the row is larger than {limit} bytes", excerpt=excerpt, hint=SIZE_HINT)


def not_utf8(line: int, column: int) -> RecordError:
    """The error of bytes that are not UTF-8."""
    return RecordError(f":{line}:{column}", "not UTF-8 text", hint=UTF8_HINT)
