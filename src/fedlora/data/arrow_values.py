"""Rows of Arrow's record batches: columns of text, and lists and structs of it.

Texts that many places of a column refer to are made once, and a row is given up as soon as it is larger than
allowed: a few bytes of a file can stand for any number of references.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from fedlora.data.fields import RowFields
from fedlora.data.raw_records import UTF8_HINT, Number, Record, RecordError, excerpt_of, shorten, too_large

if TYPE_CHECKING:
    import pyarrow

_PUNCTUATION = 6
"""What JSON has around a name and its text."""


def find_columns(schema: pyarrow.Schema, fields: RowFields) -> list[str]:
    """The columns that make a row; RecordError for one that is missing, given twice or of a type that is not read."""
    names = list(schema.names)
    fields.find_columns(names)
    again = next((name for name in names if name in fields.names and names.count(name) > 1), None)
    if again is not None:
        raise RecordError("", f"the column {shorten(again)} is given twice")
    columns = [name for name in names if name in fields.names]
    for name in columns:
        kind, nested = schema.field(name).type, fields.takes_lists(name)
        is_number = _is_integer(kind)
        if is_number and fields.rules.numbers_as_text:
            continue
        if not (is_text(kind) or str(kind) == "null" or fields.keeps(name) or (nested and _is_nested(kind))):
            what = f"the column {shorten(name)} must be text{' or a list' * nested}, got {str(kind)[:60]}"
            number_hint = "give --numbers_as_text to take whole numbers as text" if is_number else ""
            raise RecordError("", what, hint=number_hint or "store the column as strings; only text is taken")
    return columns


def is_text(kind: pyarrow.DataType) -> bool:
    """Whether values of a type are texts, or refer to texts of a dictionary."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)


def _is_integer(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind))


def _is_nested(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return types.is_struct(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def read_batch(batch: pyarrow.RecordBatch, before: int, limit: int) -> Iterator[Record | RecordError]:
    """The records of a batch that has `before` rows before it, none larger than `limit` bytes of text."""
    names = batch.schema.names
    columns = [_cells_of(column) for column in batch.columns]
    texts = [isinstance(column, _Texts) for column in columns]
    for index in range(batch.num_rows):
        place = f": row {before + index + 1}"
        room = _Room(limit)
        try:
            values = [column.value(index, room) for column in columns]
        except UnicodeDecodeError:
            yield RecordError(place, "not UTF-8 text", hint=UTF8_HINT)
            continue
        except _TooLargeError:
            yield too_large(place, limit)
            continue
        shown = (excerpt_of(value) for value, is_text in zip(values, texts, strict=True) if is_text and value)
        excerpt = excerpt_of(" | ".join(shown))
        if 4 * (limit - room.left) > limit and _num_bytes(values) > limit:
            yield too_large(place, limit, excerpt)
        else:
            yield Record(dict(zip(names, values, strict=True)), place, excerpt)


class _TooLargeError(Exception):
    """A row has more text than is allowed."""


class _Room:
    """The characters that a row may still have."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> None:
        """Count `size` characters; _TooLargeError once there is no room."""
        self.left -= size
        if self.left < 0:
            raise _TooLargeError


class _Cells(Protocol):
    """One column of a batch, or what its lists and structs consist of."""

    least: int
    """Characters that JSON takes for a value at least."""

    def value(self, row: int, room: _Room) -> Any:
        """The value of a row, None for a null; UnicodeDecodeError, _TooLargeError."""
        ...


def _cells_of(column: Any) -> _Cells:
    kind = column.type
    if is_text(kind):
        return _Texts(column)
    if hasattr(kind, "list_size") or hasattr(column, "offsets"):
        return _Lists(column)
    return _Structs(column) if hasattr(column, "field") else _Others(column)


class _Texts:
    least = 2

    def __init__(self, column: Any) -> None:
        is_dictionary = hasattr(column, "dictionary")
        self._values = column.dictionary if is_dictionary else column
        self._indices = column.indices.to_pylist() if is_dictionary else None
        self._made: dict[int, str | None] = {}

    def value(self, row: int, room: _Room) -> str | None:
        if self._indices is None:
            text = self._values[row].as_py()
        else:
            index = self._indices[row]
            if index is None:
                return None
            if index not in self._made:
                self._made[index] = self._values[index].as_py()
            text = self._made[index]
        if text is not None:
            room.take(len(text))
        return text


class _Lists:
    least = 2

    def __init__(self, column: Any) -> None:
        self._column = column
        self._has_nulls = column.null_count > 0
        self._size = getattr(column.type, "list_size", 0)
        self._offsets = None if self._size else column.offsets.to_pylist()
        self._elements = _cells_of(column.values)

    def value(self, row: int, room: _Room) -> list[Any] | None:
        if self._has_nulls and not self._column[row].is_valid:
            return None
        if self._offsets is None:
            start = (self._column.offset + row) * self._size
            end = start + self._size
        else:
            start, end = self._offsets[row], self._offsets[row + 1]
        room.take((end - start) * self._elements.least)
        return [self._elements.value(index, room) for index in range(start, end)]


class _Structs:
    def __init__(self, column: Any) -> None:
        self._column = column
        self._has_nulls = column.null_count > 0
        names = [column.type.field(place).name for place in range(column.type.num_fields)]
        self._fields = {name: _cells_of(column.field(place)) for place, name in enumerate(names)}
        self.least = 2 + sum(len(name) + _PUNCTUATION for name in names)

    def value(self, row: int, room: _Room) -> dict[str, Any] | None:
        if self._has_nulls and not self._column[row].is_valid:
            return None
        return {name: cells.value(row, room) for name, cells in self._fields.items()}


class _Others:
    """Values that are no text and so are no part of a row; whether they are null may matter."""

    least = 1

    def __init__(self, column: Any) -> None:
        self._column = column

    def value(self, row: int, room: _Room) -> Any:
        value = self._column[row].as_py()
        return Number(value) if type(value) is int else value


def _num_bytes(value: Any) -> int:
    """The bytes of all texts of a value."""
    if type(value) is str:
        return len(value.encode("utf-8"))
    if type(value) is dict:
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if type(value) is list else 0
