"""Where a Parquet file's pages lie and how large they are, read before anything is unpacked.

Footer and page headers are structs in Thrift's compact protocol. Arrow gives no access to a page's header and allocates
what it announces; its Python view of a damaged column ends the whole process; and what the footer says of a column's
size is a claim that no reader holds against the pages. So the few numbers that matter
are read here, and the pages themselves are stepped over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from fedlora.data.raw_records import RecordError

CODED = frozenset({2, 8})
"""The encodings of texts that stand once in the chunk's dictionary; Arrow can keep these apart."""

IN_PAGE = frozenset({0, 6})
"""The encodings of texts that stand in the page, each in full; of the second, lengths apart."""

_MAGIC = b"PAR1"
_MOST_FOOTER = 4 << 20
_MOST_STRUCTS = 1 << 19
_HEADERS = 1 << 12, 1 << 16, 1 << 20
_MOST_DEPTH = 12
# FileMetaData.row_groups, RowGroup.columns and num_rows, ColumnChunk.meta_data, and fields of ColumnMetaData
_ROW_GROUPS, _COLUMNS, _NUM_ROWS, _META_DATA = 4, 1, 3, 3
_PATH, _LENGTH, _DATA, _DICTIONARY = 3, 7, 9, 11
# fields of PageHeader, and where each kind of page keeps its encoding; all but dictionaries have _NUM_VALUES
_UNPACKED, _PACKED = 2, 3
_ENCODINGS = {5: 2, 7: 2, 8: 4}
_OF_DICTIONARY, _NUM_VALUES = 7, 1


class _Short(Exception):  # noqa: N818
    """The header is longer than the bytes at hand."""


class Chunk(NamedTuple):
    """The pages of one column, or of one leaf of a nested one, in one row group: `length` bytes of the file from
    `start` on; `path` has dots between the names that lead to it."""

    path: str
    start: int
    length: int
    num_rows: int


class Page(NamedTuple):
    """Bytes of a page (unpacked, or packed where that is more), its encoding, and how many values it announces."""

    size: int
    encoding: int
    num_values: int


def read_chunks(handle: BinaryIO) -> list[Chunk]:
    """The chunks of all columns; RecordError for what is no Parquet file."""
    size = handle.seek(0, os.SEEK_END)
    handle.seek(max(0, size - 8))
    end = handle.read(8)
    handle.seek(0)
    if size < 12 or end[4:] != _MAGIC or handle.read(4) != _MAGIC:
        raise _damaged("not a whole Parquet file")
    length = int.from_bytes(end[:4], "little")
    if length > min(size - 12, _MOST_FOOTER):
        raise _damaged("the Parquet footer is damaged or too large")
    handle.seek(size - 8 - length)
    try:
        footer = _Compact(handle.read(length)).struct(0)
        groups = footer.get(_ROW_GROUPS) or []
        return [
            _read_chunk(column[_META_DATA], group.get(_NUM_ROWS, 0)) for group in groups for column in group[_COLUMNS]
        ]
    except (_Short, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise _damaged("the Parquet footer is damaged or too large") from None


def _read_chunk(facts: dict[int, Any], num_rows: int) -> Chunk:
    path = facts[_PATH]
    start, length = facts[_DATA], facts[_LENGTH]
    # Arrow takes the dictionary's place for the beginning only where it comes first
    start = min(start, facts.get(_DICTIONARY) or start)
    if start < 4 or length <= 0:
        raise _damaged("a column of the Parquet file is damaged")
    return Chunk(".".join(name.decode("utf-8") for name in path), start, length, num_rows)


def find_pages(handle: BinaryIO, start: int, length: int) -> Iterator[Page]:
    """Every page from `start` on; RecordError."""
    position, end = start, start + length
    while position < end:
        header, size = _read_header(handle, position)
        unpacked, packed = header.get(_UNPACKED), header.get(_PACKED)
        if not isinstance(unpacked, int) or not isinstance(packed, int) or min(unpacked, packed) < 0:
            raise _damaged()
        kind = next((key for key in _ENCODINGS if isinstance(header.get(key), dict)), 0)
        facts = header[kind] if kind else {}
        num_values = 0 if kind == _OF_DICTIONARY else facts.get(_NUM_VALUES, 0)
        if not isinstance(num_values, int) or num_values < 0:
            raise _damaged()
        yield Page(max(unpacked, packed), facts.get(_ENCODINGS.get(kind, 0), 0), num_values)
        position += size + packed


def _read_header(handle: BinaryIO, position: int) -> tuple[dict[int, Any], int]:
    for size in _HEADERS:
        handle.seek(position)
        reader = _Compact(handle.read(size))
        try:
            return reader.struct(0), reader.at
        except _Short:
            continue
    raise _damaged()


class _Compact:
    """Reads values of Thrift's compact protocol."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._structs = 0
        self.at = 0

    def struct(self, depth: int) -> dict[int, Any]:
        """The fields of a struct by number."""
        self._structs += 1
        if depth > _MOST_DEPTH or self._structs > _MOST_STRUCTS:
            raise _damaged()
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == 12:
            return self.struct(depth + 1)
        if kind == 8:
            return self._bytes(self._varint())
        if kind in (3, 7):
            return self._bytes(1 if kind == 3 else 8)
        if kind == 9:
            return self._list(depth + 1)
        raise _damaged()  # Parquet has no sets and no maps there

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        count, kind = head >> 4, head & 15
        if count == 15:
            count = self._varint()
        if depth > _MOST_DEPTH or count > len(self._data):
            raise _damaged()
        # a truth value is a byte of its own in a list
        return [self._byte() if kind in (1, 2) else self._value(kind, depth) for _ in range(count)]

    def _byte(self) -> int:
        if self.at >= len(self._data):
            raise _Short
        self.at += 1
        return self._data[self.at - 1]

    def _bytes(self, count: int) -> bytes:
        if self.at + count > len(self._data):
            raise _Short
        self.at += count
        return self._data[self.at - count : self.at]

    def _varint(self) -> int:
        value, shift = 0, 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise _damaged()

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)


def _damaged(what: str = "a page of the Parquet file is damaged") -> RecordError:
    return RecordError("", what, hint="write the file again, or give the rows as JSON lines")
