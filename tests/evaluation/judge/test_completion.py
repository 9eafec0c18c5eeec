"""A coroutine is run to its end with and without a running event loop, and ends with an interrupt."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextvars import ContextVar

import pytest

from fedlora.evaluation.judge.completion import complete

place = ContextVar("place", default="nowhere")


async def where() -> str:
    await asyncio.sleep(0)
    return f"{place.get()} in {threading.current_thread() is threading.main_thread()}"


async def failing() -> None:
    raise ValueError("no")


def test_it_runs_in_this_thread_without_a_loop_and_in_another_beside_one():
    async def cell() -> str:
        place.set("cell")
        with pytest.raises(ValueError, match="no"):
            complete(failing())
        return complete(where())

    assert complete(where()) == "nowhere in True"
    assert asyncio.run(cell()) == "cell in False"


def test_an_interrupt_cancels_what_runs_beside_a_loop():
    ended = []

    async def waiting() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    class StopError(Exception):
        pass

    def stop(number: int, frame: object) -> None:
        raise StopError

    async def cell() -> None:
        # asyncio's own handler would only cancel this task
        signal.signal(signal.SIGINT, stop)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        complete(waiting())

    before = signal.getsignal(signal.SIGINT)
    began = time.monotonic()
    try:
        with pytest.raises(StopError):
            asyncio.run(cell())
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == ["cancelled"]
    assert time.monotonic() - began < 10
