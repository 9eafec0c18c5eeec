"""How probable continuations are after their contexts, for tasks that choose by likelihood.

Nothing is computed twice: continuations whose tokens go through the model alike, such as the letters A to D after one
question, are one row, and what the rows of a pass begin with goes through the model once where that saves time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from fedlora.llm.abilities import Abilities
from fedlora.llm.base_model import BaseModel
from fedlora.llm.examples import PASS_OVERHEAD_TOKENS, Batch, cut_alike
from fedlora.llm.loss import label_scores
from fedlora.llm.memory import with_less_memory
from fedlora.stopping import stop_if_asked

CACHED_TOKENS = 8
"""A shared token of a row, whose keys and values alone are copied, counts as so small a part of one in a pass."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """Token ids of context and continuation; those from `start` on, at least the second, are scored."""

    ids: Sequence[int]
    start: int


class Likelihood(NamedTuple):
    """The log-probability of a continuation in nats, and whether greedy decoding would write it."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class _Row:
    """What goes through the model once: all ids but the last, and the places of the continuations it scores."""

    ids: Sequence[int]
    places: tuple[int, ...]
    most_shared: int
    """Ids before the first state that predicts something."""


def score_continuations(
    base: BaseModel,
    asked: Sequence[Continuation],
    *,
    tokens_per_pass: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Likelihood]:
    """The likelihood of every continuation under the adapter that is set, in their order.

    Raises OutOfMemoryError where one row does not fit into memory.
    """
    if not asked:
        return []
    rows = _merge(asked)
    found: dict[int, Likelihood] = {}

    def attempt(budget: int) -> list[Likelihood]:
        left = [row for row in rows if row.places[0] not in found]
        for group in _cut(left, base.can, budget):
            stop_if_asked()
            found.update(_score_pass(base, group, asked))
            on_done(sum(len(row.places) for row in group))
        return [found[place] for place in range(len(asked))]

    longest = max(len(row.ids) for row in rows)
    return with_less_memory(attempt, tokens_per_pass, longest, "scoring continuations")[0]


def _merge(asked: Sequence[Continuation]) -> list[_Row]:
    """The rows, sorted so that those that begin alike are neighbours."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, one in enumerate(asked):
        places.setdefault(tuple(one.ids[:-1]), []).append(place)
    return [_Row(ids, tuple(own), min(asked[place].start for place in own) - 1) for ids, own in sorted(places.items())]


def _cut(rows: Sequence[_Row], can: Abilities, budget: int) -> list[list[_Row]]:
    """The rows of each pass: neighbours that share what they begin with, or rows of like length, whichever is less
    work."""
    if not rows:
        return []
    most_rows = None if can.equal_rows else 1
    lengths = [len(row.ids) for row in rows]
    alike = cut_alike(lengths, can.padding, token_budget=budget, most_rows=most_rows)
    work = sum(len(group) * max(lengths[place] for place in group) + PASS_OVERHEAD_TOKENS for group in alike)
    shared, shared_work = _cut_shared(rows, can, budget) if can.shared_prefix and can.equal_rows else ([], float("inf"))
    return shared if shared_work < work else [[rows[place] for place in group] for group in alike]


def _cut_shared(rows: Sequence[_Row], can: Abilities, budget: int) -> tuple[list[list[_Row]], float]:
    """Sorted rows cut into passes of neighbours at the least work in tokens, and that work."""
    common = [0, *(_common(one.ids, other.ids) for one, other in pairwise(rows))]
    best = [0.0] + [float("inf")] * len(rows)
    cut_at = [0] * (len(rows) + 1)
    for start in range(len(rows)):
        shared, longest, shortest = len(rows[start].ids), 0, len(rows[start].ids)
        for end in range(start, len(rows)):
            shared = min(shared, rows[end].most_shared, *([common[end]] if end > start else []))
            longest, shortest = max(longest, len(rows[end].ids)), min(shortest, len(rows[end].ids))
            count = end - start + 1
            used = shared if longest <= can.shared_prefix and _saves(shared, count) else 0
            tokens = used + count * (longest - used)
            is_mixed = shortest < longest and longest > can.padding
            if count > 1 and (is_mixed or tokens + count * used / CACHED_TOKENS > budget):
                break
            work = best[start] + tokens + PASS_OVERHEAD_TOKENS * (2 if used else 1)
            if work < best[end + 1]:
                best[end + 1], cut_at[end + 1] = work, start
    passes: list[list[_Row]] = []
    end = len(rows)
    while end > 0:
        passes.append(list(rows[cut_at[end] : end]))
        end = cut_at[end]
    return passes[::-1], best[-1]


def _saves(shared: int, count: int) -> bool:
    """Whether a pass of its own for what rows begin with is less work."""
    return (count - 1) * shared > PASS_OVERHEAD_TOKENS


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _score_pass(base: BaseModel, rows: Sequence[_Row], asked: Sequence[Continuation]) -> dict[int, Likelihood]:
    """Place -> likelihood, of all continuations of one pass."""
    places = [place for row in rows for place in row.places]
    counts = [len(asked[place].ids) - asked[place].start for place in places]
    losses, greedy = label_scores(base, _make_batch(base, rows, asked))
    each = zip(places, losses.double().split(counts), greedy.split(counts), strict=True)
    return {place: Likelihood(-float(loss.sum()), bool(is_greedy.all())) for place, loss, is_greedy in each}


def _make_batch(base: BaseModel, rows: Sequence[_Row], asked: Sequence[Continuation]) -> Batch:
    skip = _shared(rows, base.can.shared_prefix)
    longest = max(len(row.ids) for row in rows) - skip
    ids = torch.full((len(rows), longest), base.pad_id, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        ids[index, : len(row.ids) - skip] = torch.tensor(row.ids[skip:], dtype=torch.long)
        for place in row.places:
            one = asked[place]
            # the state at a token predicts the next one
            offset = index * longest - skip - 1
            positions.extend(range(offset + one.start, offset + len(one.ids)))
            targets.extend(one.ids[one.start :])
    prefix = torch.tensor(list(rows[0].ids[:skip]), dtype=torch.long)
    return Batch(*(part.to(base.device) for part in (prefix, ids, torch.tensor(positions), torch.tensor(targets))))


def _shared(rows: Sequence[_Row], longest_shared: int) -> int:
    """How many ids go through the model once for all rows of a pass."""
    if max(len(row.ids) for row in rows) > longest_shared:
        return 0
    shared = min(row.most_shared for row in rows)
    for row in rows[1:]:
        shared = min(shared, _common(rows[0].ids, row.ids))
    return shared if _saves(shared, len(rows)) else 0
