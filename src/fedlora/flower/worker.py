"""The process of a node that holds its base model, behind a Unix socket that only its owner can open.

Flower starts a new process for every message, which would load the model again in every round. That process only passes
bytes on; this one stays. Requests are answered one after another, each on a connection of its own, and nothing that
arrives is ever unpickled.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedlora.console import say
from fedlora.errors import LockedError, UsageError
from fedlora.flower.frames import FrameError, frame, read_frame

IO_SECONDS = 120.0
"""A peer that sends or takes nothing for so long is gone."""
LONGEST_PATH = 100
"""Characters of a Unix socket's path; systems allow a few more than a hundred bytes."""


def serve(path: Path, answer: Callable[[bytes], bytes], most_bytes: int, *, until: Callable[[], bool]) -> None:
    """Answer requests on the socket `path` until `until()`; LockedError when another worker serves it."""
    with _listening(path) as listener:
        while not until():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                _answer_one(connection, answer, most_bytes)


def ask(path: Path, request: bytes, most_bytes: int, *, connect_seconds: float, answer_seconds: float) -> bytes:
    """The worker's answer; OSError or EOFError when it is not there for so long, or dies over the request."""
    until = time.monotonic() + connect_seconds
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
            break
        except OSError:
            connection.close()
            # it may be starting again
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
    with connection:
        connection.settimeout(answer_seconds)
        connection.sendall(frame(request))
        return read_frame(connection, most_bytes)


def _answer_one(connection: socket.socket, answer: Callable[[bytes], bytes], most_bytes: int) -> None:
    connection.settimeout(IO_SECONDS)
    try:
        request = read_frame(connection, most_bytes)
        connection.sendall(frame(answer(request)))
    except (OSError, EOFError, FrameError) as error:
        say(f"a request was dropped: {error}")


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A listening socket that only its owner can use from the start, removed afterwards."""
    if len(str(path)) > LONGEST_PATH:
        raise UsageError(f"{path}: too long for a socket", hint=f"a state_dir of under {LONGEST_PATH - 12} characters")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _remove_dead(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(16)
        listener.settimeout(0.5)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _remove_dead(path: Path) -> None:
    """Remove the socket of a worker that was killed; LockedError when it is alive."""
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise LockedError(f"{path}: another worker serves this node", hint="stop it first, or choose another state_dir")
