"""The limits of a base, checked before anything runs: how many positions it has, and which tokens it has rows for.

A learned position ends where its table ends, and a token id beyond the embedding has no row: both would be an index out
of range in the middle of a client's training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fedlora.console import say
from fedlora.errors import UsageError
from fedlora.llm.base_model import BaseModel
from fedlora.llm.examples import Encoder
from fedlora.plain_text import counted
from fedlora.rows import Row, Turn

_SPARE = 8
"""Rows that a table of positions may have beyond the model's length: OPT's begins with two that are never used."""


def check_training(base: BaseModel, encoder: Encoder, cutoff_len: int) -> None:
    """UsageError where examples of `cutoff_len` tokens would have no positions, or the template's tokens no embedding.

    Says when examples may be longer than the base was made for, though it has positions for them.
    """
    check_tokens(base, encoder)
    if cutoff_len > base.can.longest:
        raise UsageError(
            f"cutoff_len={cutoff_len}: past {base.can.longest} tokens base_model={base.name!r} computes a row by "
            "the rows before it",
            hint=f"use --cutoff_len {base.can.longest} or less",
        )
    context = base.context
    if context is None or cutoff_len <= context:
        return
    if has_position_table(base.model, context):
        raise UsageError(
            f"cutoff_len={cutoff_len} is more than the {context} positions of base_model={base.name!r}",
            hint=f"use --cutoff_len {context} or less",
        )
    say(f"warning: cutoff_len={cutoff_len}, but {base.name} was made for {context} tokens; longer ones are new to it")


def check_answers(base: BaseModel, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Say how many answers may end early, because prompt and new tokens pass the end of the base's positions."""
    context = base.context
    short = 0 if context is None else sum(length + max_new_tokens > context for length in lengths)
    if short:
        say(
            f"{base.name} has {context} positions: {counted(short, 'answer')} of {len(lengths)} may end before "
            f"max_new_tokens={max_new_tokens}"
        )


def check_tokens(base: BaseModel, encoder: Encoder) -> None:
    """UsageError that names a token which rows or the template can hold and for which the base has no embedding."""
    rows = base.model.get_input_embeddings().weight.shape[0]
    if len(base.tokenizer) <= rows:
        return
    names = {number: text for text, number in base.tokenizer.get_vocab().items()}
    # an added token comes from the template only: text from data never becomes one
    apart = {number for number, token in base.tokenizer.added_tokens_decoder.items() if token.content.strip()}
    beyond = sorted({number for number in names if number >= rows and number not in apart} | set(_used(encoder, rows)))
    if beyond:
        shown = ", ".join(f"{names[number]!r} ({number})" for number in beyond[:3])
        raise UsageError(
            f"base_model={base.name!r}: its embedding has {rows} rows, but {counted(len(beyond), 'token')} of its "
            f"tokenizer {'is' if len(beyond) == 1 else 'are'} beyond: {shown}",
            hint="use the tokenizer that belongs to the weights, or save the model after resize_token_embeddings",
        )


def has_position_table(model: Any, context: int) -> bool:
    """Whether positions are rows of a table, learned or computed once, that ends at `context`."""
    tables = (
        module.num_embeddings
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    )
    buffers = (size for buffer in model.buffers() if buffer.ndim > 1 for size in buffer.shape)
    return any(context <= size <= context + _SPARE for sizes in (tables, buffers) for size in sizes)


def _used(encoder: Encoder, rows: int) -> Iterator[int]:
    """Ids beyond the embedding that the template or the end of a text brings in."""
    turns = (Turn("user", "a"), Turn("assistant", "a"))
    for before in ((), turns, (Turn("system", "a"), *turns)):
        # a template may have no place for a kind of turn; then no row brings it in
        with contextlib.suppress(UsageError):
            for encoded in encoder.encode([Row("a", "a", "a", "", before)], cutoff=1 << 20, train_on="last"):
                yield from (token for token in encoded.ids if token >= rows)
