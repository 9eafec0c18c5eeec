"""Run a coroutine to its end, also where an event loop runs already, as in a notebook."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, TypeVar

T = TypeVar("T")


def complete(coroutine: Coroutine[Any, Any, T]) -> T:
    """What `coroutine` returns or raises; beside a running loop it runs in a thread of its own, with this context.

    An interrupt cancels it, and is raised when it has ended.
    """
    return _complete_in_thread(coroutine) if _is_in_a_loop() else asyncio.run(coroutine)


def _is_in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _complete_in_thread(coroutine: Coroutine[Any, Any, T]) -> T:
    outcome: Future[T] = Future()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = []

    async def tracked() -> T:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    def work() -> None:
        try:
            outcome.set_result(asyncio.run(tracked()))
        except BaseException as error:  # raised again where the result is waited for
            outcome.set_exception(error)

    thread = threading.Thread(target=copy_context().run, args=(work,), daemon=True)
    thread.start()
    try:
        return outcome.result()
    except BaseException:
        for loop, task in running:
            # a loop that is closed has nothing to cancel
            with contextlib.suppress(RuntimeError):
                if task is not None:
                    loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
