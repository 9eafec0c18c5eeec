"""Secrets of this process, and keeping them out of what it shows.

The last gate before a terminal or a log: a traceback is printed with every cause in its chain, and libraries put what
they hold into their errors. What an endpoint sends back is cleaned before it is stored (`evaluation/judge/key.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

SECRET_VARIABLES = (
    *("api_key", "OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    *("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
)
SHORTEST_SECRET = 8
"""Shorter keys (`none`, say, for a server on this machine) are no secrets, and would be found in any text."""

_held: set[str] = set()


def hold_secret(secret: str) -> None:
    """From now on `redact` takes `secret` out, wherever it came from."""
    _held.add(secret)


def redact(text: str) -> str:
    """`text` without the secrets of the environment and those held, also as they are quoted in addresses and JSON."""
    secrets = _held | {os.environ.get(name, "").strip() for name in SECRET_VARIABLES}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET:
            for form in {secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1]}:
                text = text.replace(form, "[redacted]")
    return text


@contextlib.contextmanager
def redacted_logs() -> Iterator[None]:
    """Inside, what any library logs goes through `redact`, its tracebacks too."""
    import logging

    make = logging.getLogRecordFactory()
    plain = logging.Formatter()

    def make_redacted(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info:
            # a handler formats a traceback only where there is no text of it yet
            record.exc_text = redact(plain.formatException(record.exc_info))
        return record

    logging.setLogRecordFactory(make_redacted)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
