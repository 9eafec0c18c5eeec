"""Processes that belong together: started again when they end, or watched so that the first that ends ends all.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedlora.console import pass_on, say, without_stamp
from fedlora.errors import FedloraError, TrainingError, error_of

RESTART_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1
STOP_SECONDS = 3.0
"""How long a process has to end by itself; less than what the command line allows for all of it."""
_SHOWN_LINES, _SHOWN_BYTES = 8, 4096
"""How much of the end of a log is shown in an error."""


@dataclass(frozen=True)
class Program:
    """A command with its environment. Its output goes to the file `log`, or line by line, with time and name, to where
    this process prints."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path | None = None


class Crew:
    """Running programs."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.programs = list(programs)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._readers: list[threading.Thread] = []
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
                self._running[program.name] = process = _start(program)
                if process.stdout is not None:
                    self._readers.append(_read_in_thread(process.stdout, program.name))

    def add(self, programs: Sequence[Program]) -> None:
        """Start more."""
        self.programs += programs
        self.look()

    def check(self) -> None:
        """Raise an error with the end of its log for a program that has ended."""
        for program in self.programs:
            process = self._running.get(program.name)
            if process is not None and process.poll() is not None:
                raise _error_of(program, process.returncode)

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
        for reader in self._readers:
            # what was printed last; a process that has left the group may hold its end open
            reader.join(0.2)
        self._running, self._readers = {}, []

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


def supervise(programs: Sequence[Program], *, restarts: bool = True) -> None:
    """Keep programs running until an exception: a signal's, or without `restarts` that of a program that has ended."""
    with running(programs) as crew:
        while True:
            crew.look() if restarts else crew.check()
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
        output = subprocess.PIPE
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
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _read_in_thread(output: IO[bytes], name: str) -> threading.Thread:
    """Pass on what a program prints, to its end."""

    def read() -> None:
        with output:
            for line in output:
                # a program must not wait for a log that nobody can write any more
                with contextlib.suppress(OSError, ValueError):
                    pass_on(line.decode(errors="replace").rstrip(), name)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return reader


def _error_of(program: Program, code: int) -> FedloraError:
    """The error of a program that has ended, with the last lines of its log."""
    lines = []
    if program.log is not None:
        text = program.log.read_bytes()[-_SHOWN_BYTES:].decode(errors="replace")
        lines = [without_stamp(line) for line in text.splitlines() if line.strip()][-_SHOWN_LINES:]
    how = f"with code {code}" if code >= 0 else f"by signal {-code}"
    place = f"; the end of {program.log}:" if lines else ""
    message = "\n  ".join([f"{program.name} ended {how}{place}", *lines])
    hint = f"all of it is in {program.log}" if program.log else "its last lines stand above"
    return error_of(code if code > 0 else TrainingError.exit_code, message, hint)


def _end_with_parent() -> None:
    """In a new process: end when the process that started it is gone, in any way. Otherwise a killed node's
    processes would stay, hold their ports, and answer a server that takes them for the node."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
