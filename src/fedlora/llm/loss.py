"""Cross-entropy on labelled positions only, in chunks.

The gradient with respect to the hidden states is taken chunk by chunk, right after the chunk's
logits, so a vocabulary of 128k needs room for one chunk of logits and not for all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fedlora.llm.base_model import BaseModel
from fedlora.llm.examples import Batch

CHUNK_LABELS = 1024


def backward_loss(base: BaseModel, batch: Batch, *, scale: float) -> float:
    """Accumulate the gradient of `scale * sum(cross-entropy)` over a batch's labels; returns the unscaled sum."""
    if not base.has_plain_head:
        loss = _sum_through_model(base, batch)
        (loss * scale).backward()
        return float(loss.detach())
    hidden = base.hidden(batch.ids, batch.prefix).flatten(0, 1).index_select(0, batch.positions)
    gradient = torch.empty_like(hidden)
    total = 0.0
    for start in range(0, len(batch.targets), CHUNK_LABELS):
        part = slice(start, start + CHUNK_LABELS)
        leaf = hidden[part].detach().requires_grad_()
        loss = F.cross_entropy(base.head(leaf).float(), batch.targets[part], reduction="sum")
        (gradient[part],) = torch.autograd.grad(loss * scale, leaf)
        total += float(loss.detach())
    hidden.backward(gradient)
    return total


@torch.no_grad()
def sum_loss(base: BaseModel, batch: Batch) -> float:
    """Sum of cross-entropy over a batch's labels, without gradients."""
    if not base.has_plain_head:
        return float(_sum_through_model(base, batch))
    hidden = base.hidden(batch.ids, batch.prefix).flatten(0, 1).index_select(0, batch.positions)
    total = 0.0
    for start in range(0, len(batch.targets), CHUNK_LABELS):
        part = slice(start, start + CHUNK_LABELS)
        total += float(F.cross_entropy(base.head(hidden[part]).float(), batch.targets[part], reduction="sum"))
    return total


def _sum_through_model(base: BaseModel, batch: Batch) -> Tensor:
    logits = base.model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)
    return F.cross_entropy(logits.index_select(0, batch.positions).float(), batch.targets, reduction="sum")
