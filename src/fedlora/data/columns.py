"""The names that a file has for the fields of a row, where `--columns` names them.

A name that a record does not have as it is written leads into it: dots go into objects, numbers into lists, and a
text on the way is JSON, as in a cell of a table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fedlora.data.field_text import FieldText, kind_of, refuse
from fedlora.data.raw_records import RecordError, shorten
from fedlora.nearest import suggest
from fedlora.row_shapes import LISTS, RowShape

NEEDED_HINT = "every row needs the column that divides the rows; --skip_bad leaves out a few"

_MISSING = object()
_MOST_PATHS = 200


class ColumnMap:
    """From the names of a file to those of a row; without `columns` they are the same."""

    def __init__(self, columns: Mapping[str, str], texts: FieldText) -> None:
        self._columns = columns
        self._texts = texts
        self._unseen = dict(columns)
        self._own: dict[RowShape, frozenset[str]] = {}
        self._shown: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._columns)

    def label(self, name: str) -> str:
        """What the file calls a field of a row."""
        return self._columns.get(name, name)

    def labels(self, group: Collection[str]) -> list[str]:
        """What the file may call a field that has several names."""
        return [self._columns[name] for name in group if name in self._columns] or list(group)

    def own_names(self, shape: RowShape) -> frozenset[str]:
        """The fields that are read under their own names: no other name of theirs is mapped, and no other field is
        read from them."""
        if shape not in self._own:
            self._own[shape] = self._find_own(shape)
        return self._own[shape]

    def _find_own(self, shape: RowShape) -> frozenset[str]:
        mapped = {name for group in shape.groups for name in group if not self._columns.keys().isdisjoint(group)}
        return shape.names - mapped - set(self._columns.values())

    def used_names(self, shape: RowShape) -> frozenset[str]:
        """The names of a file that rows of a shape are read from."""
        heads = {name.split(".")[0] for name in self._columns.values()}
        return self.own_names(shape) | heads | set(self._columns.values())

    def rename(self, fields: dict[str, Any], shape: RowShape) -> dict[str, Any]:
        """The record under the names of a row, without what is not used; RecordError for text that is no JSON."""
        if not self._columns:
            return fields
        own = self.own_names(shape)
        renamed = {name: value for name, value in fields.items() if name in own}
        for name, column in self._columns.items():
            value = _find(fields, column, self._texts)
            if value is not _MISSING:
                renamed[name] = value
                self._unseen.pop(name, None)
        if self._unseen and not self._shown:
            self._shown = tuple(_paths(fields))
        return renamed

    def find_in(self, columns: Collection[str], shape: RowShape) -> set[str]:
        """The fields that a table with these columns has; RecordError where a mapped one is missing."""
        for column in self._columns.values():
            if column not in columns and column.split(".")[0] not in columns:
                raise self._missing(column, columns)
        return {*self._columns, *(self.own_names(shape) & set(columns))}

    def suggest(self, group: Collection[str]) -> str:
        """The name that was most likely meant where a record does not have the column of a field, or nothing."""
        return next((suggest(self._columns[name], self._shown) for name in group if name in self._columns), "")

    def takes_lists(self, column: str) -> bool:
        """Whether a column of a table may hold lists, or values that a name with dots leads into."""
        fields = [name for name, there in self._columns.items() if there == column] or [column]
        deep = any(there != column and there.split(".")[0] == column for there in self._columns.values())
        return deep or not LISTS.isdisjoint(fields)

    def check_seen(self) -> None:
        """RecordError where no record had a column that was named."""
        for column in self._unseen.values():
            raise self._missing(column, self._shown)

    def _missing(self, column: str, known: Collection[str]) -> RecordError:
        near = suggest(column, known)
        names = ", ".join(map(shorten, known))[:120]
        return RecordError("", f"no row has the column {shorten(column)}", hint=near or f"the columns are {names}")


class KeptColumns:
    """The columns that `Row.more` holds as text, whatever else a row is."""

    def __init__(self, columns: Collection[str], texts: FieldText) -> None:
        self._columns = columns
        self._texts = texts
        self.names = frozenset(name for column in columns for name in (column, column.split(".")[0]))
        """The names of a file that they are read from."""

    def check(self, columns: Collection[str]) -> None:
        """RecordError for a table without one of the columns."""
        for column in self._columns:
            if column not in columns and column.split(".")[0] not in columns:
                raise refuse(f"the column {column!r} is missing", suggest(column, columns) or NEEDED_HINT)

    def read(self, fields: Mapping[str, Any]) -> dict[str, str]:
        """The columns of a record; RecordError for one that is missing, empty, or neither text nor a number."""
        return {column: self._read(fields, column) for column in self._columns}

    def _read(self, fields: Mapping[str, Any], column: str) -> str:
        value = _find(fields, column, self._texts)
        if value is _MISSING or value is None or value == "":
            near = suggest(column, tuple(_paths(fields))) if value is _MISSING else ""
            raise refuse(f"the field {column!r} is {'missing' if value is _MISSING else 'empty'}", near or NEEDED_HINT)
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int | float):
            return str(value)
        if not isinstance(value, str):
            raise refuse(f"the field {column!r} must be text or a number, got {kind_of(value)}", NEEDED_HINT)
        return self._texts.clean(str(value), column)


def _find(fields: Mapping[str, Any], column: str, texts: FieldText) -> Any:
    """The value of a column under its name as it is written, else where its name leads; _MISSING where it is not."""
    value = fields.get(column, _MISSING)
    return _follow(fields, column, texts) if value is _MISSING else value


def _follow(value: Any, column: str, texts: FieldText) -> Any:
    called = ""
    for step in column.split("."):
        if called:
            value = texts.decode(value, called)
        called = f"{called}.{step}" if called else step
        if isinstance(value, Mapping):
            value = value.get(step, _MISSING)
        elif type(value) is list and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return _MISSING
        if value is None or value is _MISSING:
            return value
    return value


def _paths(value: Any, called: str = "", depth: int = 0) -> Iterator[str]:
    """The names that lead to the values of a record."""
    steps = value.items() if isinstance(value, Mapping) else enumerate(value[:1]) if type(value) is list else ()
    for count, (step, inner) in enumerate(steps):
        if depth > 3 or count > _MOST_PATHS:
            return
        name = f"{called}.{step}" if called else str(step)
        yield name
        yield from _paths(inner, name, depth + 1)
