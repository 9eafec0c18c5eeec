"""Records from Parquet: text columns alone, read batch by batch.

Arrow would unpack whatever a page announces, so every page's size is read first (`parquet_pages`). Columns
stay dictionaries until a row is made: one long text that a million rows refer to is held once.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from fedlora.data.fields import RowFields
from fedlora.data.parquet_pages import DELTA_LENGTH, SHARED, Chunk, find_pages, read_chunks
from fedlora.data.raw_records import UTF8_HINT, Record, RecordError, excerpt_of, shorten, too_large

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_MOST_PAGE = 16 << 20
_BATCH, _SMALL_BATCH = 1024, 4
_BUFFER = 1 << 20


def read_parquet(handle: BinaryIO, fields: RowFields) -> Iterator[Record | RecordError]:
    """The records of a file; raises RecordError for what is no Parquet file, or holds other columns than text."""
    import pyarrow
    import pyarrow.parquet

    with sound_file("Parquet"):
        chunks = read_chunks(handle)
        whole = pyarrow.parquet.ParquetFile(handle)
        columns = find_columns(whole.schema_arrow, fields)
        most = max(_MOST_PAGE, 4 * fields.rules.max_record_bytes)
        encodings = _find_encodings(handle, chunks, columns, most)
        shared = [name for name in columns if encodings[name] <= SHARED]
        bounded = all(name in shared or encodings[name] == {DELTA_LENGTH} for name in columns)
        file = pyarrow.parquet.ParquetFile(
            handle,
            metadata=whole.metadata,
            read_dictionary=shared,
            pre_buffer=False,
            buffer_size=_BUFFER,
        )
        number = 0
        # other encodings repeat a text in a few bytes, and a batch of them holds it every time
        batch_size = _BATCH if bounded else _SMALL_BATCH
        for batch in file.iter_batches(batch_size=batch_size, columns=columns, use_threads=False):
            yield from read_batch(batch, number, fields.rules.max_record_bytes)
            number += batch.num_rows


def find_columns(schema: pyarrow.Schema, fields: RowFields) -> list[str]:
    """The columns that make a row; RecordError for one that is missing, given twice or no text."""
    names = list(schema.names)
    fields.find_columns(names)
    again = next((name for name in names if name in fields.names and names.count(name) > 1), None)
    if again is not None:
        raise RecordError("", f"the column {shorten(again)} is given twice")
    columns = [name for name in names if name in fields.names]
    for name in columns:
        kind = schema.field(name).type
        if not _is_text(kind):
            hint = "store the column as strings; only text is taken"
            raise RecordError("", f"the column {shorten(name)} must be text, got {str(kind)[:60]}", hint=hint)
    return columns


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(value) or types.is_large_string(value)


def _find_encodings(handle: BinaryIO, chunks: list[Chunk], columns: list[str], most: int) -> dict[str, set[int]]:
    """The encodings of every column's pages; RecordError for a page of more than `most` bytes."""
    found: dict[str, set[int]] = {name: set() for name in columns}
    for name, start, length in chunks:
        if name not in found:
            continue
        for size, encoding in find_pages(handle, start, length):
            if size > most:
                what = f"a page of the column {shorten(name)} takes {size} bytes"
                hint = "write smaller pages, or raise --max_record_bytes (a page may be four times as large)"
                raise RecordError("", what, hint=hint)
            found[name].add(encoding)
    return found


def read_batch(batch: pyarrow.RecordBatch, before: int, limit: int) -> Iterator[Record | RecordError]:
    """The records of a batch of text columns that has `before` rows before it."""
    names = batch.schema.names
    cells = [_Cells(column) for column in batch.columns]
    for index in range(batch.num_rows):
        place = f": row {before + index + 1}"
        try:
            values = [column.text(index) for column in cells]
        except UnicodeDecodeError:
            yield RecordError(place, "not UTF-8 text", hint=UTF8_HINT)
            continue
        excerpt = " | ".join(excerpt_of(value) for value in values if value)
        if sum(4 * len(value) for value in values if value) > limit and _num_bytes(values) > limit:
            yield too_large(place, limit, excerpt_of(excerpt))
        else:
            yield Record(dict(zip(names, values, strict=True)), place, excerpt_of(excerpt))


class _Cells:
    """One column of a batch; texts that rows share are made once."""

    def __init__(self, column: Any) -> None:
        is_dictionary = hasattr(column, "dictionary")
        self._values = column.dictionary if is_dictionary else column
        self._indices = column.indices.to_pylist() if is_dictionary else range(len(column))
        self._made: dict[int, str | None] = {}

    def text(self, row: int) -> str | None:
        """The text of a row, None for a null; UnicodeDecodeError."""
        index = self._indices[row]
        if index is None:
            return None
        if index not in self._made:
            self._made[index] = self._values[index].as_py()
        return self._made[index]


def _num_bytes(values: list[str | None]) -> int:
    return sum(len(value.encode("utf-8")) for value in values if value)


@contextlib.contextmanager
def sound_file(kind: str) -> Iterator[None]:
    """What Arrow raises on a damaged file of this kind, as a RecordError; errors of the disk pass."""
    import pyarrow

    try:
        yield
    except RecordError:
        raise
    except (pyarrow.ArrowException, ValueError, LookupError, OverflowError, MemoryError, TypeError, OSError) as error:
        # a damaged file is an input error too: Arrow's have no number, and a place outside the file is EINVAL
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        hint = "write the file again, or give the rows as JSON lines"
        raise RecordError("", f"not a sound {kind} file ({reason})", hint=hint) from None
