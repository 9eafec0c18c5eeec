"""The reason in the body of an error, whatever its shape: OpenAI's, FastAPI's, a gateway's, a page, plain text."""

from __future__ import annotations

import json
import re
from typing import Any

_KEYS = ("error", "message", "detail", "details", "errors", "msg", "error_description", "title", "reason")
_PAGE = re.compile(r"<(script|style|head)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)


def read_reason(body: bytes) -> str:
    """What the body says, on one line; all of it where nothing in it looks like a message."""
    text = body.decode(errors="replace")
    try:
        found = _texts(json.loads(text)) or [text]
    except (ValueError, RecursionError):
        found = [_PAGE.sub(" ", text)] if "<" in text else [text]
    return " ".join(" ".join(found).split())


def read_codes(body: bytes) -> set[str]:
    """The codes and types of the error, as text: servers send what they like there."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return set()
    error = value.get("error", value) if isinstance(value, dict) else value
    return {str(error[name]) for name in ("code", "type") if name in error} if isinstance(error, dict) else set()


def _texts(value: Any, depth: int = 0) -> list[str]:
    """The messages in a JSON value, with the parameter that each names."""
    if isinstance(value, str):
        # some gateways put the JSON of another server into a text
        if value.lstrip().startswith("{") and depth < 4:
            try:
                return _texts(json.loads(value), depth + 1) or [value]
            except (ValueError, RecursionError):
                return [value]
        return [value]
    if isinstance(value, list) and depth < 4:
        return [text for item in value for text in _texts(item, depth + 1)]
    if not isinstance(value, dict) or depth >= 4:
        return []
    named = [value["param"]] if isinstance(value.get("param"), str) else []
    named += [".".join(map(str, value["loc"])) + ":"] if isinstance(value.get("loc"), list) else []
    texts = [text for key in _KEYS if key in value for text in _texts(value[key], depth + 1)]
    # a message often repeats its parameter
    return [name for name in named if not any(name in text for text in texts)] + texts
