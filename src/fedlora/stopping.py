"""Signals that ask this process to stop, and the memory of them.

A handler raises an exception wherever the process happens to be. Code that is not Python's may swallow it there, or
raise one of its own instead: torch says "could not determine the shape" when the reading of a tensor is interrupted.
The result of such a call would then look like a client's failure, or be wrong. So the writer of files asks here first,
and no result computed after a signal is kept. Code that reports other errors asks too, and so do long loops, so that
the process ends soon and no client is blamed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

PATIENCE_SECONDS = 4.0
"""How long a command may take to end after a signal."""
NUMBERS = (signal.SIGINT, signal.SIGTERM)

_received: list[int] = []


def stop_if_asked() -> None:
    """Raise again the exception of a signal, if there was one: KeyboardInterrupt, or SystemExit with 128 + number.

    Handlers run in the main thread, and only what that one computes can be spoilt: in others nothing is raised.
    """
    if _received and _is_main_thread():
        raise _stop_of(_received[0])


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into an exception, so that open work is dropped cleanly; a second one kills.

    An error after a signal counts as the signal's. A process that is still running after PATIENCE_SECONDS is ended at
    once.
    """
    if not _is_main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in NUMBERS}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    timers: list[threading.Timer] = []

    def stop(number: int, frame: FrameType | None) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_DFL)
        _received.append(number)
        timers.append(threading.Timer(PATIENCE_SECONDS, os._exit, (128 + number,)))
        timers[0].daemon = True
        timers[0].start()
        raise _stop_of(number)

    try:
        for number in caught:
            signal.signal(number, stop)
        with _remembered():
            yield
    finally:
        for timer in timers:
            timer.cancel()
        # after a signal the process ends: a second one must kill it then too, and not unwind the report of the first
        for number in [] if timers else caught:
            signal.signal(number, before[number])


@contextlib.contextmanager
def remember_signals() -> Iterator[None]:
    """For a process whose signals others handle: keep a received signal for `stop_if_asked`; an error after a signal
    counts as the signal's here too."""
    if not _is_main_thread():
        yield
        return
    kept = {number: handler for number in NUMBERS if callable(handler := signal.getsignal(number))}

    def remember(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        kept[signal.Signals(number)](number, frame)

    for number in kept:
        signal.signal(number, remember)
    try:
        with _remembered():
            yield
    finally:
        for number, handler in kept.items():
            # who was asked may have left others in their place
            if signal.getsignal(number) is remember:
                signal.signal(number, handler)


@contextlib.contextmanager
def _remembered() -> Iterator[None]:
    try:
        yield
    except Exception:
        stop_if_asked()
        raise
    finally:
        _received.clear()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _stop_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
