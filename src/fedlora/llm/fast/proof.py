"""The fast path of a base against the base itself, before it trains.

In float32 with the base's weights the gradient of every factor, where a difference is a fault; in the base's own type
the logits, which may be no farther from float32 than the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fedlora.llm.attention import choose_attention, is_batched
from fedlora.llm.base_model import BaseModel
from fedlora.llm.change_lengths import change_lengths
from fedlora.llm.check_files import keep_check, recall_check
from fedlora.llm.dropout import has_own_dropout
from fedlora.llm.exact_numbers import ExactNumbers, find_difference, find_excess
from fedlora.llm.examples import Example
from fedlora.llm.fast.fast_layers import FastLayers
from fedlora.llm.fast.kernels import compiled
from fedlora.llm.gradient_check import TOLERANCE
from fedlora.llm.lora import LoraModel
from fedlora.llm.probes import Row, draw_rows, own_logits

LONGEST = 1024
"""Longest row of the fast path: the attention's weights, which it keeps, grow with the square."""


def with_fast_layers(base: BaseModel, lora: LoraModel, *, again: bool = False) -> BaseModel:
    """The base with the longest row for which the fast path, with these LoRA layers, computes what the base does."""
    if FastLayers.of(base) is None or has_own_dropout(base.model):
        return base
    facts = ("fast layers", compiled() is not None, sorted(lora.layers))
    can = None if again else recall_check(base, *facts)
    if can is None:
        why = _find_fault(base, lora)
        changes = [change.tokens for change in change_lengths(base.model.config)]
        limit = 0 if why else min([LONGEST, *changes])
        reasons = {**base.can.reasons, **({"fast_layers": why} if why else {})}
        can = replace(base.can, fast_layers=limit, reasons=reasons)
        keep_check(base, can, *facts)
    return replace(base, can=can)


def _find_fault(base: BaseModel, lora: LoraModel) -> str | None:
    """How the fast path differs from the base; None where it does not."""
    rows = draw_rows(base)[:2]
    numbers: Any = nullcontext() if base.dtype == torch.float32 else ExactNumbers(base.model)
    with _random_factors(lora), _own_attention(base):
        with numbers:
            logits = own_logits(base, rows)
            expected = _own_gradients(lora, logits, rows)
            # made inside: the weights are other tensors there. A wrong logit makes every gradient wrong
            why = find_difference(_fast_gradients(_parts_of(base), lora, rows), expected, TOLERANCE)
        if why is not None:
            return why.replace("logits", "gradients")
        if base.dtype == torch.float32:
            return None
        with torch.no_grad():
            own = _predicting(own_logits(base, rows), rows)
        return find_excess(_fast_logits(_parts_of(base), rows), own, _predicting(logits, rows))


def _parts_of(base: BaseModel) -> FastLayers:
    found = FastLayers.of(base)
    assert found is not None
    return found


@contextmanager
def _random_factors(lora: LoraModel) -> Iterator[None]:
    """Inside, every factor says something, but less than the base; then all are zero."""
    draw = torch.Generator().manual_seed(0)
    lora.set_adapter(
        {key: 0.3 * torch.randn(shape, generator=draw) / shape[1] ** 0.5 for key, shape in lora.shapes().items()}
    )
    try:
        yield
    finally:
        _clear(lora)
        lora.set_adapter({key: torch.zeros(shape) for key, shape in lora.shapes().items()})


@contextmanager
def _own_attention(base: BaseModel) -> Iterator[None]:
    """Inside, the model runs its own attention."""
    batched = is_batched(base.model)
    if batched:
        choose_attention(base.model, ours=False)
    try:
        yield
    finally:
        if batched:
            choose_attention(base.model, ours=True)


def _example(row: Row) -> Example:
    return Example(row.ids, max(1, row.shared + 1))


def _predicting(logits: Sequence[Tensor], rows: Sequence[Row]) -> list[Tensor]:
    """Of whole rows, the logits that predict a label."""
    return [one[_example(row).labels_from - 1 : -1].detach() for one, row in zip(logits, rows, strict=True)]


def _own_gradients(lora: LoraModel, logits: Sequence[Tensor], rows: Sequence[Row]) -> list[Tensor]:
    total = torch.zeros(())
    for one, row in zip(logits, rows, strict=True):
        start = _example(row).labels_from
        total = total + F.cross_entropy(one[start - 1 : -1].float(), torch.tensor(row.ids[start:]), reduction="sum")
    total.backward()
    return _take_gradients(lora)


@torch.no_grad()
def _fast_logits(fast: FastLayers, rows: Sequence[Row]) -> list[Tensor]:
    examples = [_example(row) for row in rows]
    return list(fast.label_logits(examples).split([example.num_labels for example in examples]))


def _fast_gradients(fast: FastLayers, lora: LoraModel, rows: Sequence[Row]) -> list[Tensor]:
    fast.backward_loss([_example(row) for row in rows], scale=1.0, share=True)
    return _take_gradients(lora)


def _take_gradients(lora: LoraModel) -> list[Tensor]:
    found = [torch.zeros_like(one) if one.grad is None else one.grad.clone() for _, one in lora.named_factors()]
    _clear(lora)
    return found


def _clear(lora: LoraModel) -> None:
    for _, factor in lora.named_factors():
        factor.grad = None
