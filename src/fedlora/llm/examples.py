"""Rows as token ids, the order in which a client sees them, and the layout of a pass.

The layout of an optimizer step in memory never changes its gradient. Its examples are sorted by length and cut into
passes under a token budget; the cut is the one with the least padding.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fedlora.config.prompting import PromptSettings
from fedlora.config.train import TrainOn
from fedlora.llm.part_prompts import PartsEncoder
from fedlora.llm.prompts import PromptEncoder, Span
from fedlora.rows import Row
from fedlora.seeds import derive_seed

PASS_OVERHEAD_TOKENS = 224
"""What starting another pass costs, in tokens of work (benchmarks/pass_overhead.py); decides between padding and one
more pass, and whether a shared prefix is worth a pass of its own."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row: tokens from `labels_from` on are predicted, but for those in the ranges `masked`.

    The ranges are the turns of a conversation between two replies, in order.
    """

    ids: Sequence[int]
    labels_from: int
    masked: tuple[Span, ...] = ()

    @property
    def num_labels(self) -> int:
        return len(self.ids) - self.labels_from - sum(end - start for start, end in self.masked)

    def labels(self) -> Iterator[Span]:
        """The ranges of tokens that are predicted."""
        start = self.labels_from
        for end, after in self.masked:
            yield start, end
            start = after
        yield start, len(self.ids)


@dataclass(frozen=True)
class RowCounts:
    """What happened to rows on the way to examples.

    Of the rows that were encoded: those that were shortened, those that hold control text, and those whose reply is
    encoded apart from its prompt; their turns, and the turns that were left out whole.
    """

    num_empty: int = 0
    num_shortened: int = 0
    num_control: int = 0
    num_apart: int = 0
    num_turns: int = 0
    num_cut_turns: int = 0


@dataclass(frozen=True)
class ExampleSet:
    """A client's examples and what happened to its rows on the way."""

    examples: list[Example]
    counts: RowCounts = RowCounts()

    @property
    def num_tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def num_labels(self) -> int:
        return sum(example.num_labels for example in self.examples)


Encoder = PromptEncoder | PartsEncoder


def make_encoder(tokenizer: Any, settings: PromptSettings) -> Encoder:
    """The encoder of the rule that the settings name."""
    return PartsEncoder(tokenizer, settings) if settings.token_rule == 1 else PromptEncoder(tokenizer, settings)


def encode_rows(rows: Iterable[Row], encoder: Encoder, *, cutoff: int, train_on: TrainOn = "assistant") -> ExampleSet:
    """Tokenise rows for training, in memory that grows with their tokens alone (4 bytes each); rows with an empty
    response are left out and counted.

    A response that is cut carries no end-of-sequence token. Every example carries at least one label.
    """
    counts: Counter[str] = Counter()

    def labelled() -> Iterator[Row]:
        for row in rows:
            if row.output.strip():
                yield row
            else:
                counts["num_empty"] += 1

    examples = []
    for one in encoder.encode(labelled(), cutoff=cutoff, train_on=train_on):
        examples.append(make_example(array("i", one.ids), one.spans))
        counts["num_shortened"] += one.is_shortened
        counts["num_control"] += one.holds_control
        counts["num_apart"] += one.is_apart
        counts["num_turns"] += one.num_turns
        counts["num_cut_turns"] += one.num_cut_turns
    return ExampleSet(examples, RowCounts(**counts))


def make_example(ids: Sequence[int], spans: Sequence[Span]) -> Example:
    """An example from the ranges of its ids that are predicted; the last of them ends with the ids."""
    gaps = tuple((end, start) for (_, end), (start, _) in pairwise(spans) if start > end)
    return Example(ids, spans[0][0], gaps)


