"""JSON as rows have it: numbers as they are spelled, and what could change meaning unseen is a fault."""

from __future__ import annotations

import json
from typing import Any

from fedlora.data.raw_records import Number, shorten

_MAX_DIGITS = 1000


class JsonDecoder:
    """JSON with numbers as they are spelled; `fault` says what spoils the value that was decoded last."""

    def __init__(self) -> None:
        self.fault = ""
        self._decode = json.JSONDecoder(
            object_pairs_hook=self._unique, parse_constant=self._refuse, parse_int=self._bounded, parse_float=Number
        ).raw_decode

    def decode(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends; JSONDecodeError, RecursionError."""
        self.fault = ""
        return self._decode(text, start)

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            seen: set[str] = set()
            again = next(key for key, _ in pairs if key in seen or seen.add(key))
            self.fault = self.fault or f"the key {shorten(again)} is given twice"
        return fields

    def _refuse(self, name: str) -> None:
        self.fault = self.fault or f"{name} is not valid JSON"

    def _bounded(self, digits: str) -> Number:
        if len(digits) > _MAX_DIGITS:
            self.fault = self.fault or f"a number of {len(digits)} digits"
        return Number(digits)
