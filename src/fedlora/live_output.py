"""A live result on its way to standard output: a picture that changes on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator

from fedlora.console import printable, put
from fedlora.files import json_line
from fedlora.results import LiveResult, Result

Stream = Generator[LiveResult, None, Result | None]


def show_live(stream: Stream, *, as_json: bool) -> Result | None:
    """Show every result until there is none; returns the one that the stream ends with.

    As JSON it is a line for each that differs from the one before.
    """
    if as_json:
        return _each(stream, _JsonLines().show)
    if not sys.stdout.isatty():
        return _each(stream, _News().show)
    from rich.live import Live

    with Live(auto_refresh=False, redirect_stdout=False, vertical_overflow="crop") as live:
        return _each(stream, lambda result: live.update(result.picture(), refresh=True))


def _each(stream: Stream, show: Callable[[LiveResult], None]) -> Result | None:
    while True:
        try:
            show(next(stream))
        except StopIteration as end:
            return end.value


class _JsonLines:
    """A line for each result that has something new."""

    def __init__(self) -> None:
        self._line = ""

    def show(self, result: LiveResult) -> None:
        line = json_line(result.as_dict())
        if line != self._line and result.news(None):
            put(line)
        self._line = line


class _News:
    """The lines that say what has changed."""

    def __init__(self) -> None:
        self._shown: LiveResult | None = None

    def show(self, result: LiveResult) -> None:
        if news := result.news(self._shown):
            put("".join(f"{printable(line)}\n" for line in news))
            self._shown = result
