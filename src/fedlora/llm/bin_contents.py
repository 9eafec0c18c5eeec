"""Tensors of a `.bin` file that `torch.save` wrote, taken from their records without unpickling.

The file is a zip archive: `data.pkl` lists the tensors, `data/<n>` holds the numbers of one storage. The archive
must be stored uncompressed, as torch does, so that it holds no more than its size says.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from fedlora.federated.adapters import Shapes
from fedlora.llm.bin_listing import Storage, View, read_listing
from fedlora.llm.tensor_listing import Listed, Unfit, check_listing, most_listing_bytes, most_value_bytes

_ENCRYPTED = 1
_MOST_AT_ONCE = 1 << 20


def read_bin(path: Path, expected: Shapes) -> dict[str, Tensor]:
    """The tensors of `path` in the types they are stored in. Raises Unfit when they are not the expected ones."""
    with path.open("rb") as handle:
        if handle.read(4) != b"PK\x03\x04":
            raise Unfit("not a readable adapter (not a zip archive; torch before 1.6 wrote such files)")
        return _read_archive(zipfile.ZipFile(cast(BinaryIO, _Sparing(handle, path.stat().st_size))), expected)


class _Sparing:
    """A file that is read in small portions only: zipfile takes a directory of any size at once."""

    def __init__(self, handle: BinaryIO, size: int) -> None:
        self._handle = handle
        self._size = size
        self.seek, self.tell, self.seekable = handle.seek, handle.tell, handle.seekable

    def read(self, count: int = -1) -> bytes:
        if (count if count >= 0 else self._size - self.tell()) > _MOST_AT_ONCE:
            raise Unfit("not a readable adapter (the directory of its records is too large)")
        return self._handle.read(count)


def _read_archive(archive: zipfile.ZipFile, expected: Shapes) -> dict[str, Tensor]:
    with archive:
        records = _find_records(archive)
        listing = records.get("data.pkl")
        if listing is None or listing.file_size > most_listing_bytes(expected):
            raise Unfit("not a readable adapter (data.pkl is missing or too large)")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise Unfit("not a readable adapter (its numbers are not little-endian)")
        views = read_listing(archive.read(listing))
        check_listing(
            {key: Listed(view.storage.kind, view.storage.kind_name, view.shape) for key, view in views.items()},
            expected,
        )
        storages = _check_storages(views, records, expected)
        values = {storage: _read_storage(archive, records[f"data/{storage.record}"], storage) for storage in storages}
    return {key: torch.as_strided(values[view.storage], *_geometry(view)) for key, view in views.items()}


def _find_records(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Name below the archive's one folder -> record."""
    records: dict[str, zipfile.ZipInfo] = {}
    for record in archive.infolist():
        name = record.filename.partition("/")[2]
        if name in records:
            raise Unfit(f"not a readable adapter (the record {name[:80]!r} is there twice)")
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise Unfit(f"not a readable adapter (the record {name[:80]!r} is compressed)")
        if record.flag_bits & _ENCRYPTED:
            raise Unfit(f"not a readable adapter (the record {name[:80]!r} is encrypted)")
        records[name] = record
    return records


def _check_storages(
    views: Mapping[str, View], records: Mapping[str, zipfile.ZipInfo], expected: Shapes
) -> set[Storage]:
    """Every storage has its record, as large as it says, and every tensor lies inside its own."""
    storages = {view.storage for view in views.values()}
    if len({storage.record for storage in storages}) < len(storages):
        raise Unfit("not a readable adapter (one record under two types or sizes)")
    total = 0
    for storage in storages:
        record = records.get(f"data/{storage.record}")
        size = storage.size * (storage.kind.itemsize if storage.kind else 0)
        if record is None or record.file_size != size:
            raise Unfit(f"not a readable adapter (the record of storage {storage.record[:40]!r} is not {size} bytes)")
        total += size
    if total > most_value_bytes(expected):
        raise Unfit("not a readable adapter (its storages are far larger than its tensors; save clones of them)")
    for key, view in views.items():
        steps = zip(view.shape, view.strides, strict=True) if len(view.shape) == len(view.strides) else None
        if steps is None or view.offset < 0:
            raise Unfit(f"not a readable adapter ({key} has no place in its storage)")
        last = view.offset + sum((size - 1) * stride for size, stride in steps)
        if math.prod(view.shape) and last >= view.storage.size:
            raise Unfit(f"not a readable adapter ({key} lies outside its storage)")
    return storages


def _read_storage(archive: zipfile.ZipFile, record: zipfile.ZipInfo, storage: Storage) -> Tensor:
    values = torch.empty(storage.size, dtype=storage.kind)
    content = memoryview(values.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    with archive.open(record) as handle:
        # up to and over the end: only there the checksum is compared
        filled = 0
        while block := handle.read(_MOST_AT_ONCE):
            content[filled : filled + len(block)] = block
            filled += len(block)
    if filled != len(content):
        raise Unfit(f"not a readable adapter (the record of storage {storage.record[:40]!r} is cut off)")
    return values


def _geometry(view: View) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return view.shape, view.strides, view.offset
