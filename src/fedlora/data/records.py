"""Rows from files: JSON arrays and lines, CSV and Parquet, every error with its place.

The name decides the format, never the content. Rows are read one by one, and a record larger than
`max_record_bytes` is refused before it is in memory. Other fields are not used, and their names can be asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.console import say
from fedlora.data.arrow_source import read_arrow
from fedlora.data.csv_source import read_csv
from fedlora.data.fields import RowFields
from fedlora.data.json_source import read_json
from fedlora.data.parquet_source import read_parquet
from fedlora.data.raw_records import Record, RecordError
from fedlora.data.row_parts import Part, find_parts, part_line
from fedlora.data.streams import ByteStream, open_file
from fedlora.errors import StorageError
from fedlora.rows import STRICT, ReadRules, Row

if TYPE_CHECKING:
    from hashlib import _Hash

OnSkip = Callable[[str], None]
"""Called with the place and the reason of each row that is left out."""


def read_rows(
    path: Path,
    *,
    output_key: str | None = None,
    require_category: bool = False,
    needs_reply: bool = True,
    may_be_empty: bool = False,
    rules: ReadRules = STRICT,
    on_skip: OnSkip = say,
    digest: _Hash | None = None,
) -> list[Row]:
    """All rows of `path`, a file or a folder of files, in their order.

    At least one, unless `may_be_empty` lets an empty array or table pass.

    Takes every kind of row (`row_shapes`), the reply in `output_key` where it is given, and `category` ("" when it is
    absent, unless `require_category`); without `needs_reply` a file may hold questions alone. Raises UsageError when
    there is no such file, DataError `file:line:column: what` with the start of the record otherwise (`file: row <n>:
    what` for Parquet), StorageError when the disk fails. Positions count from 1; a fault inside a sound record is
    reported where the record starts.
    All bytes of the file are added to `digest` as they are read; of a folder, the names and hashes of its files.
    """
    return list(
        iter_rows(
            path,
            output_key=output_key,
            require_category=require_category,
            needs_reply=needs_reply,
            may_be_empty=may_be_empty,
            rules=rules,
            on_skip=on_skip,
            digest=digest,
        )
    )


def iter_rows(
    path: Path,
    *,
    output_key: str | None = None,
    require_category: bool = False,
    needs_reply: bool = True,
    may_be_empty: bool = False,
    rules: ReadRules = STRICT,
    on_skip: OnSkip = say,
    digest: _Hash | None = None,
    on_fields: Callable[[RowFields], None] = lambda fields: None,
) -> Iterator[Row]:
    """`read_rows` one row at a time, in memory that depends on the largest record alone; `on_fields` is called
    once, after the last row, with what was found out of the fields."""
    fields = RowFields(rules, output_key=output_key, require_category=require_category, needs_reply=needs_reply)
    num_rows = 0
    for part in find_parts(path):
        for row in _read_part(part, fields, on_skip, digest, of_folder=part.path != path):
            num_rows += 1
            yield row
    if not num_rows and not may_be_empty:
        raise RecordError("" if path.is_dir() else ":1:1", "holds no rows").make_error(path)
    if num_rows:
        try:
            fields.check_columns()
        except RecordError as error:
            raise error.make_error(path) from None
    on_fields(fields)


def _read_part(
    part: Part, fields: RowFields, on_skip: OnSkip, digest: _Hash | None, *, of_folder: bool
) -> Iterator[Row]:
    """The rows of one file; of a folder's part, its name and hash are added to `digest` once it is read."""
    fields.begin_file()
    skipping = _Skipping(part.path, fields.rules.skip_bad, on_skip)
    own = hashlib.sha256() if of_folder and digest is not None else digest
    try:
        for record in _records(part, fields, own):
            row = skipping.take(record, fields)
            if row is not None:
                yield row
    except RecordError as error:
        raise skipping.explain(error) from None
    except OSError as error:
        what = f"{part.path}: {error.strerror or error}"
        raise StorageError(what, hint="check the disk and the permissions") from error
    if digest is not None and own is not None and of_folder:
        digest.update(part_line(part.path.name, own.hexdigest()))


def _records(part: Part, fields: RowFields, digest: _Hash | None) -> Iterator[Record | RecordError]:
    with open_file(part.path, digest) as file:
        if part.kind == "parquet":
            yield from read_parquet(file, fields)
        elif part.kind == "arrow":
            yield from read_arrow(file, fields)
        else:
            stream = ByteStream(file, part.packing, part.path.stat().st_size)
            is_table = part.kind == "csv"
            yield from read_csv(stream, fields) if is_table else read_json(stream, fields.rules.max_record_bytes)


class _Skipping:
    """Counts the bad rows of a file that are left out, and says which."""

    def __init__(self, path: Path, limit: int, on_skip: OnSkip) -> None:
        self.path = path
        self.limit = limit
        self.on_skip = on_skip
        self.count = 0
        self._last: RecordError | None = None

    def take(self, record: Record | RecordError, fields: RowFields) -> Row | None:
        """The row, or None for one that is left out; RecordError once there are too many of these."""
        if isinstance(record, Record):
            try:
                return fields.make_row(record)
            except RecordError as error:
                fault = error
        else:
            fault = record
        if self.count == self.limit:
            self._last = fault
            raise fault
        self.count += 1
        place = f"{self.path}{fault.place}"
        self.on_skip(f"{place}: {fault}; the row is left out ({self.count} of at most {self.limit})")
        return None

    def explain(self, error: RecordError) -> Exception:
        """The error with which reading ends."""
        note = ""
        if self.limit and error is self._last:
            note = f" (and {self.count} bad rows before it; skip_bad={self.limit} allows no more)"
        elif self.limit and error.place:
            note = " (skip_bad cannot leave this out: it concerns all rows that follow)"
        return error.make_error(self.path, note)
