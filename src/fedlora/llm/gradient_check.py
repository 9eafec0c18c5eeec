"""The gradient of one LoRA layer against that of a plain one, before a base trains.

In the layer's place stands `W x + D x` with a dense `D = s B A`, in the model's own forward pass, one row at a time.
What autograd gives for D is the gradient G of the adapted weight, and the factors' must be `s B.T G` and `s G A.T`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from fedlora.console import say
from fedlora.errors import UsageError
from fedlora.llm.attention import choose_attention, is_batched
from fedlora.llm.base_model import BaseModel
from fedlora.llm.check_files import keep_check, recall_check
from fedlora.llm.exact_numbers import ExactNumbers, find_difference
from fedlora.llm.lora import KEY_PREFIX, LoraModel
from fedlora.llm.loss import backward_loss
from fedlora.llm.probes import Row, draw_rows, own_logits, training_batch

TOLERANCE = 1e-4
"""Largest relative difference of a factor's gradient in float32, ten times that of logits: the way back is as long
again, and its sums cancel more."""


def with_right_gradients(base: BaseModel, lora: LoraModel, quantization: str, *, again: bool = False) -> BaseModel:
    """The base without what spoils the gradient of the first adapted layer; UsageError where it stays wrong."""
    facts = ("gradient", quantization, sorted(lora.layers))
    if base.can.own_attention:
        # a run before may have gone without it, for its own layers
        choose_attention(base.model, ours=True)
    can = None if again else recall_check(base, *facts)
    if can is None:
        can = _find(base, lora).can
        keep_check(base, can, *facts)
    if can.own_attention != base.can.own_attention:
        choose_attention(base.model, ours=can.own_attention)
    new = {name: why for name, why in can.reasons.items() if name not in base.can.reasons}
    if slower := replace(can, reasons=new).sentence():
        say(f"{base.name}, because gradients differ: {slower}")
    return replace(base, can=can)


def _find(base: BaseModel, lora: LoraModel) -> BaseModel:
    name = next(iter(lora.layers))
    rows = draw_rows(base)[:2]
    batched = is_batched(base.model)
    numbers: Any = nullcontext() if base.dtype == torch.float32 else ExactNumbers(base.model)
    with _random_factors(lora, name) as state, numbers:
        expected = _plain_gradients(base, lora, name, state, rows)
        why = ""
        for names in ((), ("own_attention",), ("shared_prefix",), ("padding",)):
            can = base.can.off(names)
            base = replace(base, can=replace(can, reasons={**can.reasons, **dict.fromkeys(names, why)}))
            if batched:
                choose_attention(base.model, ours=base.can.own_attention)
            found = find_difference(_gradients(base, lora, name, rows), expected, TOLERANCE)
            if found is None:
                return base
            why = found.replace("logits", "gradients")
    raise UsageError(
        f"base_model={base.name!r}: the gradient of a LoRA layer at {name} is not that of the weight: {why}",
        hint="choose other layers with --lora_target_modules, or another base model",
    )


@contextmanager
def _random_factors(lora: LoraModel, name: str) -> Iterator[dict[str, Tensor]]:
    """Inside, one layer has factors that say something and all others are zero; then all are zero."""
    zero = {key: torch.zeros(shape) for key, shape in lora.shapes().items()}
    draw = torch.Generator().manual_seed(0)
    own = {
        key: torch.randn(shape, generator=draw) / shape[1] ** 0.5
        for key, shape in lora.shapes().items()
        if key.startswith(f"{KEY_PREFIX}{name}.lora_")
    }
    lora.set_adapter({**zero, **own})
    try:
        yield own
    finally:
        for _, factor in lora.named_factors():
            factor.grad = None
        lora.set_adapter(zero)


def _plain_gradients(base: BaseModel, lora: LoraModel, name: str, state: dict[str, Tensor], rows: Any) -> list[Tensor]:
    """The gradients of A and B by way of a dense layer, through the model's own forward pass."""
    layer = lora.layers[name]
    a, b = layer.a.detach(), layer.b.detach()
    dense = _Dense(layer.base, layer.scaling * b @ a)
    parent, _, child = name.rpartition(".")
    if batched := is_batched(base.model):
        choose_attention(base.model, ours=False)
    setattr(base.model.get_submodule(parent), child, dense)
    try:
        total = torch.zeros((), device=base.device)
        for row, logits in zip(rows, own_logits(base, rows), strict=True):
            targets = torch.tensor([*row.ids[row.shared + 1 :], row.ids[0]], device=base.device)
            total = total + F.cross_entropy(logits[row.shared :].float(), targets, reduction="sum")
        gradient = torch.autograd.grad(total, dense.delta)[0].float()
    finally:
        setattr(base.model.get_submodule(parent), child, layer)
        if batched:
            choose_attention(base.model, ours=True)
    return [layer.scaling * b.t() @ gradient, layer.scaling * gradient @ a.t()]


def _gradients(base: BaseModel, lora: LoraModel, name: str, rows: tuple[Row, ...]) -> list[Tensor]:
    """The same as training computes them."""
    layer = lora.layers[name]
    layer.a.grad = layer.b.grad = None
    skip = rows[0].shared if base.can.shared_prefix else 0
    for part in [rows] if base.can.padding else [[row] for row in rows]:
        backward_loss(base, training_batch(base, part, skip), scale=1.0)
    return [_gradient_of(layer.a), _gradient_of(layer.b)]


def _gradient_of(factor: nn.Parameter) -> Tensor:
    return torch.zeros_like(factor) if factor.grad is None else factor.grad


class _Dense(nn.Module):
    """A layer and a dense matrix beside it, (d_out, d_in), which gets a gradient."""

    def __init__(self, layer: nn.Module, delta: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.delta = nn.Parameter(delta)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(x, self.delta.to(x.dtype))
