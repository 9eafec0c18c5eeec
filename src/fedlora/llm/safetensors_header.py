"""The header of a `.safetensors` file, parsed with limits and compared with the expected tensors.

The format is eight bytes of length, JSON of that length, then the values. The library checks much of this as well,
but only after it has parsed a header of any size and any number of names.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from fedlora.federated.adapters import Shapes
from fedlora.llm.tensor_listing import Listed, Unfit, check_listing, most_listing_bytes, read_sizes

_LENGTH_BYTES = 8
_KINDS = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}


def check_header(path: Path, expected: Shapes) -> None:
    """Raises Unfit unless `path` holds exactly the expected tensors, one after the other up to its end."""
    entries, value_bytes = _read_entries(path, most_listing_bytes(expected))
    listing, spans = {}, []
    for key, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise Unfit("not a readable adapter (an entry of the header is not dtype, shape and data_offsets)")
        kind, span = str(entry["dtype"]), read_sizes(entry["data_offsets"])
        if len(span) != 2:
            raise Unfit("not a readable adapter (an entry of the header has no two offsets)")
        listing[key] = Listed(_KINDS.get(kind), kind, read_sizes(entry["shape"]))
        spans.append((*span, key))
    check_listing(listing, expected)
    position = 0
    for begin, end, key in sorted(spans):
        kind = listing[key].kind
        size = math.prod(listing[key].shape) * (kind.itemsize if kind else 0)
        if begin != position or end != begin + size:
            raise Unfit(f"not a readable adapter (bytes {begin} to {end} cannot be {key})")
        position = end
    if position != value_bytes:
        raise Unfit(f"not a readable adapter ({value_bytes} bytes of values, expected {position})")


def _read_entries(path: Path, limit: int) -> tuple[dict[str, Any], int]:
    """Name -> entry of the header without its metadata, and how many bytes of values follow it."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= min(limit, size - _LENGTH_BYTES):
            raise Unfit(f"not a readable adapter (a header of {length} bytes in a file of {size})")
        text = handle.read(length)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"not a readable adapter (header: {str(error)[:80]})") from None
    if not isinstance(entries, dict):
        raise Unfit("not a readable adapter (the header is not an object)")
    entries.pop("__metadata__", None)
    return entries, size - _LENGTH_BYTES - length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a size")
