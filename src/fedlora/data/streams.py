"""The bytes of a file of rows, unpacked where it is packed, and the format that its name says.

Nothing here holds more than a block: gzip data that unpacks without end meets a limit, because a few
kilobytes can stand for gigabytes. Faults of the packing are data errors, faults of the disk are not.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from fedlora.data.raw_records import RecordError
from fedlora.errors import DataError, UsageError

if TYPE_CHECKING:
    from hashlib import _Hash

BLOCK = 1 << 16

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_READABLE = "rows are read from .json, .jsonl and .csv, each also as .gz, and from .parquet"
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
_MOST_UNPACKED, _MOST_RATIO = 256 << 20, 200


def split_name(path: Path) -> tuple[str, str, bool] | None:
    """Stem, format (json, csv or parquet) and whether it is packed; None for a name that says no such format."""
    name, packed = path.name, path.name.lower().endswith(".gz")
    plain = Path(name[:-3] if packed else name)
    kind = _FORMATS.get(plain.suffix.lower())
    return None if kind is None or (packed and kind == "parquet") else (plain.stem, kind, packed)


def find_format(path: Path) -> tuple[str, bool]:
    """Format and whether it is packed, by the name alone; a name without a suffix is JSON.

    Raises UsageError when there is no such file, DataError when its suffix is no format's.
    """
    if path.is_dir():
        raise UsageError(f"{path}: a folder, and one file of rows is read here", hint="name a file in it")
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="check the path, or run the stage that writes it")
    named = split_name(path)
    if named is not None:
        return named[1:]
    if path.suffix:
        raise DataError(f"{path}: rows are not read from a {path.suffix} file of this name", hint=_READABLE)
    return "json", False


@contextlib.contextmanager
def open_file(path: Path, digest: _Hash | None = None) -> Iterator[BinaryIO]:
    """A file's bytes; with a `digest` all of them are added to it, those too that the block leaves unread."""
    if digest is None:
        with path.open("rb") as file:
            yield file
        return
    with _HashedFile(path, digest) as raw, io.BufferedReader(raw) as file:
        yield file
        raw.finish()


class _HashedFile(io.FileIO):
    """A file whose bytes are added to a digest in order, each once however often a reader goes back."""

    def __init__(self, path: Path, digest: _Hash) -> None:
        super().__init__(path, "rb")
        self._digest = digest
        self._hashed = 0

    def readinto(self, buffer: Any) -> int:
        start = self.tell()
        count = super().readinto(buffer) or 0
        # what lies ahead of a gap waits for `finish`
        if start <= self._hashed < start + count:
            self._digest.update(memoryview(buffer)[self._hashed - start : count])
            self._hashed = start + count
        return count

    def finish(self) -> None:
        """Read on from the last byte that was hashed to the end of the file."""
        block = bytearray(BLOCK)
        self.seek(self._hashed)
        while self.readinto(block):
            pass


class ByteStream:
    """Text after its byte order mark, if it has one, by blocks or lines; unpacked when it is packed (`packed_size`
    bytes); RecordError for bad gzip data."""

    def __init__(self, file: BinaryIO, packed_size: int | None) -> None:
        self._packed_size = packed_size
        self._read = 0
        self._handle = file if packed_size is None else cast(BinaryIO, gzip.GzipFile(fileobj=file))
        self._rewind(len(_BOM) if self.read(len(_BOM)) == _BOM else 0)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end."""
        return self._count(self._take(size, line=False))

    def read_line(self, limit: int) -> bytes:
        """A line with its end, cut off after `limit` bytes; empty at the end."""
        return self._count(self._take(limit, line=True))

    def skip_blank(self) -> tuple[bytes, int, int]:
        """Go to the first byte that is not blank: the byte (empty at the end), its line and its column."""
        line, column, position = 1, 1, self._handle.tell()
        while block := self.read(BLOCK):
            rest = block.lstrip(_BLANK)
            blank = block[: len(block) - len(rest)]
            line += blank.count(b"\n")
            column = len(blank) - blank.rfind(b"\n") if b"\n" in blank else column + len(blank)
            position += len(blank)
            if rest:
                self._rewind(position)
                return rest[:1], line, column
        return b"", line, column

    def _rewind(self, position: int) -> None:
        self._handle.seek(position)

    def _take(self, size: int, *, line: bool) -> bytes:
        try:
            return self._handle.readline(size) if line else self._handle.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            what = "the gzip data is cut short" if isinstance(error, EOFError) else "not sound gzip data"
            raise RecordError("", what, hint="pack the file again, or give it unpacked") from None

    def _count(self, block: bytes) -> bytes:
        self._read += len(block)
        if self._packed_size is not None and self._read > max(_MOST_UNPACKED, _MOST_RATIO * self._packed_size):
            what = f"unpacks to more than {_MOST_RATIO} times its size"
            raise RecordError("", what, hint="unpack it yourself if it is meant to be so")
        return block
