"""Rows from JSON arrays and JSON lines, every error with file, line and column.

The format is decided by the first character that is not blank: `[` opens an array, anything else
is one object per line. Text stays as it is written (a date stays text); fields that are not named
here are ignored. Whatever could change meaning unseen (duplicate keys, NaN) is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fedlora.console import printable
from fedlora.errors import DataError
from fedlora.files import read_text
from fedlora.types import Row

_BLANK = " \t\r\n"
_EXCERPT = 80
_MAX_DIGITS = 1000
_ROW_HINT = "a row is a JSON object with instruction, context or input, response or output, and category, all text"


class _RowError(ValueError):
    """Raised inside the JSON decoder, where the position is not known."""


def read_rows(
    path: Path, *, output_key: str | None = None, require_category: bool = False, may_be_empty: bool = False
) -> list[Row]:
    """All rows of `path`, in file order; at least one, unless `may_be_empty` lets an empty array pass.

    Takes `context` or `input` (optional), `response` or `output` (or exactly `output_key`), and `category`
    ("" when it is absent, unless `require_category`). Raises UsageError when there is no such file, DataError
    `file:line:column: what` with the start of the line otherwise. Positions count from 1; a fault inside
    a row that is valid JSON is reported where the row starts.
    """
    source = _Source(path, _decode(path))
    rows = [_make_row(source, item, output_key, require_category) for item in _items(source)]
    # a file without a single character is no empty array: it was cut short
    if not rows and not (may_be_empty and source.text.strip(_BLANK)):
        source.fail(0, "holds no rows")
    return rows


@dataclass(frozen=True)
class _Source:
    path: Path
    text: str

    def fail(self, position: int, what: str, *, row_start: int = 0, hint: str = _ROW_HINT) -> NoReturn:
        line, line_start = self.text.count("\n", 0, position) + 1, self.text.rfind("\n", 0, position) + 1
        # a whole array may stand on one line: then the row is of interest, not the line's beginning
        begin = max(line_start, row_start)
        excerpt = self.text[begin : begin + _EXCERPT].split("\n")[0].rstrip()
        place = f"{self.path}:{line}:{position - line_start + 1}"
        raise DataError(f"{place}: {what}" + (f"\n    {printable(excerpt)}" if excerpt else ""), hint=hint)


@dataclass(frozen=True)
class _Item:
    """A decoded row and where in the text it starts."""

    value: Any
    start: int


def _decode(path: Path) -> str:
    try:
        return read_text(path).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before: bytes = error.object[: error.start]
        line, line_start = before.count(b"\n") + 1, before.rfind(b"\n") + 1
        column = len(before[line_start:].decode("utf-8").removeprefix("\ufeff")) + 1
        place = f"{path}:{line}:{column}"
        raise DataError(f"{place}: not UTF-8 text", hint="save the file as UTF-8, JSON array or JSON lines") from None


def _items(source: _Source) -> Iterator[_Item]:
    first = _skip_blank(source.text, 0)
    if first == len(source.text):
        source.fail(0, "the file is empty")
    return _array_items(source, first) if source.text[first] == "[" else _line_items(source)


def _array_items(source: _Source, opening: int) -> Iterator[_Item]:
    text = source.text
    position = _skip_blank(text, opening + 1)
    closed = text.startswith("]", position)
    while not closed:
        value, end = _decode_value(source, text, position, 0)
        yield _Item(value, position)
        start, position = position, _skip_blank(text, end)
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            source.fail(position, "expected ',' or ']' after a row", row_start=start)
        if not closed:
            position = _skip_blank(text, position + 1)
    rest = _skip_blank(text, position + 1)
    if rest < len(text):
        source.fail(rest, "text after the end of the array", row_start=rest)


def _line_items(source: _Source) -> Iterator[_Item]:
    offset = 0
    # not splitlines(): U+2028 and its like may stand inside a JSON string
    for line in source.text.split("\n"):
        start = _skip_blank(line, 0)
        if start < len(line):
            value, end = _decode_value(source, line, start, offset)
            rest = _skip_blank(line, end)
            if rest < len(line):
                source.fail(offset + rest, "text after the end of the row", row_start=offset)
            yield _Item(value, offset + start)
        offset += len(line) + 1


def _skip_blank(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BLANK:
        position += 1
    return position


def _decode_value(source: _Source, text: str, start: int, offset: int) -> tuple[Any, int]:
    row_start = offset + start
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        source.fail(offset + error.pos, f"not valid JSON: {error.msg}", row_start=row_start)
    except _RowError as error:
        source.fail(row_start, str(error), row_start=row_start)
    except RecursionError:
        source.fail(row_start, "nested too deeply", row_start=row_start)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _RowError(f"the key {key!r} is given twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise _RowError(f"{name} is not valid JSON")


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _RowError(f"a number of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_int=_bounded_int)


def _make_row(source: _Source, item: _Item, output_key: str | None, require_category: bool) -> Row:
    if not isinstance(item.value, dict):
        source.fail(item.start, f"expected a JSON object, got {_kind(item.value)}", row_start=item.start)
    output_names = (output_key,) if output_key else ("response", "output")
    row = Row(
        instruction=_text(source, item, ("instruction",), None),
        input=_text(source, item, ("context", "input"), ""),
        output=_text(source, item, output_names, None),
        category=_text(source, item, ("category",), None if require_category else ""),
    )
    if require_category and not row.category.strip():
        source.fail(item.start, "the field 'category' is empty", row_start=item.start)
    return row


def _text(source: _Source, item: _Item, names: tuple[str, ...], default: str | None) -> str:
    """The text under whichever of `names` is there; when several are, they must agree."""
    present = [name for name in names if name in item.value]
    for name in present:
        _check_text(source, item, name)
    if not present:
        if default is None:
            source.fail(item.start, f"the field {' or '.join(map(repr, names))} is missing", row_start=item.start)
        return default
    if len({item.value[name] for name in present}) > 1:
        source.fail(item.start, f"the fields {' and '.join(map(repr, present))} differ", row_start=item.start)
    return item.value[present[0]]


def _check_text(source: _Source, item: _Item, name: str) -> None:
    value = item.value[name]
    if not isinstance(value, str):
        source.fail(item.start, f"the field {name!r} must be text, got {_kind(value)}", row_start=item.start)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"the field {name!r} holds half a surrogate pair (\\u{ord(value[error.start]):04x})"
        source.fail(item.start, what, row_start=item.start)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
