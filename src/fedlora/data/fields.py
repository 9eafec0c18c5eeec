"""Which fields of a record make a row, and how strictly their text is taken.

Text stays as it is written: a date, a numeral, a NUL or a bidirectional mark is text like any other. Only what
no tokenizer can read (half a surrogate pair) and what is no text at all is refused, unless the rules say otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from fedlora.data.raw_records import ROW_HINT, Number, Record, RecordError
from fedlora.rows import ReadRules, Row

_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = {dict: "an object", list: "a list", str: "text", Number: "a number", bool: "true or false"}
_NAME_SHOWN = 40
MOST_UNUSED = 20


class RowFields:
    """The names that a row's fields may have; where two names of one field are there, their values must agree."""

    def __init__(self, rules: ReadRules, *, output_key: str | None = None, require_category: bool = False) -> None:
        self.rules = rules
        self.require_category = require_category
        outputs = (output_key,) if output_key else ("response", "output")
        self._groups = (("instruction",), ("context", "input"), outputs, ("category",))
        self._required = (True, False, True, require_category)
        self.names = frozenset(name for group in self._groups for name in group)
        self.unused: dict[str, None] = {}
        """Names that were met and are no field of a row, in the order of the file; the first MOST_UNUSED."""

    def note_unused(self, names: Iterable[str]) -> None:
        """Note the columns of a table, or the keys of an object, that are not used."""
        for name in names:
            if name not in self.names and name not in self.unused and len(self.unused) < MOST_UNUSED:
                self.unused[name] = None

    def find_missing(self, columns: Collection[str]) -> str:
        """What a table with these columns lacks, or nothing."""
        for group, required in zip(self._groups, self._required, strict=True):
            if required and not any(name in columns for name in group):
                return f"the column {_either(group)} is missing"
        return ""

    def make_row(self, record: Record) -> Row:
        """The row of a decoded record; RecordError names the field that cannot be used."""
        if type(record.value) is not dict:
            raise _refuse(record, f"expected a JSON object, got {_kind(record.value)}")
        if not self.names.issuperset(record.value):
            self.note_unused(record.value)
        instruction, given, output, category = (
            self._text(record, group, required) for group, required in zip(self._groups, self._required, strict=True)
        )
        if self.require_category and not category.strip():
            raise _refuse(record, "the field 'category' is empty")
        return Row(instruction, given, output, category)

    def _text(self, record: Record, group: tuple[str, ...], required: bool) -> str:
        fields = record.value
        present = [name for name in group if name in fields]
        if not present:
            if required:
                raise _refuse(record, f"the field {_either(group)} is missing")
            return ""
        text = self._clean(record, present[0])
        if any(self._clean(record, name) != text for name in present[1:]):
            raise _refuse(record, f"the fields {' and '.join(map(repr, present))} differ")
        return text

    def _clean(self, record: Record, name: str) -> str:
        value = record.value[name]
        if type(value) is Number and self.rules.numbers_as_text:
            return str(value)
        if type(value) is not str:
            hint = "give --numbers_as_text to take numbers as they are written" if type(value) is Number else ROW_HINT
            raise _refuse(record, f"the field {name!r} must be text, got {_kind(value)}", hint)
        half = None if value.isascii() else _SURROGATE.search(value)
        if half is None:
            return value
        if self.rules.surrogates == "replace":
            return _SURROGATE.sub("\ufffd", value)
        what = f"the field {name!r} holds half a surrogate pair (\\u{ord(half.group()):04x})"
        raise _refuse(record, what, "give --surrogates replace to put U+FFFD in its place")


def shorten(name: str) -> str:
    """A name from a file as a message quotes it."""
    return repr(name if len(name) <= _NAME_SHOWN else name[:_NAME_SHOWN] + "...")


def shown_name(name: str) -> str:
    """A name from a file as a list shows it: without quotes, its control characters escaped."""
    return shorten(name)[1:-1]


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def _refuse(record: Record, what: str, hint: str = ROW_HINT) -> RecordError:
    return RecordError(record.place, what, excerpt=record.excerpt, hint=hint)
