"""The layout of the `.bin` files that this project writes, and a reader for files that have exactly this layout.

Most of the time that reading takes goes into names and shapes that are the same for every adapter of a run. Here
the layout is taken once from a file of zeros; a file that agrees with it in every byte but the tensors' values and
the checksums over them needs no look at its listing. Anything else is left to `bin_contents`.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora.federated.adapters import Shapes

_LOCAL_HEADER, _CENTRAL_HEADER = 30, 46


class Span(NamedTuple):
    """Bytes from `begin` up to `end` of a file."""

    begin: int
    end: int


class BinLayout:
    """Where the values of each tensor lie, and every byte around them."""

    def __init__(self, shapes: Shapes) -> None:
        buffer = io.BytesIO()
        torch.save({key: torch.zeros(shapes[key], dtype=torch.float32) for key in sorted(shapes)}, buffer)
        self.shapes = dict(shapes)
        self.template = buffer.getvalue()
        records = _find_records(self.template)
        stem = next(name for name in records if name.endswith("/data.pkl")).removesuffix("data.pkl")
        self.values = {key: records[f"{stem}data/{number}"] for number, key in enumerate(sorted(shapes))}
        free = [*self.values.values(), *_find_checksums(self.template)]
        # an identifier that torch makes from all checksums
        free += [span for name, span in records.items() if name.endswith(".data/serialization_id")]
        self.fixed = _gaps(sorted(free), len(self.template))

    def read(self, path: Path) -> dict[str, Tensor] | None:
        """The tensors of a file, as views of one buffer; None when it is not of this layout."""
        if path.stat().st_size != len(self.template):
            return None
        buffer = torch.empty(len(self.template), dtype=torch.uint8)
        content = memoryview(buffer.numpy())  # pyright: ignore[reportArgumentType]
        with path.open("rb", buffering=0) as handle:
            if handle.readinto(content) != len(content):
                return None
        if any(content[span.begin : span.end] != self.template[span.begin : span.end] for span in self.fixed):
            return None
        return {
            key: buffer[span.begin : span.end].view(torch.float32).view(self.shapes[key])
            for key, span in self.values.items()
        }


def _find_records(archive: bytes) -> dict[str, Span]:
    """Name -> the bytes of each stored record of a zip archive."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        for entry in zipped.infolist():
            # the local header repeats the name and has padding of its own, which aligns the record
            names = entry.header_offset + _LOCAL_HEADER - 4
            begin = entry.header_offset + _LOCAL_HEADER + sum(_number(archive, names + 2 * i, 2) for i in range(2))
            found[entry.filename] = Span(begin, begin + entry.file_size)
    return found


def _find_checksums(archive: bytes) -> list[Span]:
    """Where the CRC-32 of each record stands: in its own header, behind it, and in the central directory."""
    spans = []
    records = _find_records(archive)
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        position = zipped.start_dir
        for entry in zipped.infolist():
            spans.append(Span(entry.header_offset + 14, entry.header_offset + 18))
            if entry.flag_bits & 8:
                end = records[entry.filename].end
                spans.append(Span(end + 4, end + 8))
            spans.append(Span(position + 16, position + 20))
            position += _CENTRAL_HEADER + sum(_number(archive, position + 28 + 2 * i, 2) for i in range(3))
    return spans


def _gaps(spans: list[Span], length: int) -> list[Span]:
    """What lies between sorted spans."""
    begins = [0, *(span.end for span in spans)]
    ends = [*(span.begin for span in spans), length]
    return [Span(begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end]


def _number(archive: bytes, position: int, size: int) -> int:
    return int.from_bytes(archive[position : position + size], "little")