def order_steps(
    examples: Sequence[Example],
    *,
    batch_size: int,
    seed: int,
    round_number: int,
    client_id: int,
    epoch: int,
    by_length: bool = False,
) -> list[list[Example]]:
    """One epoch as optimizer steps of `batch_size` rows (the last may be smaller), shuffled by the seed.

    With `by_length` rows of similar length form a step and the steps come in shuffled order.
    """
    draw = random.Random(derive_seed(seed, "rows", round_number, client_id, epoch))  # noqa: S311
    order = list(examples)
    draw.shuffle(order)
    if by_length:
        order.sort(key=lambda example: len(example.ids))
    steps = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if by_length:
        draw.shuffle(steps)
    return steps


def cut_passes(
    lengths: Sequence[int], *, token_budget: int, most_rows: int | None = None, overhead: int = PASS_OVERHEAD_TOKENS
) -> list[list[int]]:
    """Indices of rows grouped into passes, longest rows first, at the least cost.

    Cost of a pass: rows times the longest row, plus `overhead`, all in tokens. A pass holds at most
    `token_budget` padded tokens (one row is always allowed) and at most `most_rows` rows. Dynamic
    programming over the sorted rows, quadratic in their number.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    limit = most_rows or len(order)
    best = [0.0] + [float("inf")] * len(order)
    cut_at = [0] * (len(order) + 1)
    for start in range(len(order)):
        longest = lengths[order[start]]
        fits = max(1, min(limit, token_budget // max(1, longest)))
        for end in range(start + 1, min(len(order), start + fits) + 1):
            cost = best[start] + longest * (end - start) + overhead
            if cost < best[end]:
                best[end], cut_at[end] = cost, start
    passes: list[list[int]] = []
    end = len(order)
    while end > 0:
        passes.append(order[cut_at[end] : end])
        end = cut_at[end]
    return passes[::-1]


def cut_alike(
    lengths: Sequence[int],
    mixed: int,
    *,
    token_budget: int,
    most_rows: int | None = None,
    overhead: int = PASS_OVERHEAD_TOKENS,
) -> list[list[int]]:
    """`cut_passes` where rows of more than `mixed` tokens share a pass only with rows of their own length."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(0 if length <= mixed else length, []).append(index)
    return [
        [numbers[index] for index in group]
        for _, numbers in sorted(groups.items(), reverse=True)
        for group in cut_passes(
            [lengths[number] for number in numbers], token_budget=token_budget, most_rows=most_rows, overhead=overhead
        )
    ]


@dataclass(frozen=True)
class Batch:
    """One pass: right-padded ids (rows, longest), what all rows begin with, and where the predicted tokens are.

    `prefix` (length,) comes once before every row and is not repeated in `ids`. `positions` are flat
    indices into (rows * longest) of the states that predict `targets`. Padding comes after every real
    token, so under a causal mask no real token sees it.
    """

    prefix: Tensor
    ids: Tensor
    positions: Tensor
    targets: Tensor


def make_batch(
    examples: Sequence[Example], *, pad_id: int, device: torch.device | str = "cpu", share_prefix: bool = False
) -> Batch:
    """Pad the examples of one pass on the right; all int64. `share_prefix` takes out what all rows begin with."""
    skip = shared_prefix(examples) if share_prefix else 0
    longest = max(len(example.ids) for example in examples) - skip
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    for index, example in enumerate(examples):
        ids[index, : len(example.ids) - skip] = torch.tensor(example.ids[skip:], dtype=torch.long)
        offset = index * longest - 1 - skip
        for start, end in example.labels():
            positions.extend(range(offset + start, offset + end))
            targets.extend(example.ids[start:end])
    prefix = torch.tensor(list(examples[0].ids[:skip]), dtype=torch.long)
    parts = (prefix, ids, torch.tensor(positions), torch.tensor(targets))
    return Batch(*(_send(part, torch.device(device)) for part in parts))


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To a GPU from pinned memory, so that the copy does not hold up the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many tokens all rows begin with, short of the first state that predicts a label.

    0 when computing them once would save less than the pass of its own that it takes.
    """
    length = min(example.labels_from for example in examples) - 1
    first = examples[0].ids
    for example in examples[1:]:
        length = next((i for i in range(length) if example.ids[i] != first[i]), length)
    return length if (len(examples) - 1) * length > PASS_OVERHEAD_TOKENS else 0
