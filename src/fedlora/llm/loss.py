"""Cross-entropy on labelled positions only, in chunks.

The gradient with respect to the hidden states is taken chunk by chunk, right after the chunk's
logits, so a vocabulary of 128k needs room for one chunk of logits and not for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fedlora.llm.base_model import BaseModel
from fedlora.llm.examples import Batch

LOGIT_BYTES = {"cpu": 150_000_000, "cuda": 600_000_000}
"""About what the logits of one chunk take, with what is computed from them; a GPU wants larger products."""

BYTES_PER_LOGIT = 12
"""Each once in the base's type, once in float32, and once more while one becomes the other."""

BYTES_PER_OWN_LOGIT = 36
"""The same where the model's own code scales and caps, and autograd keeps the steps."""


def backward_loss(base: BaseModel, batch: Batch, *, scale: float) -> Tensor:
    """Accumulate the gradient of `scale * sum(cross-entropy)` over a batch's labels; returns the unscaled sum ()."""
    if base.can.head == "model":
        loss = _sum_through_model(base, batch)
        (loss * scale).backward()
        return loss.detach()
    hidden = label_states(base, batch)
    gradient = torch.empty_like(hidden)
    total = torch.zeros((), device=hidden.device)
    for part in _chunks(base, batch):
        loss, gradient[part] = _loss_and_gradient(base, hidden[part].detach(), batch.targets[part], scale)
        total += loss
    hidden.backward(gradient)
    return total


@torch.no_grad()
def sum_loss(base: BaseModel, batch: Batch) -> Tensor:
    """Sum () of cross-entropy over a batch's labels, without gradients."""
    if base.can.head == "model":
        return _sum_through_model(base, batch)
    hidden = label_states(base, batch)
    total = torch.zeros((), device=hidden.device)
    for part in _chunks(base, batch):
        total += F.cross_entropy(base.head(hidden[part]).float(), batch.targets[part], reduction="sum")
    return total


@torch.no_grad()
def label_losses(base: BaseModel, batch: Batch) -> Tensor:
    """The cross-entropy (labels,) at each of a batch's labels, in float32, without gradients."""
    return torch.cat([F.cross_entropy(logits, targets, reduction="none") for logits, targets in _scored(base, batch)])


@torch.no_grad()
def label_scores(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """As `label_losses`, and whether each label (labels,) is the most probable token."""
    losses, greedy = [], []
    for logits, targets in _scored(base, batch):
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        greedy.append(logits.argmax(dim=-1) == targets)
    return torch.cat(losses), torch.cat(greedy)


def _scored(base: BaseModel, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (n, vocabulary) in float32 and targets (n,), chunk by chunk; all at once where the model needs that."""
    if base.can.head == "model":
        yield label_logits(base, batch).float(), batch.targets
        return
    hidden = label_states(base, batch)
    for part in _chunks(base, batch):
        yield base.head(hidden[part]).float(), batch.targets[part]


def label_states(base: BaseModel, batch: Batch) -> Tensor:
    """The hidden states (labels, d) that predict a batch's targets."""
    return base.hidden(batch.ids, batch.prefix).flatten(0, 1).index_select(0, batch.positions)


def label_logits(base: BaseModel, batch: Batch) -> Tensor:
    """The logits (labels, vocabulary) of a batch's targets, all at once."""
    if base.can.head == "model":
        return base.model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1).index_select(0, batch.positions)
    return base.head(label_states(base, batch))


def _loss_and_gradient(base: BaseModel, hidden: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropy () over labels (n,) and the gradient (n, d) of `scale` times it.

    For a plain output layer the gradient is written down, softmax less one at the target, in the place of the
    softmax itself: autograd would keep and pass over every logit twice as often.
    """
    head = base.model.get_output_embeddings()
    is_plain = base.can.head == "linear" and type(head) is torch.nn.Linear and hidden.dtype == head.weight.dtype
    if not is_plain:
        leaf = hidden.requires_grad_()
        loss = F.cross_entropy(base.head(leaf).float(), targets, reduction="sum")
        # adapted layers of the head get their gradient here as well
        (loss * scale).backward()
        return loss.detach(), cast(Tensor, leaf.grad)
    with torch.no_grad():
        shares = torch.log_softmax(head(hidden), dim=-1, dtype=torch.float32)
        at_targets = targets[:, None]
        loss = -shares.gather(1, at_targets).sum()
        shares.exp_().scatter_add_(1, at_targets, shares.new_full(at_targets.shape, -1.0))
        return loss, (shares.to(hidden.dtype) @ head.weight).mul_(scale)


def _chunks(base: BaseModel, batch: Batch) -> Iterator[slice]:
    """Slices of the labels whose logits fit into memory together."""
    each = BYTES_PER_LOGIT if base.can.head == "linear" else BYTES_PER_OWN_LOGIT
    size = max(1, LOGIT_BYTES[base.device.type] // (each * base.vocabulary))
    for start in range(0, len(batch.targets), size):
        yield slice(start, start + size)


def _sum_through_model(base: BaseModel, batch: Batch) -> Tensor:
    return F.cross_entropy(label_logits(base, batch).float(), batch.targets, reduction="sum")
