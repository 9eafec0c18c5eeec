"""Rows that repeat earlier ones: exactly, in the prompt alone, as the beginning of a conversation, or nearly.

Near means a Jaccard similarity of at least NEAR between the sets of word triples of two rows. Pairs are found by
prefix filtering (Bayardo et al., 2007, "Scaling Up All Pairs Similarity Search") rather than by MinHash: two sets that
similar must share one of the rarest few triples of each, so looking only there loses no pair, draws nothing at
random, and is quick, as most triples of real text occur once. What is found is compared in full.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedlora.data.words import fold, split_words
from fedlora.rows import Row

NEAR = 0.8
"""Least share of common word triples, of all triples of either row."""

SHORTEST = 10
"""Words a row must have to be compared: one word more or less is most of what a shorter row says."""

MOST_TRIES = 200
"""Full comparisons without a find, per row and scope, after which the row counts as unlike all others. Text that
hundreds of rows share in part and none nearly repeats would otherwise take quadratic time."""

Kind = Literal["row", "prompt", "turn", "near"]
Scope = Literal["inside", "across"]

_ID_BITS = 21


@dataclass(frozen=True)
class Repeat:
    """A row (`source`, `row`, both from 0) and an earlier one that it repeats.

    The scope says whether the earlier one is of the same source. A row has at most one repeat per scope, of the
    strictest kind there is.
    """

    kind: Kind
    scope: Scope
    source: int
    row: int
    first_source: int
    first_row: int


def find_repeats(sources: Sequence[Sequence[Row]]) -> list[Repeat]:
    """Every row that repeats an earlier one of its own source or of an earlier source, in order of the rows.

    All turns of a conversation count. Of a row of the kind `turn` and the earlier one, one is the beginning of the
    other: it has the prompt of a turn before the other's last, whose reply may be trained on too.
    """
    found: dict[tuple[int, int, Scope], Repeat] = {}
    equal = [*_find_equal("row", sources, _row_keys), *_find_equal("prompt", sources, _prompt_keys)]
    if any(row.before for rows in sources for row in rows):
        equal += _find_equal("turn", sources, _turn_keys, _held_turn_keys)
    for repeat in equal:
        found.setdefault((repeat.source, repeat.row, repeat.scope), repeat)
    for repeat in _find_near(sources, set(found)):
        found[repeat.source, repeat.row, repeat.scope] = repeat
    return [found[key] for key in sorted(found)]


def _row_keys(row: Row) -> list[Hashable]:
    return [_fold_all((*row.prompt, row.output))]


def _prompt_keys(row: Row) -> list[Hashable]:
    return [_fold_all(row.prompt)]


def _turn_keys(row: Row) -> list[tuple[bool, Hashable]]:
    """The prompt of every exchange, and whether it is the last."""
    return [(True, _fold_all(row.prompt)), *((False, _fold_all(prompt)) for prompt in row.earlier_prompts)]


def _held_turn_keys(row: Row) -> list[tuple[bool, Hashable]]:
    """What a last exchange is compared with is an earlier one, and the other way round."""
    return [(not is_last, prompt) for is_last, prompt in _turn_keys(row)]


def _fold_all(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(fold(text).split()) for text in texts)


def _find_equal(
    kind: Any,
    sources: Sequence[Sequence[Row]],
    keys_of: Callable[[Row], Sequence[Hashable]],
    held_by: Callable[[Row], Sequence[Hashable]] | None = None,
) -> Iterator[Repeat]:
    """Rows with a key that an earlier row holds, by default as one of its own."""
    firsts: defaultdict[Hashable, dict[int, int]] = defaultdict(dict)
    for source, rows in enumerate(sources):
        for number, row in enumerate(rows):
            places = [place for key in keys_of(row) for place in firsts.get(key, {}).items()]
            own = min((place for place in places if place[0] == source), default=None)
            if own is not None:
                yield Repeat(kind, "inside", source, number, *own)
            other = min((place for place in places if place[0] != source), default=None)
            if other is not None:
                yield Repeat(kind, "across", source, number, *other)
            for key in (held_by or keys_of)(row):
                firsts[key].setdefault(source, number)


def _find_near(sources: Sequence[Sequence[Row]], settled: set[tuple[int, int, Scope]]) -> Iterator[Repeat]:
    places = [(source, number) for source, rows in enumerate(sources) for number in range(len(rows))]
    triples = _Triples([split_words(" ".join(sources[s][n].texts)) for s, n in places])
    index = _Index(triples)
    for document, (source, number) in enumerate(places):
        if not triples.is_long(document):
            continue
        for scope in ("inside", "across"):
            if (source, number, scope) not in settled:
                first = index.find(document, source, inside=scope == "inside")
                if first is not None:
                    yield Repeat("near", scope, source, number, *places[first])
        index.add(document, source)


class _Triples:
    """The word triples of every document, as ascending ranks: the rarest triple of all documents has rank 0."""

    def __init__(self, documents: Sequence[Sequence[str]]) -> None:
        ids: dict[str, int] = {}
        codes = [_triple_codes([ids.setdefault(word, len(ids)) for word in words]) for words in documents]
        self.lengths = [len(words) for words in documents]
        every = np.concatenate(codes) if codes else np.empty(0, np.int64)
        _, inverse, counts = np.unique(every, return_inverse=True, return_counts=True)
        order = np.argsort(counts, kind="stable")
        rank_of = np.empty(len(order), np.int64)
        rank_of[order] = np.arange(len(order))
        ends = np.cumsum([len(part) for part in codes])
        self.ranks = [np.sort(part) for part in np.split(rank_of[inverse], ends[:-1])] if codes else []
        # ranks below this occur in one document only and can start no comparison
        self.first_shared = int(np.count_nonzero(counts == 1))

    def is_long(self, document: int) -> bool:
        return self.lengths[document] >= SHORTEST

    def prefix(self, document: int) -> list[int]:
        """The rarest triples, of which one must be shared by any document that is near, as far as others have them."""
        ranks = self.ranks[document]
        size = len(ranks) - math.ceil(NEAR * len(ranks) - 1e-9) + 1
        kept = ranks[:size]
        return kept[kept >= self.first_shared].tolist()

    def is_near(self, one: int, other: int) -> bool:
        """Whether two documents are near, by their whole sets."""
        a, b = self.ranks[one], self.ranks[other]
        if min(len(a), len(b)) < NEAR * max(len(a), len(b)) - 1e-9:
            return False
        common = len(np.intersect1d(a, b, assume_unique=True))
        return common >= NEAR * (len(a) + len(b) - common) - 1e-9


class _Index:
    """Documents by the rare triples they begin with, kept apart by source, in the order they were added."""

    def __init__(self, triples: _Triples) -> None:
        self._triples = triples
        self._postings: defaultdict[int, dict[int, list[int]]] = defaultdict(dict)

    def add(self, document: int, source: int) -> None:
        for rank in self._triples.prefix(document):
            self._postings[rank].setdefault(source, []).append(document)

    def find(self, document: int, source: int, *, inside: bool) -> int | None:
        """The first document found near, of the same source or of any other; None when there is none."""
        tried: set[int] = set()
        for rank in self._triples.prefix(document):
            for owner, documents in self._postings.get(rank, {}).items():
                if (owner == source) is not inside:
                    continue
                for other in documents:
                    if other in tried:
                        continue
                    if self._triples.is_near(document, other):
                        return other
                    tried.add(other)
                    if len(tried) >= MOST_TRIES:
                        return None
        return None


def _triple_codes(words: Sequence[int]) -> Any:
    """The distinct triples of a document, each as one number (n,) int64: 21 bits a word, so two million words."""
    # beyond that, words share their numbers, and an overlap may be taken for larger than it is
    held = np.asarray(words, np.int64) & ((1 << _ID_BITS) - 1)
    if len(held) < 3:
        return np.empty(0, np.int64)
    return np.unique((held[:-2] << (2 * _ID_BITS)) | (held[1:-1] << _ID_BITS) | held[2:])
