"""The bytes of a file of rows, unpacked where it is packed, and the format that its name says.

Nothing here holds more than a block: packed data that unpacks without end meets a limit, because a few
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
_PACKINGS = {".gz": "gzip", ".zst": "zstd"}
READABLE = "rows are read from .json, .jsonl and .csv, each also as .gz or .zst, and from .parquet"
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
_MOST_UNPACKED, _MOST_RATIO = 256 << 20, 200


def split_name(path: Path) -> tuple[str, str, str] | None:
    """Stem, format (json, csv or parquet) and packing (gzip, zstd or none); None for a name that says no format."""
    packing = _PACKINGS.get(path.suffix.lower(), "")
    plain = Path(path.stem if packing else path.name)
    kind = _FORMATS.get(plain.suffix.lower())
    return None if kind is None or (packing and kind == "parquet") else (plain.stem, kind, packing)


def find_format(path: Path) -> tuple[str, str]:
    """Format and packing of a file, by the name alone; a name without a suffix is JSON.

    Raises UsageError when there is no such file, DataError when its suffix is no format's.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="check the path, or run the stage that writes it")
    named = split_name(path)
    if named is not None:
        return named[1:]
    if path.suffix:
        raise DataError(f"{path}: rows are not read from a {path.suffix} file of this name", hint=READABLE)
    return "json", ""


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
    """Text after its byte order mark, if it has one, by blocks or lines; RecordError for bad packed data.

    A packed stream is read forwards only: bytes that were looked at wait in memory until they are taken.
    """

    def __init__(self, file: BinaryIO, packing: str = "", packed_size: int = 0) -> None:
        self._packing = packing
        self._most = max(_MOST_UNPACKED, _MOST_RATIO * packed_size) if packing else 0
        self._unpacked = 0
        self._handle = _unpacked(file, packing)
        self._ahead = self._fetch(len(_BOM), line=False).removeprefix(_BOM)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end."""
        return self._take(size, line=False)

    def read_line(self, limit: int) -> bytes:
        """A line with its end, cut off after `limit` bytes; empty at the end."""
        return self._take(limit, line=True)

    def skip_blank(self) -> tuple[bytes, int, int]:
        """Go to the first byte that is not blank: the byte (empty at the end), its line and its column."""
        line, column = 1, 1
        while block := self.read(BLOCK):
            rest = block.lstrip(_BLANK)
            blank = block[: len(block) - len(rest)]
            line += blank.count(b"\n")
            column = len(blank) - blank.rfind(b"\n") if b"\n" in blank else column + len(blank)
            if rest:
                self._ahead = rest + self._ahead
                return rest[:1], line, column
        return b"", line, column

    def _take(self, size: int, *, line: bool) -> bytes:
        if not self._ahead:
            return self._fetch(size, line=line)
        end = self._ahead.find(b"\n", 0, size) + 1 if line else 0
        block, self._ahead = self._ahead[: end or size], self._ahead[end or size :]
        return block if end or len(block) == size else block + self._fetch(size - len(block), line=line)

    def _fetch(self, size: int, *, line: bool) -> bytes:
        """The next bytes of the file itself."""
        try:
            block = self._handle.readline(size) if line else self._handle.read(size)
        except (EOFError, zlib.error, OSError, ValueError) as error:
            if not self._packing or not _is_unsound(error):
                raise
            cut_short = isinstance(error, EOFError) or "Truncated" in str(error)
            what = f"the {self._packing} data is cut short" if cut_short else f"not sound {self._packing} data"
            raise RecordError("", what, hint="pack the file again, or give it unpacked") from None
        self._unpacked += len(block)
        if self._packing and self._unpacked > self._most:
            what = f"unpacks to more than {_MOST_RATIO} times its size"
            raise RecordError("", what, hint="unpack it yourself if it is meant to be so")
        return block


def _unpacked(file: BinaryIO, packing: str) -> BinaryIO:
    """The file's text as bytes."""
    if packing == "zstd":
        import pyarrow

        stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), packing)
        return cast(BinaryIO, io.BufferedReader(stream, BLOCK))
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packing else file


def _is_unsound(error: Exception) -> bool:
    """Whether the packed data is at fault, and not the disk: Arrow's errors about data have no number."""
    return isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile, ValueError)) or (
        isinstance(error, OSError) and error.errno is None
    )
