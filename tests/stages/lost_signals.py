"""Signals whose exception gets lost in code that is not Python's."""

from __future__ import annotations

import contextlib
import os
import signal
import time


def lose_signal(error: Exception | None = None) -> None:
    """SIGTERM comes, and what its handler raises is lost without a trace, or `error` comes out in its place."""
    # whom a first signal asked to stop has no handler left: a second one would end the tests
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "it went on behind a signal"
    with contextlib.suppress(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        raise AssertionError("nobody heard the signal")
    if error is not None:
        raise error
