"""Records from Parquet: columns of text, and lists and structs of it, read batch by batch.

Arrow would unpack whatever a page announces, so every page's size is read first (`parquet_pages`). Columns
of dictionaries stay such until a row is made: one long text that a million rows refer to is held once.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from fedlora.data.arrow_values import find_columns, read_batch
from fedlora.data.fields import RowFields
from fedlora.data.parquet_pages import CODED, IN_PAGE, Chunk, Page, find_pages, read_chunks
from fedlora.data.raw_records import Record, RecordError, shorten
from fedlora.plain_text import counted

_MOST_PAGE = 16 << 20
_MOST_VALUES, _MOST_PER_ROW = 1 << 22, 64
"""A list without end takes a few bytes of a page: values of a page, and of a row on average where that is more."""
_BATCH, _SMALL_BATCH = 1024, 4
_MOST_REPEATED = 64 << 20
"""Bytes that a batch may take where every row repeats a dictionary's longest entry."""
_BUFFER = 1 << 20


def read_parquet(handle: BinaryIO, fields: RowFields) -> Iterator[Record | RecordError]:
    """The records of a file; raises RecordError for what is no Parquet file, or whose columns make no row."""
    import pyarrow.parquet

    with sound_file("Parquet"):
        chunks = read_chunks(handle)
        whole = pyarrow.parquet.ParquetFile(handle)
        columns = find_columns(whole.schema_arrow, fields)
        most = max(_MOST_PAGE, 4 * fields.rules.max_record_bytes)
        pages = _find_pages_of(handle, chunks, columns, most)
        leaves = (whole.schema.column(place) for place in range(len(whole.schema)))
        texts = [leaf.path for leaf in leaves if leaf.path in pages and leaf.physical_type == "BYTE_ARRAY"]
        # of texts that stand in the pages themselves, Arrow would make one dictionary for the whole row group
        shared = [path for path in texts if pages[path].encodings <= CODED]
        file = pyarrow.parquet.ParquetFile(
            handle,
            metadata=whole.metadata,
            read_dictionary=shared,
            pre_buffer=False,
            buffer_size=_BUFFER,
        )
        number = 0
        batch_size = min((pages[path].batch_size for path in texts if path not in shared), default=_BATCH)
        # a batch of nested dictionaries cannot have those of two row groups
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(batch_size, [group], columns, use_threads=False):
                yield from read_batch(batch, number, fields.rules.max_record_bytes)
                number += batch.num_rows


@dataclass
class _Pages:
    """What the pages of one leaf hold: the encodings of its values, and the bytes of its largest dictionary."""

    encodings: set[int] = field(default_factory=set)
    dictionary: int = 0

    def note(self, page: Page) -> None:
        """Take in one page; one without values is a dictionary."""
        if page.num_values:
            self.encodings.add(page.encoding)
        else:
            self.dictionary = max(self.dictionary, page.size)

    @property
    def batch_size(self) -> int:
        """Rows whose texts fit into memory when each is made by itself: an entry of a dictionary may come in every row,
        and other encodings repeat a text in a few bytes without one."""
        if not self.encodings <= CODED | IN_PAGE:
            return _SMALL_BATCH
        return max(_SMALL_BATCH, min(_BATCH, _MOST_REPEATED // max(self.dictionary, 1)))


def _find_pages_of(handle: BinaryIO, chunks: list[Chunk], columns: list[str], most: int) -> dict[str, _Pages]:
    """The pages of every leaf of the columns, by the leaf's path; RecordError for a page of more than `most` bytes, or
    of more values than its row group can have use for."""
    found: dict[str, _Pages] = {}
    for path, start, length, num_rows in chunks:
        if not any(path == name or path.startswith(f"{name}.") for name in columns):
            continue
        used, values = found.setdefault(path, _Pages()), 0
        for page in find_pages(handle, start, length):
            values += page.num_values
            if page.size > most:
                what = f"a page of the column {shorten(path)} takes {page.size} bytes"
                hint = "write smaller pages, or raise --max_record_bytes (a page may be four times as large)"
                raise RecordError("", what, hint=hint)
            if page.num_values > _MOST_VALUES or values > max(_MOST_VALUES, _MOST_PER_ROW * num_rows):
                what = f"the column {shorten(path)} has {values} values in {counted(num_rows, 'row')}"
                raise RecordError("", what, hint="write smaller pages and row groups")
            used.note(page)
    return found


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
