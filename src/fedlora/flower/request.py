"""A run as it is submitted to Flower, and the line that reports its end.

Flower does not pass an app's exit code to the submitter, but it passes the app's output.
"""

from __future__ import annotations

import json

from fedlora.config.train import TrainConfig
from fedlora.redaction import redact

EXIT_LINE = "fedlora flower: exit "
"""The beginning of the output line that reports a run's end. The first such line counts, and text from a node never
begins a line."""


def make_request(config: TrainConfig, *, start: float, absent: float, wave: float) -> str:
    """A run as the text that goes with its submission."""
    fields = config.model_dump(mode="json", include=config.model_fields_set)
    return json.dumps({"config": fields, "waits": {"start": start, "absent": absent, "wave": wave}})


def read_exit(line: str) -> tuple[int, str, str] | None:
    """Exit code, message and hint from the line that reports a run's end; None for any other line."""
    if not line.startswith(EXIT_LINE):
        return None
    code, _, rest = line.removeprefix(EXIT_LINE).partition(" ")
    try:
        message, hint = json.loads(rest)
        return int(code), str(message), str(hint)
    except (ValueError, TypeError, RecursionError):
        return None


def exit_line(code: int, message: str, hint: str = "") -> str:
    """The line that `read_exit` reads."""
    return f"{EXIT_LINE}{code} {json.dumps([redact(message), hint])}"
