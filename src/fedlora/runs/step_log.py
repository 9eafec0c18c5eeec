"""steps.jsonl: the loss of every optimizer step, as it comes.

The file is no part of a round: nothing is hashed, nothing reads it to resume, and it may be deleted. So it is written
without a flush to the disk, at most once a second, and a disk that refuses ends the log and not the run.

A client that trains a round again, after an interruption or a failure, leaves both attempts in the file, numbered from
1; readers take the last.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora.console import say
from fedlora.files import json_line
from fedlora.types import ClientId, Step

EVERY_SECONDS = 1.0
"""How often steps are written that have gathered."""


class StepLog:
    """Writes the steps of one run, whose earlier ones are in the file already."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._written = time.monotonic()
        self._attempts: dict[tuple[int, ClientId], int] = defaultdict(int)
        self._is_refused = False
        rows, whole = _read(path)
        for row in rows:
            key = (row["round"], row["client_id"])
            self._attempts[key] = max(self._attempts[key], row["attempt"])
        self._whole = whole

    def add(self, step: Step) -> None:
        """One more step; it reaches the file within a second, or with the next step."""
        key = (step.round, step.client_id)
        with self._lock:
            self._attempts[key] += step.step == step.part == 1
            self._lines.append(json_line({**asdict(step), "attempt": self._attempts[key]}))
            if time.monotonic() - self._written >= EVERY_SECONDS:
                self._write()

    def close(self) -> None:
        """Write what has gathered."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        lines, self._lines = "".join(self._lines), []
        self._written = time.monotonic()
        if self._is_refused or not lines:
            return
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                if self._whole is not None:
                    # a kill may have cut the last line
                    os.ftruncate(descriptor, self._whole)
                    self._whole = None
                os.write(descriptor, lines.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            self._is_refused = True
            say(f"warning: {self.path}: {error.strerror or error}: the losses of further steps are not written")


class StepTail:
    """Reads the steps of a run that have come since it last looked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def look(self) -> list[dict[str, Any]]:
        """The new steps, of every attempt."""
        try:
            size = self.path.stat().st_size
            if size < self._read:
                # the run was started again
                self._read = 0
            with self.path.open("rb") as handle:
                handle.seek(self._read)
                rows, whole = _parse(handle.read())
        except OSError:
            return []
        self._read += whole
        return rows


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The steps of a run in the order in which they were trained, of each client and round the last attempt.

    Lines that are no steps, such as one that was cut, are left out; without a file there are none.
    """
    rows, _ = _read(path)
    last: dict[tuple[int, ClientId], int] = {}
    for row in rows:
        last[row["round"], row["client_id"]] = row["attempt"]
    return [row for row in rows if last[row["round"], row["client_id"]] == row["attempt"]]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are steps, and where the last whole line ends."""
    try:
        content = path.read_bytes()
    except OSError:
        return [], 0
    return _parse(content)


def _parse(content: bytes) -> tuple[list[dict[str, Any]], int]:
    whole = content.rfind(b"\n") + 1
    return [row for line in content[:whole].splitlines() if (row := _read_line(line)) is not None], whole


def _read_line(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        Step(**{name: value for name, value in row.items() if name != "attempt"})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    numbers = ("round", "client_id", "step", "steps", "attempt", "part", "num_tokens")
    is_step = all(type(row.get(name)) is int for name in numbers) and _is_loss(row)
    return row if is_step else None


def _is_loss(row: Mapping[str, Any]) -> bool:
    return row["loss"] is None or isinstance(row["loss"], float | int)
