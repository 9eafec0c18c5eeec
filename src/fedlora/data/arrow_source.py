"""Records from Arrow's stream format, as `datasets` saves it: one record batch in memory at a time.

A message states how large it is, and Arrow believes it. So the headers of all messages are read first, and the
buffers of a batch are checked before any of its texts is looked at.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from fedlora.data.arrow_values import find_columns, read_batch
from fedlora.data.fields import RowFields
from fedlora.data.parquet_source import sound_file
from fedlora.data.raw_records import Record, RecordError

_MOST_HEADER = 16 << 20
_CONTINUES = b"\xff\xff\xff\xff"
# places in the tables of Arrow's Message.fbs
_KIND, _HEADER, _BODY_LENGTH = 1, 2, 3
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_DATA, _COMPRESSION = 1, 3


def read_arrow(handle: BinaryIO, fields: RowFields) -> Iterator[Record | RecordError]:
    """The records of a stream; raises RecordError for what is no sound stream, or whose columns make no row."""
    import pyarrow
    import pyarrow.ipc

    with sound_file("Arrow"):
        _check_messages(handle)
        handle.seek(0)
        with pyarrow.ipc.open_stream(pyarrow.PythonFile(handle, "r")) as stream:
            columns = find_columns(stream.schema, fields)
            number = 0
            for batch in stream:
                chosen = batch.select(columns)
                chosen.validate(full=True)
                yield from read_batch(chosen, number, fields.rules.max_record_bytes)
                number += batch.num_rows


def _check_messages(handle: BinaryIO) -> None:
    """RecordError for a message that is longer than the file, or whose buffers are compressed."""
    size = handle.seek(0, os.SEEK_END)
    position = 0
    while position < size:
        handle.seek(position)
        start = handle.read(8)
        length = int.from_bytes(start[4:], "little")
        if start[:4] != _CONTINUES or len(start) < 8:
            raise _damaged("not a stream of Arrow messages")
        if not length:
            return
        if length > min(_MOST_HEADER, size - position):
            raise _damaged("a message is cut short")
        body, compressed = _read_header(handle.read(length))
        position += 8 + length + body
        if compressed:
            raise _damaged("its record batches are compressed")
        if body < 0 or position > size:
            raise _damaged("a record batch is cut short")


def _read_header(header: bytes) -> tuple[int, bool]:
    """The length of a message's body, and whether its buffers are compressed."""
    try:
        (message,) = struct.unpack_from("<I", header)
        at = _field(header, message, _BODY_LENGTH)
        body = struct.unpack_from("<q", header, at)[0] if at else 0
        at = _field(header, message, _KIND)
        kind, table = header[at] if at else 0, _table(header, message, _HEADER)
        if kind == _DICTIONARY_BATCH:
            table = _table(header, table, _DATA)
        return body, kind in (_DICTIONARY_BATCH, _RECORD_BATCH) and _field(header, table, _COMPRESSION) > 0
    except (struct.error, IndexError):
        raise _damaged("the header of a message is damaged") from None


def _field(header: bytes, table: int, number: int) -> int:
    """Where a table of a flatbuffer has a field, 0 where it is left out."""
    layout = table - struct.unpack_from("<i", header, table)[0]
    entry = 4 + 2 * number
    if entry >= struct.unpack_from("<H", header, layout)[0]:
        return 0
    offset = struct.unpack_from("<H", header, layout + entry)[0]
    return table + offset if offset else 0


def _table(header: bytes, table: int, number: int) -> int:
    """Where the table begins to which a field refers."""
    at = _field(header, table, number)
    return at + struct.unpack_from("<I", header, at)[0]


def _damaged(what: str) -> RecordError:
    return RecordError("", what, hint="save the data set again with save_to_disk, or write its rows as JSON lines")
