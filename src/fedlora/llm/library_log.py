"""What transformers shows by itself, so that it does not stand between our own lines."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of the library between our own lines."""
    from transformers.utils import logging as theirs

    was_on = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            theirs.enable_progress_bar()


class _Held(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextlib.contextmanager
def held_warnings(held: list[logging.LogRecord]) -> Iterator[None]:
    """The library's log is shown afterwards; not where it fails, which is one message of ours, and not its report of a
    load, which `check_whole` reads."""
    logger = logging.getLogger("transformers")
    handlers = logger.handlers
    logger.handlers = [_Held(held)]
    try:
        yield
    finally:
        logger.handlers = handlers
    for record in held:
        if "LOAD REPORT" not in record.getMessage():
            logger.handle(record)
