"""What an adapter file says it holds, checked against the base before a single value is read.

A file of two kilobytes can declare a tensor of a terabyte. So names, types, shapes and sizes are compared first,
as plain numbers, and nothing is allocated for a file that does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from fedlora.federated.adapters import Shapes

FLOATS = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
"""The types that are read; all but float32 are converted to it. Integers, complex numbers and float8 are refused."""

_WIDEST = max(kind.itemsize for kind in FLOATS)


class Unfit(Exception):  # noqa: N818
    """Why a file cannot be used as an adapter; the text follows the file's name."""


class Listed(NamedTuple):
    """Type and shape of one tensor, as its file declares them; `kind` is None where we know no such type."""

    kind: torch.dtype | None
    kind_name: str
    shape: tuple[int, ...]


def check_listing(listing: Mapping[str, Listed], expected: Shapes) -> None:
    """Raises Unfit unless exactly the `expected` names are there, in their shapes and as floats."""
    missing = sorted(expected.keys() - listing.keys())
    foreign = sorted(listing.keys() - expected.keys())
    if missing:
        raise Unfit(f"does not fit the base model: {len(missing)} missing keys: {_shown(missing)}")
    if foreign:
        raise Unfit(f"does not fit the base model: {len(foreign)} unknown keys: {_shown(foreign)}")
    for key, found in sorted(listing.items()):
        if found.shape != tuple(expected[key]):
            shape = str(found.shape)[:80]
            raise Unfit(f"does not fit the base model: {key} has shape {shape}, expected {tuple(expected[key])}")
        if found.kind not in FLOATS:
            raise Unfit(f"does not fit the base model: {key} has type {found.kind_name[:40]}, expected a float type")


def most_value_bytes(expected: Shapes) -> int:
    """Bytes of the tensors in the widest type that is read."""
    return sum(math.prod(shape) for shape in expected.values()) * _WIDEST


def most_listing_bytes(expected: Shapes) -> int:
    """Room for the names, shapes and offsets of the tensors, generously; a longer listing is not ours."""
    return (64 << 10) + sum(512 + 2 * len(key.encode()) for key in expected)


def most_file_bytes(expected: Shapes) -> int:
    """The size beyond which a file is not even opened: values, and twice the listing for zip's own directory."""
    return most_value_bytes(expected) + 3 * most_listing_bytes(expected)


def read_sizes(value: object) -> tuple[int, ...]:
    """`value` when it is a sequence of integers from 0 on, as shapes, strides and offsets are; Unfit otherwise."""
    if not isinstance(value, Sequence) or not all(type(size) is int and size >= 0 for size in value):
        raise Unfit("not a readable adapter (a shape or an offset is not made of sizes)")
    return tuple(value)


def _shown(keys: list[str]) -> str:
    return ", ".join(key[:120] for key in keys[:3])
