"""Records from JSON lines and JSON arrays, decoded one by one.

The first character that is not blank decides: `[` opens an array, anything else is one object per line. An
array is decoded from a window that slides over the file, so its length does not matter. What could change meaning
unseen (duplicate keys, NaN) makes its record unusable.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from fedlora.data.json_values import JsonDecoder
from fedlora.data.raw_records import Record, RecordError, excerpt_of, not_utf8, too_large
from fedlora.data.streams import BLOCK, ByteStream

_BLANKS = re.compile(r"[ \t\r\n]*")
_STRUCTURE = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
"""A string, whole or cut off by the end of the window, or a bracket."""
_LONGEST_TOKEN = 16
"""A syntax error this close to the end of the window may be no more than a token that is cut in two."""


def read_json(stream: ByteStream, max_record_bytes: int) -> Iterator[Record | RecordError]:
    """The records of a file in its order; raises RecordError where the rest cannot be divided into records."""
    first, line, column = stream.skip_blank()
    if not first:
        raise RecordError(":1:1", "the file is empty")
    if first == b"[":
        return _ArrayWindow(stream, max_record_bytes, line, column).records()
    return _line_records(stream, max_record_bytes, line, column)


def _line_records(stream: ByteStream, limit: int, line: int, column: int) -> Iterator[Record | RecordError]:
    decoder = JsonDecoder()
    longest = limit + 2  # with the line's end
    while raw := stream.read_line(longest):
        record = _read_line(raw, decoder, limit, line, column)
        if record is not None:
            yield record
        while len(raw) == longest and not raw.endswith(b"\n"):
            raw = stream.read_line(longest)
        line, column = line + 1, 1


def _read_line(raw: bytes, decoder: JsonDecoder, limit: int, line: int, column: int) -> Record | RecordError | None:
    """The record of one line, None for a blank one; `column` is where the line's first byte stands."""
    raw = raw.removesuffix(b"\n").removesuffix(b"\r")
    if len(raw) > limit:
        return too_large(f":{line}:{column}", limit, excerpt_of(raw[:BLOCK].decode("utf-8", "replace")))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return not_utf8(line, column + len(raw[: error.start].decode("utf-8")))
    start = _skip_blank(text, 0)
    if start == len(text):
        return None
    place, excerpt = f":{line}:{column + start}", excerpt_of(text, start)
    try:
        value, end = decoder.decode(text, start)
    except json.JSONDecodeError as error:
        return RecordError(f":{line}:{column + error.pos}", f"not valid JSON: {error.msg}", excerpt=excerpt)
    except RecursionError:
        return RecordError(place, "nested too deeply", excerpt=excerpt)
    if decoder.fault:
        return RecordError(place, decoder.fault, excerpt=excerpt)
    rest = _skip_blank(text, end)
    if rest < len(text):
        return RecordError(f":{line}:{column + rest}", "text after the end of the row", excerpt=excerpt)
    return Record(value, place, excerpt)


class _ArrayWindow:
    """The piece of an array that is being decoded: from the beginning of a row to as far as was read."""

    def __init__(self, stream: ByteStream, limit: int, line: int, column: int) -> None:
        self._stream = stream
        self._limit = limit
        self._decoder = JsonDecoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._broken = False
        self._text = ""
        self._at = 0
        # beginning of the row in hand, and where it stands in the file
        self._row, self._line, self._column = 0, line, column

    def records(self) -> Iterator[Record | RecordError]:
        """All records between the brackets; nothing may follow the closing one."""
        self._fill()
        self._at = 1
        closed = self._peek() == "]"
        while not closed:
            self._begin_row()
            yield self._decode_row()
            mark = self._peek()
            closed = mark == "]"
            if not closed and mark != ",":
                raise self._refuse(self._at, "expected ',' or ']' after a row")
            if not closed:
                self._at += 1
                self._peek()
        self._at += 1
        if self._peek():
            self._begin_row()
            raise self._refuse(self._at, "text after the end of the array")

    def _decode_row(self) -> Record | RecordError:
        while True:
            try:
                value, end = self._decoder.decode(self._text, self._row)
                # what ends with the window may be a number that goes on
                if end < len(self._text) or not self._fill():
                    break
            except RecursionError:
                raise self._refuse(self._row, "nested too deeply") from None
            except json.JSONDecodeError as error:
                if not self._goes_on(error):
                    raise self._refuse(error.pos, f"not valid JSON: {error.msg}") from None
        self._at = end
        place, excerpt = f":{self._line}:{self._column}", excerpt_of(self._text, self._row)
        if self._is_too_large(end):
            return too_large(place, self._limit, excerpt)
        if self._decoder.fault:
            return RecordError(place, self._decoder.fault, excerpt=excerpt)
        return Record(value, place, excerpt)

    def _goes_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the row was only cut by the end of the window; if so there is more of it now."""
        if not error.msg.startswith("Unterminated") and error.pos < len(self._text) - _LONGEST_TOKEN:
            return False
        grown = False
        # decoded again only when it is whole: objects take many times the room of their text
        while not self._is_closed():
            if self._is_too_large(len(self._text)):
                raise too_large(f":{self._line}:{self._column}", self._limit, excerpt_of(self._text, self._row))
            # as much again, so that a long row is searched a few times only
            if not self._fill(len(self._text) - self._row):
                break
            grown = True
        return grown

    def _is_closed(self) -> bool:
        """Whether the window holds the bracket that closes the row, where the row is an object or an array."""
        depth = 0
        for token in _STRUCTURE.finditer(self._text, self._row):
            mark = self._text[token.start()]
            depth += (mark in "{[") - (mark in "]}")
            if depth <= 0 and mark != '"':
                return True
        return False

    def _is_too_large(self, end: int) -> bool:
        size = end - self._row
        # a character has four bytes at most
        return size * 4 > self._limit and len(self._text[self._row : end].encode("utf-8")) > self._limit

    def _peek(self) -> str:
        """Go to the next character that is not blank and return it; empty at the end of the file."""
        while True:
            self._at = _skip_blank(self._text, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if self._at - self._row > self._limit:
                self._begin_row()  # blanks without end are nothing to keep
            if not self._fill():
                return ""

    def _begin_row(self) -> None:
        self._line, self._column = self._locate(self._at)
        self._row = self._at

    def _locate(self, position: int) -> tuple[int, int]:
        """Line and column of a position that is not before the row."""
        last = self._text.rfind("\n", self._row, position)
        if last < 0:
            return self._line, self._column + position - self._row
        return self._line + self._text.count("\n", self._row, position), position - last

    def _fill(self, size: int = BLOCK) -> bool:
        """Read on and forget what is before the row; False when the file has ended."""
        if self._broken:
            raise not_utf8(*self._locate(len(self._text)))
        raw = self._stream.read(max(size, BLOCK))
        try:
            new = self._utf8.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            # what stands before the fault is read first
            self._broken = True
            new = error.object[: error.start].decode("utf-8")
        if not raw and not self._broken:
            return False
        self._text = self._text[self._row :] + new
        self._at -= self._row
        self._row = 0
        return True

    def _refuse(self, position: int, what: str) -> RecordError:
        line, column = self._locate(position)
        last = self._text.rfind("\n", 0, position) + 1
        # a whole array may stand on one line: then the row is of interest, not the line's beginning
        excerpt = excerpt_of(self._text, max(last, self._row))
        return RecordError(f":{line}:{column}", what, excerpt=excerpt)


def _skip_blank(text: str, start: int) -> int:
    blank = _BLANKS.match(text, start)
    return blank.end() if blank else start
