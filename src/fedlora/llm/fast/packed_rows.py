"""One pass over rows without padding: their tokens one after another, and what several rows begin with only once.

A pack is made of groups; the rows of a group share a beginning, which may be empty. For attention the pieces (every
beginning, and every row's own tokens after it) are gathered into blocks of like length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.llm.examples import Example

FEWEST_SHARED = 8
"""A shorter common beginning is computed in each row: its own block of attention would cost more."""

BLOCK_LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Pieces whose lengths fall between the same two of these are attended to together."""

QUERIES = 128
"""Queries of a product: those after them see keys that these do not."""


@dataclass(frozen=True)
class Piece:
    """`length` tokens from `start` in the pack, after the `before` tokens from `prefix` on that they see as well."""

    start: int
    length: int
    prefix: int = 0
    before: int = 0


@dataclass(frozen=True)
class Queries:
    """A range of the queries of a block: places (pieces, queries), -1 where there is none, and how many of the block's
    keys any of them sees. `starts` and `ends` (pieces,) int32 are as `kernels.softmax_` takes them."""

    places: Tensor
    keys: int
    starts: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Block:
    """Pieces attended to together: the places of their keys (pieces, most keys), -1 where there is none.

    `own` (pieces,) int32 is where each piece's own keys begin, after those of its prefix; `prefixes` has the first
    place, the length and the pieces (k,) of every common beginning.
    """

    keys: Tensor
    own: Tensor
    queries: tuple[Queries, ...]
    prefixes: tuple[tuple[int, int, Tensor], ...]


@dataclass(frozen=True)
class Pack:
    """Token ids (n,), their positions in their rows (n,), the blocks of attention, and where what is predicted.

    `places` (m,) are the places whose states predict something, in order; label i is predicted from `places[by[i]]`.
    `lengths` are those of the rows, in order, where none shares its beginning.
    """

    ids: Tensor
    positions: Tensor
    blocks: tuple[Block, ...]
    places: Tensor
    by: Tensor
    targets: Tensor
    lengths: tuple[int, ...]


def pack_rows(examples: Sequence[Example], *, share: bool) -> Pack:
    """The pass that holds these rows; `share` computes what rows begin with once. Labels stay in the order of rows."""
    ids: list[int] = []
    positions: list[int] = []
    places: dict[int, list[int]] = {}
    pieces: list[Piece] = []
    for group, length in _groups(examples) if share else [([number], 0) for number in range(len(examples))]:
        prefix = len(ids)
        if length:
            pieces.append(Piece(prefix, length))
            ids.extend(examples[group[0]].ids[:length])
            positions.extend(range(length))
        for number in group:
            example, start = examples[number], len(ids) - length
            pieces.append(Piece(len(ids), len(example.ids) - length, prefix, length))
            ids.extend(example.ids[length:])
            positions.extend(range(length, len(example.ids)))
            places[number] = [at for begin, end in example.labels() for at in range(start + begin - 1, start + end - 1)]
    targets = [token for example in examples for begin, end in example.labels() for token in example.ids[begin:end]]
    used, by = torch.tensor([at for number in range(len(examples)) for at in places[number]]).unique(
        return_inverse=True
    )
    return Pack(
        torch.tensor(ids),
        torch.tensor(positions),
        tuple(_make_block(block) for block in _alike(pieces)),
        used,
        by,
        torch.tensor(targets),
        tuple(len(example.ids) for example in examples),
    )


def cut_packs(rows: Sequence[Example], *, token_budget: int, most_rows: int | None = None) -> list[list[int]]:
    """Places of rows that go through the model together, in the order of their tokens, so that those that begin alike
    are neighbours; a pack holds at most `token_budget` tokens (one row is always allowed) and `most_rows` rows."""
    packs: list[list[int]] = []
    left = 0
    for place in sorted(range(len(rows)), key=lambda place: list(rows[place].ids)):
        length = len(rows[place].ids)
        if not packs or length > left or len(packs[-1]) == most_rows:
            packs.append([])
            left = token_budget
        packs[-1].append(place)
        left -= length
    return packs


def _groups(examples: Sequence[Example]) -> list[tuple[list[int], int]]:
    """Rows that begin alike, and how many tokens each group shares, short of the first state that predicts a label.

    In the order of their tokens a row joins the group before it where that saves tokens.
    """
    groups: list[tuple[list[int], int]] = []
    for number in sorted(range(len(examples)), key=lambda number: list(examples[number].ids)):
        if groups:
            rows, length = groups[-1]
            first, own = examples[rows[0]], examples[number].labels_from - 1
            common = _common(first, examples[number], min(own, length or first.labels_from - 1))
            if common >= FEWEST_SHARED and common * len(rows) > length * (len(rows) - 1):
                groups[-1] = ([*rows, number], common)
                continue
        groups.append(([number], 0))
    return groups


def _common(a: Example, b: Example, most: int) -> int:
    return next((place for place in range(most) if a.ids[place] != b.ids[place]), most)


def _alike(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces in groups of like lengths."""
    found: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        found.setdefault((_size(piece.length), _size(piece.before)), []).append(piece)
    return [found[key] for key in sorted(found)]


def _size(length: int) -> int:
    return next((size for size in BLOCK_LENGTHS if length <= size), -(-length // 512) * 512) if length else 0


def _make_block(pieces: Sequence[Piece]) -> Block:
    longest = max(piece.length for piece in pieces)
    most = max(piece.before for piece in pieces)
    queries = torch.full((len(pieces), longest), -1)
    keys = torch.full((len(pieces), max(piece.length + piece.before for piece in pieces)), -1)
    seen: dict[tuple[int, int], list[int]] = {}
    for row, piece in enumerate(pieces):
        own = torch.arange(piece.start, piece.start + piece.length)
        queries[row, : piece.length] = own
        keys[row, : piece.before] = torch.arange(piece.prefix, piece.prefix + piece.before)
        keys[row, piece.before : piece.before + piece.length] = own
        if piece.before:
            seen.setdefault((piece.prefix, piece.before), []).append(row)
    before = torch.tensor([piece.before for piece in pieces], dtype=torch.int32)
    ends = torch.tensor([piece.before + piece.length for piece in pieces], dtype=torch.int32)
    ranges = [(begin, min(begin + QUERIES, longest)) for begin in range(0, longest, QUERIES)]
    return Block(
        keys,
        before,
        tuple(
            Queries(queries[:, begin:end].contiguous(), min(most + end, keys.shape[1]), before + begin, ends)
            for begin, end in ranges
        ),
        tuple((start, length, torch.tensor(rows)) for (start, length), rows in seen.items()),
    )
