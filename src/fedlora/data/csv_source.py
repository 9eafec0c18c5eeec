"""Records from CSV: a header row, commas, quotes as in RFC 4180.

Quoted fields may hold line ends, which are kept as they are. Everything is text, so a date or `007` cannot
turn into anything else. A record is named by the line where it begins.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

from fedlora.data.fields import RowFields
from fedlora.data.raw_records import Record, RecordError, excerpt_of, not_utf8, shorten, too_large
from fedlora.data.streams import BLOCK, ByteStream

_HEADER_HINT = "the first line names the columns, separated by commas: instruction,input,output,category"
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_SYNTAX = {
    "unexpected end of data": "a quoted field is never closed",
    "',' expected after": "text after the quote that closes a field",
    "new-line character": "a carriage return outside quotes that ends no line",
}


def read_csv(stream: ByteStream, fields: RowFields) -> Iterator[Record | RecordError]:
    """The records below the header; raises RecordError for the header and for broken quoting."""
    limit = fields.rules.max_record_bytes
    # the module's own limit is global and far below a record's; raising it takes nothing from anybody
    csv.field_size_limit(max(csv.field_size_limit(), limit))
    lines = _Lines(stream, limit)
    tables = _cut(lines, csv.reader(lines, strict=True))
    header = next(tables, None)
    if header is None:
        raise RecordError(":1:1", "the file is empty", hint=_HEADER_HINT)
    columns = _find_columns(header, lines, fields)
    for cells in tables:
        if lines.fault is not None:
            yield lines.fault
        elif len(cells) != len(header):
            what = f"{len(cells)} field{'s' * (len(cells) != 1)} where the header names {len(header)}"
            hint = (
                "quote a field that holds a comma" if len(cells) > len(header) else "write every field, empty ones too"
            )
            yield RecordError(lines.place, what, excerpt=lines.excerpt, hint=hint)
        else:
            yield Record({name: cells[index] for name, index in columns.items()}, lines.place, lines.excerpt)


def _cut(lines: _Lines, reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The records that are not blank; `lines` knows where the one in hand began."""
    while True:
        lines.begin_record()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = next((ours for theirs, ours in _SYNTAX.items() if str(error).startswith(theirs)), str(error))
            hint = "quote fields as in RFC 4180: a quote inside a quoted field is doubled"
            raise RecordError(lines.place, f"not valid CSV: {what}", excerpt=lines.excerpt, hint=hint) from None
        if len(cells) > 1 or any(cell.strip() for cell in cells):
            yield cells


def _find_columns(header: list[str], lines: _Lines, fields: RowFields) -> dict[str, int]:
    """Positions of the columns that make a row."""
    if lines.fault is not None:
        raise lines.fault
    again = next((name for index, name in enumerate(header) if name in header[:index]), None)
    if again is not None:
        raise RecordError(lines.place, f"the column {shorten(again)} is given twice", excerpt=lines.excerpt)
    try:
        fields.find_columns(header)
    except RecordError as error:
        other = next((name for each, name in _SEPARATORS.items() if len(header) == 1 and each in header[0]), "")
        hint = f"save the file with commas between the columns, not {other}" if other else error.hint
        raise RecordError(lines.place, str(error), excerpt=lines.excerpt, hint=hint) from None
    return {name: index for index, name in enumerate(header) if name in fields.names}


class _Lines:
    """The lines of the file as text, for as long as the record they belong to is not too large."""

    def __init__(self, stream: ByteStream, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._number = 0
        self.begin_record()

    def begin_record(self) -> None:
        """The next line is the first of a record."""
        self._size = 0
        self.place = f":{self._number + 1}:1"
        self.excerpt = ""
        self.fault: RecordError | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._stream.read_line(self._limit - self._size + 3)
        if not raw:
            raise StopIteration
        self._number += 1
        if self._size == 0:
            self.excerpt = excerpt_of(raw[:BLOCK].decode("utf-8", "replace"))
        self._size += len(raw)
        # two bytes for the end of the last line
        if self._size > self._limit + 2:
            raise too_large(self.place, self._limit, self.excerpt)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            # quotes and commas are ASCII: the record's end is found all the same
            column = len(raw[: error.start].decode("utf-8")) + 1
            self.fault = self.fault or not_utf8(self._number, column)
            return raw.decode("utf-8", "replace")
