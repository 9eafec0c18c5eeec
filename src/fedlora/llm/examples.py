"""Rows as token ids, the order in which a client sees them, and the layout of a pass.

The layout of an optimizer step in memory never changes its gradient. Its examples are sorted by length and cut into
passes under a token budget; the cut is the one with the least padding.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.llm.prompts import PromptEncoder
from fedlora.rows import Row
from fedlora.seeds import derive_seed

PASS_OVERHEAD_TOKENS = 224
"""What starting another pass costs, in tokens of work (benchmarks/pass_overhead.py); decides between padding and one
more pass, and whether a shared prefix is worth a pass of its own."""


@dataclass(frozen=True)
class Example:
    """One tokenised row; `labels_from` is the index of the first token that is predicted."""

    ids: list[int]
    labels_from: int

    @property
    def num_labels(self) -> int:
        return len(self.ids) - self.labels_from


@dataclass(frozen=True)
class ExampleSet:
    """A client's examples and what happened to its rows on the way."""

    examples: list[Example]
    num_empty: int
    num_shortened: int

    @property
    def num_tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def num_labels(self) -> int:
        return sum(example.num_labels for example in self.examples)


def encode_rows(
    rows: Sequence[Row], encoder: PromptEncoder, *, cutoff: int, train_on_inputs: bool = False
) -> ExampleSet:
    """Tokenise rows for training; rows with an empty response are left out and counted.

    A response that is cut carries no end-of-sequence token. Every example carries at least one label.
    """
    examples: list[Example] = []
    num_empty = num_shortened = 0
    for row in rows:
        if not row.output.strip():
            num_empty += 1
            continue
        response = encoder.response(row.output)
        prompt = encoder.prompt(row, cutoff=cutoff, response_length=len(response))
        kept = response[: cutoff - len(prompt.ids)]
        num_shortened += bool(prompt.num_removed) or len(kept) < len(response)
        labels_from = 1 if train_on_inputs else max(1, len(prompt.ids))
        examples.append(Example(prompt.ids + kept, labels_from))
    return ExampleSet(examples, num_empty, num_shortened)


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
        positions.extend(range(offset + example.labels_from, offset + len(example.ids)))
        targets.extend(example.ids[example.labels_from :])
    prefix = torch.tensor(examples[0].ids[:skip], dtype=torch.long)
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
