"""Tensors of a `.bin` file that `torch.save` wrote, taken from their records without unpickling.

The file is a zip archive: `data.pkl` lists the tensors, `data/<n>` holds the numbers of one storage. Its records must
not be compressed, as torch leaves them, so that the file holds no more than its size says. `torch.load` is not used:
it compares no checksum, and with `mmap=True` it takes the bytes of a compressed or short record for a tensor's.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from fedlora.federated.adapters import Shapes
from fedlora.llm.bin_listing import View, read_listing
from fedlora.llm.tensor_listing import Listed, Unfit, check_listing, most_listing_bytes, most_value_bytes

_KINDS = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}
_MOST_LISTING_BYTES = 16 << 20
_ENCRYPTED = 1
_MOST_AT_ONCE = 1 << 20
Records = dict[str, zipfile.ZipInfo]


def read_bin(path: Path, expected: Shapes) -> dict[str, Tensor]:
    """The tensors of `path` in the types they are stored in. Raises Unfit when they are not the expected ones."""
    with _open(path, most_listing_bytes(expected)) as (archive, records, views):
        check_listing(
            {key: Listed(_KINDS.get(view.kind), view.kind, view.shape) for key, view in views.items()}, expected
        )
        storages = {(f"data/{view.record}", view.kind) for view in views.values()}
        if sum(records[name].file_size for name, _ in storages) > most_value_bytes(expected):
            raise Unfit("not a readable adapter (its storages are far larger than its tensors; save clones of them)")
        values = {storage: _read_storage(archive, records[storage[0]], _KINDS[storage[1]]) for storage in storages}
    return {
        key: torch.as_strided(values[f"data/{view.record}", view.kind], view.shape, view.strides, view.offset)
        for key, view in views.items()
    }


def read_bin_shapes(path: Path) -> Shapes:
    """Key -> shape where no base model says what is expected. Raises Unfit when the file cannot hold such tensors."""
    with _open(path, _MOST_LISTING_BYTES) as (_, _, views):
        shapes = {key: view.shape for key, view in views.items()}
    if 4 * sum(math.prod(shape) for shape in shapes.values()) > path.stat().st_size:
        raise Unfit("not a readable adapter (it lists more than it holds)")
    return shapes


class _Sparing:
    """A file that is read in portions of `most` bytes only: zipfile takes a directory of any size at once."""

    def __init__(self, handle: BinaryIO, size: int, most: int) -> None:
        self._handle, self._size, self._most = handle, size, most
        self.seek, self.tell, self.seekable = handle.seek, handle.tell, handle.seekable

    def read(self, count: int = -1) -> bytes:
        if (count if count >= 0 else self._size - self.tell()) > self._most:
            raise Unfit("not a readable adapter (the directory of its records is too large)")
        return self._handle.read(count)


@contextlib.contextmanager
def _open(path: Path, most_bytes: int) -> Iterator[tuple[zipfile.ZipFile, Records, Mapping[str, View]]]:
    """The archive, its records by name and its listing of at most `most_bytes`."""
    with path.open("rb") as handle:
        if handle.read(4) != b"PK\x03\x04":
            raise Unfit("not a readable adapter (not a zip archive; torch before 1.6 wrote such files)")
        sparing = _Sparing(handle, path.stat().st_size, max(_MOST_AT_ONCE, most_bytes))
        with zipfile.ZipFile(cast(BinaryIO, sparing)) as archive:
            records = _find_records(archive)
            listing = records.get("data.pkl")
            if listing is None or listing.file_size > most_bytes:
                raise Unfit("not a readable adapter (data.pkl is missing or too large)")
            views = read_listing(archive.read(listing))
            for key, view in views.items():
                _check_place(key, view, records.get(f"data/{view.record}"))
            yield archive, records, views


def _find_records(archive: zipfile.ZipFile) -> Records:
    """Name below the archive's one folder -> record."""
    records: Records = {}
    for record in archive.infolist():
        name = record.filename.partition("/")[2]
        if name in records:
            raise Unfit(f"not a readable adapter (the record {name[:80]!r} is there twice)")
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise Unfit(f"not a readable adapter (the record {name[:80]!r} is compressed)")
        if record.flag_bits & _ENCRYPTED:
            raise Unfit(f"not a readable adapter (the record {name[:80]!r} is encrypted)")
        records[name] = record
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        raise Unfit("not a readable adapter (its numbers are not little-endian)")
    return records


def _check_place(key: str, view: View, record: zipfile.ZipInfo | None) -> None:
    """Raises Unfit unless the storage is the whole record, and the tensor lies inside."""
    size = view.size * _KINDS[view.kind].itemsize if view.kind in _KINDS else None
    if record is None or size not in (None, record.file_size):
        raise Unfit(f"not a readable adapter (the record of storage {view.record[:40]!r} is not {size} bytes)")
    if len(view.shape) != len(view.strides) or min(view.offset, *view.shape, *view.strides) < 0:
        raise Unfit(f"not a readable adapter ({key} has no place in its storage)")
    last = view.offset + sum((count - 1) * stride for count, stride in zip(view.shape, view.strides, strict=True))
    if math.prod(view.shape) and last >= view.size:
        raise Unfit(f"not a readable adapter ({key} lies outside its storage)")


def _read_storage(archive: zipfile.ZipFile, record: zipfile.ZipInfo, kind: torch.dtype) -> Tensor:
    """The numbers of a record; BadZipFile where they do not have its checksum."""
    content = bytearray()
    with archive.open(record) as handle:
        while block := handle.read(_MOST_AT_ONCE):
            content += block
    if len(content) != record.file_size:
        raise Unfit(f"not a readable adapter (the record {record.filename[:40]!r} is cut off)")
    return torch.frombuffer(content, dtype=kind)
