"""What a person sees while a stage runs: plain lines, or a bar where there is a terminal.

Everything goes to standard error, so that standard output carries results alone. Text from data
or models is shown with its control characters escaped: a row must not be able to drive a terminal.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self, TextIO

from fedlora.config.names import spell
from fedlora.redaction import redact


def printable(text: str) -> str:
    """`text` with control, bidirectional and surrogate characters escaped."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def put(text: str, stream: TextIO | None = None) -> None:
    """Print a text and flush, by default to standard output; characters that the stream's encoding lacks are replaced,
    unless the stream does that itself.

    In one piece: other threads write too.
    """
    stream = sys.stdout if stream is None else stream
    if getattr(stream, "errors", None) in (None, "strict", "surrogateescape"):
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
    print(text, end="", file=stream, flush=True)


_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)
"""Where lines go instead of standard error; of this thread or task alone, so that others stay heard."""


@contextlib.contextmanager
def collect_lines(lines: list[str] | None = None) -> Iterator[None]:
    """Lines said inside go into `lines` instead of being shown, and no bar is drawn: for stages inside another."""
    token = _collected.set([] if lines is None else lines)
    try:
        yield
    finally:
        _collected.reset(token)


def say(text: str) -> None:
    """One line to standard error, without the keys this process knows, in the names that the user typed."""
    text = spell(text)
    lines = _collected.get()
    if lines is not None:
        lines.append(redact(text))
        return
    stamp = _stamp(_log_names[-1]) if _log_names else ""
    _write("\n".join(stamp + line for line in text.split("\n")))


_log_names: list[str] = []
"""What the lines of this process begin with, after the time; of all its threads."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d fedlora[ a-z]*: ")


@contextlib.contextmanager
def log_lines(name: str) -> Iterator[None]:
    """Inside, every line that this process says begins with the time and `name`, which begins with fedlora: for a log
    in which several programs write."""
    _log_names.append(name)
    try:
        yield
    finally:
        _log_names.pop()


def pass_on(line: str, name: str) -> None:
    """A line that the program `name` printed, as a line of the log without colours. Lines of fedlora's own programs
    have their time already."""
    line = _COLOURS.sub("", line)
    _write(line if _STAMP.match(line) else f"{_stamp(name)}{line}")


def without_stamp(line: str) -> str:
    """A line of a log without the time and name that `log_lines` gave it, and without colours."""
    return _STAMP.sub("", _COLOURS.sub("", line), count=1)


def _stamp(name: str) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name}: "


def _write(text: str) -> None:
    put(f"{printable(redact(text))}\n", sys.stderr)


def duration(seconds: float) -> str:
    """Seconds as `45 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextlib.contextmanager
def without_output() -> Iterator[None]:
    """Inside, what a library prints on standard output is dropped: results alone belong there."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


class Progress:
    """Progress of one task with an estimate of the time left; a context manager.

    On a terminal a live bar, elsewhere a plain line at most every `interval` seconds. `unit` is what is counted, as
    `examples`; `done` is how many of them an earlier call has done.
    """

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, interval: float = 10.0) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = self._earlier = done
        self.note = ""
        """Shown after the count."""
        self._interval = interval
        self._started = self._shown = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and _collected.get() is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
            # what a caller in Python prints between two rounds goes where the caller sends it
            console = Console(stderr=True)
            self._bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True, redirect_stdout=False)
            self._bar.start()
            self._bar.add_task(self.label, total=self.total, completed=self.done, count=self._count())
        return self

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Count `amount` more as done; `note` is shown after the count from now on."""
        self.done += amount
        if note is not None:
            self.note = note
        if self._bar is not None:
            self._bar.update(0, completed=self.done, count=self._count())
            return
        now = time.monotonic()
        if now - self._shown >= self._interval and self._earlier < self.done < self.total:
            self._shown = now
            left = self.seconds_left()
            say(f"{self.label}: {self._count()}" + (f", about {duration(left)} left" if left is not None else ""))

    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at the pace of this call; None before it has done anything."""
        if self.done <= self._earlier:
            return None
        pace = (time.monotonic() - self._started) / (self.done - self._earlier)
        return pace * max(0, self.total - self.done)

    def skip(self, amount: int) -> None:
        """Count `amount` as done by an earlier call: no time was spent on it in this one."""
        self._earlier += amount
        self.advance(amount)

    def _count(self) -> str:
        """`1,400 of 27,000 examples`, and the note."""
        count = f"{self.done:,} of {self.total:,} {self.unit}"
        return f"{count}, {self.note}" if self.note else count

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            say(f"{self.label}: done in {duration(time.monotonic() - self._started)}")
