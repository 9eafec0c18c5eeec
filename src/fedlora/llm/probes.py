"""The trials of a self-check: a few rows through the model's own forward pass, through training, through answering."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fedlora.llm.base_model import BaseModel
from fedlora.llm.decoding import Decoding, Request, stop_tokens
from fedlora.llm.ends import Ends
from fedlora.llm.examples import Batch
from fedlora.llm.generation import Batch as AnsweringBatch
from fedlora.llm.library_generation import LibraryBatch
from fedlora.llm.loss import label_logits

ROW_TOKENS = 14


@dataclass(frozen=True)
class Row:
    """Token ids, of which the first `shared` begin every row of a trial. Answers follow `prompt` tokens and are the
    next `steps` tokens; `truth` is the place of its logits."""

    ids: list[int]
    shared: int
    prompt: int
    steps: int
    truth: int

    def of_training(self, logits: Sequence[Tensor]) -> Tensor:
        """Of the logits (length, vocabulary) of whole rows, those that a training pass gives."""
        return logits[self.truth][self.shared :]

    def of_answering(self, logits: Sequence[Tensor]) -> Tensor:
        """The same of an answer: one for each step."""
        return logits[self.truth][self.prompt - 1 : self.prompt - 1 + self.steps]


def draw_rows(base: BaseModel, length: int = ROW_TOKENS, *, prompt: int | None = None) -> tuple[Row, Row, Row]:
    """Three rows of a trial: one of `length` tokens, a shorter one that begins like it, and one that does not.

    Special tokens, images and padding among them, are left out. A model with fewer positions gets shorter rows.
    """
    size = min(ROW_TOKENS, length, base.context or length)
    shared, steps = size // 4, max(1, size // 4)
    special = {*_special_ids(base.model.config.to_dict()), *base.tokenizer.all_special_ids, *stop_tokens(base)}
    special.add(base.pad_id)
    usual = [token for token in range(base.vocabulary) if token not in special] or [0]
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(len(usual), (3, max(size, length if prompt else size)), generator=draw)
    first, second, third = ([usual[pick] for pick in row.tolist()] for row in picks)
    second, third = first[:shared] + second[shared : size - 2], third[:size]
    follows = prompt or size - steps
    return (
        Row(first, shared, follows, min(6, len(first) - follows), 0),
        Row(second, shared, len(second) - 2, 2, 1),
        Row(third, 0, size - steps, steps, 2),
    )


def leaving(row: Row, prompt: int) -> Row:
    """The same row, whose answer after so many tokens is empty: it leaves before the others."""
    return replace(row, prompt=prompt, steps=0)


def own_logits(base: BaseModel, rows: Sequence[Row], *, together: bool = False) -> list[Tensor]:
    """Logits (length, vocabulary) of each row alone, or of all in one pass, by the model's own forward pass without a
    cache."""
    found = []
    for part in [rows] if together else [[row] for row in rows]:
        width = max(len(row.ids) for row in part)
        ids = [row.ids + [base.pad_id] * (width - len(row.ids)) for row in part]
        logits = base.model(input_ids=torch.tensor(ids, device=base.device), use_cache=False).logits
        found += [one[: len(row.ids)] for one, row in zip(logits, part, strict=True)]
    return found


def head_logits(base: BaseModel, row: Row, states: Tensor | None = None) -> list[Tensor]:
    """The same of one row, by decoder and head; hidden states have the shape that the model gives its output layer.

    `states` (1, length, d) are those of the row where they are known.
    """
    if base.can.head == "model":
        return own_logits(base, [row])
    hidden = base.hidden(torch.tensor([row.ids], device=base.device)) if states is None else states
    return [base.head(hidden)[0] if base.can.head == "linear" else base.head(hidden[0])]


def training_logits(base: BaseModel, groups: Sequence[Sequence[Row]], *, twice: bool = False) -> list[Tensor]:
    """Logits of each row's tokens after the shared ones, in passes as training makes them of each group.

    `twice`: then the same without a shared prefix, which is without a cache.
    """
    found: list[Tensor] = []
    for rows in groups:
        longest = max(len(row.ids) for row in rows)
        skip = min(row.shared for row in rows) if longest <= base.can.shared_prefix else 0
        lengths = [len(row.ids) for row in rows]
        for part in _parts(rows, lengths, together=longest <= base.can.padding, alike=base.can.equal_rows):
            found += _train_pass(base, part, skip)
    if twice:
        found += training_logits(replace(base, can=base.can.off(["shared_prefix"])), groups)
    return found


def _parts(rows: Sequence[Row], lengths: Sequence[int], *, together: bool, alike: bool) -> list[list[Row]]:
    """All rows together, or neighbours of one length, or each row alone."""
    keys = [0] * len(rows) if together else list(lengths) if alike else list(range(len(rows)))
    return [[row for row, _ in part] for _, part in groupby(zip(rows, keys, strict=True), lambda pair: pair[1])]


def _train_pass(base: BaseModel, rows: Sequence[Row], skip: int) -> Iterator[Tensor]:
    logits = label_logits(base, training_batch(base, rows, skip))
    yield from logits.split([len(row.ids) - row.shared for row in rows])


def training_batch(base: BaseModel, rows: Sequence[Row], skip: int) -> Batch:
    """One pass: of each row every token after the shared ones predicts the next one, the last the first.

    `skip` tokens are the shared prefix.
    """
    width = max(len(row.ids) for row in rows) - skip
    ids = torch.full((len(rows), width), base.pad_id, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        ids[index, : len(row.ids) - skip] = torch.tensor(row.ids[skip:])
        positions += range(index * width + row.shared - skip, index * width + len(row.ids) - skip)
        targets += [*row.ids[row.shared + 1 :], row.ids[0]]
    parts = (torch.tensor(rows[0].ids[:skip], dtype=torch.long), ids, torch.tensor(positions), torch.tensor(targets))
    return Batch(*(part.to(base.device) for part in parts))


def answering_logits(base: BaseModel, groups: Sequence[Sequence[Row]], *, twice: bool = False) -> list[Tensor]:
    """Logits (steps, vocabulary) of each row's answer, in batches as answering makes them of each group.

    `twice`: then the first step of the same without a shared prefix, whose padding stands before all tokens.
    """
    found: list[Tensor] = []
    for rows in groups:
        together = max(row.prompt + row.steps for row in rows) <= base.can.padded_prompts
        lengths = [row.prompt for row in rows]
        for part in _parts(rows, lengths, together=together, alike=base.can.equal_prompts):
            found += _answer_batch(base, part)
    if twice:
        short = [[replace(row, steps=1) for row in rows] for rows in groups]
        found += answering_logits(replace(base, can=base.can.off(["shared_prompts"])), short)
    return found


def _answer_batch(base: BaseModel, rows: Sequence[Row]) -> list[Tensor]:
    """Every row is led along its own tokens; one that has no more of them ends."""
    seen: list[list[Tensor]] = [[] for _ in rows]
    used = {token for row in rows for token in row.ids}
    end = next(token for token in range(base.vocabulary) if token not in used)

    def follow(logits: Tensor, places: Tensor, step: int) -> Tensor:
        tokens = []
        for place, scores in zip(places.tolist(), logits, strict=True):
            row = rows[place]
            goes_on = step < row.steps
            if goes_on:
                seen[place].append(scores.clone())
            tokens.append(row.ids[row.prompt + step] if goes_on else end)
        return torch.tensor(tokens, device=base.device)

    requests = [Request(row.ids[: row.prompt], index) for index, row in enumerate(rows)]
    decoding = Decoding(max(row.steps for row in rows))
    longest = max(row.prompt for row in rows) + decoding.max_new_tokens
    kind = AnsweringBatch if longest <= base.can.own_cache else LibraryBatch
    kind(base, requests, decoding, ends=Ends([end]), choose=follow).answer()
    return [torch.stack(one) if one else torch.empty(0, base.vocabulary, device=base.device) for one in seen]


def _special_ids(facts: Any) -> Iterator[int]:
    """The token ids that a configuration names, at any depth."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(key).endswith(("token_id", "token_index", "token_ids")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
