"""The value of one field as text, as strictly as the rules say.

Text stays as it is written: a date, a numeral, a NUL or a bidirectional mark is text like any other. Only what
no tokenizer can read (half a surrogate pair) and what is no text at all is refused, unless the rules say otherwise.
Errors have no place yet; `RowFields` adds it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from fedlora.data.json_values import JsonDecoder
from fedlora.data.raw_records import ROW_HINT, Number, RecordError
from fedlora.rows import ReadRules

_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_HINT = "write the value as JSON, with double quotes, as json.dumps does; what Python prints of a list is not JSON"
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    Number: "a number",
    int: "a number",
    float: "a number",
    bool: "true or false",
}


def refuse(what: str, hint: str = ROW_HINT) -> RecordError:
    """The error of a record whose place is still to be added."""
    return RecordError("", what, hint=hint)


def kind_of(value: Any) -> str:
    """What a message calls a value that is not what it should be."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


class FieldText:
    """Text of fields under the rules; `name` is what errors call the field."""

    def __init__(self, rules: ReadRules) -> None:
        self._rules = rules
        self._decoder = JsonDecoder()

    def clean(self, value: Any, name: str) -> str:
        """The value as text; RecordError where it is none."""
        if type(value) is Number and self._rules.numbers_as_text:
            return str(value)
        if type(value) is not str:
            hint = "give --numbers_as_text to take numbers as they are written" if type(value) is Number else ROW_HINT
            raise refuse(f"the field {name!r} must be text, got {kind_of(value)}", hint)
        half = None if value.isascii() else _SURROGATE.search(value)
        if half is None:
            return value
        if self._rules.surrogates == "replace":
            return _SURROGATE.sub("\ufffd", value)
        what = f"the field {name!r} holds half a surrogate pair (\\u{ord(half.group()):04x})"
        raise refuse(what, "give --surrogates replace to put U+FFFD in its place")

    def decode(self, value: Any, name: str) -> Any:
        """A value that text may stand for as JSON, as in a cell of a table."""
        if type(value) is not str:
            return value
        text = value.strip(" \t\r\n")
        try:
            found, end = self._decoder.decode(text, 0)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise refuse(f"the field {name!r} is text that is not valid JSON: {reason}", _JSON_HINT) from None
        fault = self._decoder.fault or ("text after the end of the value" if end < len(text) else "")
        if fault:
            raise refuse(f"the field {name!r} is text that is not valid JSON: {fault}", _JSON_HINT)
        return found
