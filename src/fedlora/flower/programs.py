"""Processes that belong together, started again when they end.

A node that was killed is refused by the server for about a minute, so restarts are not limited: to stop a program, stop
the process that watches it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.console import say

RESTART_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1
STOP_SECONDS = 3.0
"""How long a process has to end by itself; less than what the command line allows for all of it."""


@dataclass(frozen=True)
class Program:
    """A command with its environment; what it prints goes to `log`, or where this process prints."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path | None = None


class Crew:
    """Running programs."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.programs = list(programs)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._not_before: dict[str, float] = {}

    def look(self) -> None:
        """Start what does not run, unless it ended a moment ago."""
        for program in self.programs:
            process = self._running.get(program.name)
            if process is not None and process.poll() is not None:
                say(f"{program.name} ended with code {process.returncode}; it is started again")
                self._stop_group(process, signal.SIGTERM)
                del self._running[program.name]
                self._not_before[program.name] = time.monotonic() + RESTART_SECONDS
            if program.name not in self._running and time.monotonic() >= self._not_before.get(program.name, 0.0):
                self._running[program.name] = _start(program)

    def stop(self) -> None:
        """End everything, those started last first."""
        for process in reversed(list(self._running.values())):
            self._stop_group(process, signal.SIGTERM)
        until = time.monotonic() + STOP_SECONDS
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        for process in self._running.values():
            self._stop_group(process, signal.SIGKILL)
            process.wait()
        self._running = {}

    @staticmethod
    def _stop_group(process: subprocess.Popen[bytes], number: int) -> None:
        """The process with those it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


@contextlib.contextmanager
def running(programs: Sequence[Program]) -> Iterator[Crew]:
    """A crew that ends with the block."""
    crew = Crew(programs)
    try:
        crew.look()
        yield crew
    finally:
        with _undisturbed():
            crew.stop()


def supervise(programs: Sequence[Program], until: Callable[[], bool] = lambda: False) -> None:
    """Keep programs running until `until()`, or an exception: a signal's, say."""
    with running(programs) as crew:
        while not until():
            crew.look()
            time.sleep(0.5)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second signal does not end this process before those that it started, which would continue without it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(program: Program) -> subprocess.Popen[bytes]:
    with contextlib.ExitStack() as stack:
        output = None
        if program.log is not None:
            program.log.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(program.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            stack.callback(os.close, descriptor)
            output = descriptor
        return subprocess.Popen(  # noqa: S603 - commands of ours, no shell
            list(program.command),
            env=dict(program.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """In a new process: end when the process that started it is gone, in any way. Otherwise a killed node's
    processes would stay, hold their ports, and answer a server that takes them for the node."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
