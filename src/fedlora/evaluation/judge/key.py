"""The key of the judge's endpoint: where it comes from, and keeping it out of everything that is written.

It travels in the environment or in a file, never on a command line. Text that comes back from the
endpoint goes through `Redactor` before it is shown or stored: servers do echo keys in their errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import SecretStr

from fedlora.console import printable
from fedlora.errors import UsageError
from fedlora.files import read_text
from fedlora.redaction import SHORTEST_SECRET, hold_secret

ENVIRONMENT_NAMES = ("api_key", "OPENAI_API_KEY")


def load_key(key_file: Path | None, environment: Mapping[str, str]) -> SecretStr:
    """The key from `key_file` when one is named, else from the first variable that is set; UsageError without."""
    if key_file is not None:
        return _check(_read_key_file(key_file), str(key_file))
    for name in ENVIRONMENT_NAMES:
        if value := environment.get(name, "").strip():
            return _check(value, f"the variable {name}")
    raise UsageError(
        "no key for the judge",
        hint="export OPENAI_API_KEY (or api_key), or name a file with --api_key_file; "
        "a server that takes any key is content with api_key=none",
    )


def _read_key_file(path: Path) -> str:
    try:
        return read_text(path).removeprefix("\ufeff").strip()
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file", hint="the file holds the key and nothing else") from None


def _check(key: str, where: str) -> SecretStr:
    # the value is never quoted here; left to the HTTP library, a bad header would be, in its error
    if not key or not all("!" <= char <= "~" for char in key):
        what = "is empty" if not key else "holds more than one key, or characters that no key has"
        raise UsageError(f"{where} {what}", hint="it holds the key and nothing else")
    hold_secret(key)
    return SecretStr(key)


class Redactor:
    """Makes text from the endpoint fit to be shown or stored: no key, no control characters, one line, short."""

    def __init__(self, key: SecretStr) -> None:
        self._key = key

    def clean(self, text: str, limit: int = 300) -> str:
        """`text` on one line of at most `limit` characters. The key goes first: no part of it survives the cut."""
        return printable(" ".join(self._without_key(text).split()))[:limit]

    def keep(self, text: str, limit: int = 20_000) -> str:
        """`text` for a file: without the key and control characters, cut after `limit` characters."""
        return printable(self._without_key(text))[:limit]

    def _without_key(self, text: str) -> str:
        key = self._key.get_secret_value()
        return text.replace(key, "[key]") if len(key) >= SHORTEST_SECRET else text
