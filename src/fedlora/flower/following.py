"""Follow a run on the nodes to its end: pass on what it prints, and raise what it ended with."""

from __future__ import annotations

import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from fedlora.console import printable, say, without_stamp
from fedlora.errors import StorageError, TrainingError, error_of
from fedlora.flower.command_lines import CONNECTION, flwr_command
from fedlora.flower.control import list_runs, nothing_to_check
from fedlora.flower.request import read_exit
from fedlora.results import Result

STATUS_SECONDS = 2.0
AWAY_SECONDS = 90.0
"""For how long a server may be away while a run is followed: the run outlives its SuperLink."""
CHECK_SECONDS = 0.5
"""How often `check` is called while nothing is printed."""


@dataclass(frozen=True, repr=False)
class EndedRun(Result):
    """A run on the nodes whose rounds are all done; `place` is where it lies on the server's machine."""

    place: str

    def text(self) -> str:
        """The place."""
        return printable(self.place)

    def as_dict(self) -> dict[str, Any]:
        return {"place": self.place}


def follow_to_end(run_id: str, environment: dict[str, str], check: Callable[[], None] = nothing_to_check) -> EndedRun:
    """Show a run to its end, or raise what it ended with, or what `check` raises meanwhile."""
    code, message, hint = _follow(run_id, environment, check)
    if code:
        raise error_of(code, message, hint)
    return EndedRun(message)


def _follow(run_id: str, environment: dict[str, str], check: Callable[[], None]) -> tuple[int, str, str]:
    """Pass on what the run prints until it has ended; exit code, message and hint.

    Flower repeats everything from the beginning when its stream is opened again, so a line is shown once.
    """
    shown: set[str] = set()
    ended = None
    heard = time.monotonic()
    while True:
        for line in _lines(run_id, environment, check):
            if ended is not None:
                # Flower's account of an error
                continue
            ended = read_exit(line)
            if ended is None and line.strip() and line not in shown:
                shown.add(line)
                say(without_stamp(line.rstrip()))
        if ended is not None:
            return ended
        try:
            status, heard = read_status(run_id, environment), time.monotonic()
        except StorageError:
            if time.monotonic() - heard > AWAY_SECONDS:
                raise
            status = ""
        if status == "finished:stopped":
            hint = "the same `fedlora flower run` resumes it after its last round"
            return TrainingError.exit_code, f"run {run_id} was stopped", hint
        if status.startswith("finished"):
            reason = f"run {run_id} ended and reported no result: {status}"
            return TrainingError.exit_code, reason, "submit it again: it resumes after its last round"
        time.sleep(STATUS_SECONDS)


def _lines(run_id: str, environment: dict[str, str], check: Callable[[], None]) -> Iterator[str]:
    """What the run has printed and prints, as long as Flower streams it."""
    command = flwr_command("log", run_id, CONNECTION, "--stream")
    with subprocess.Popen(  # noqa: S603 - a command of ours, no shell
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # a run may print nothing for minutes, and the check cannot wait for it
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        try:
            while True:
                check()
                try:
                    line = lines.get(timeout=CHECK_SECONDS)
                except queue.Empty:
                    continue
                if line is None:
                    return
                yield line
        finally:
            process.terminate()


def _read(output: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    try:
        for line in output:
            lines.put(line)
    finally:
        lines.put(None)


def read_status(run_id: str, environment: dict[str, str]) -> str:
    """What Flower says a run's state is; empty when it does not know."""
    runs = list_runs(environment, run_id)
    return str(runs[0].get("status", "")) if runs else ""
