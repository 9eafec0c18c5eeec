"""What a stage gives back.

A stage prints nothing: the command line prints the result's text, and a caller in Python reads its fields.
"""

from __future__ import annotations

from typing import Any, Protocol


class Result(Protocol):
    """The result of one stage."""

    def text(self) -> str:
        """What the command line prints on standard output; empty when the messages on the way have said everything."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values: what `--json` prints."""
        ...
