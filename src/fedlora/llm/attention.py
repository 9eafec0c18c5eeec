"""Attention as batched matrix products, for CPUs.

torch's fused CPU kernel is slow backwards (in bfloat16 about eight times its forward pass) and for a
single query. Grouped queries are folded into rows of one product per key-value head, so keys and
values are never repeated; causal queries go block by block, and a block sees no key after its end.
Registered through transformers' own interfaces: every model that can run `sdpa` gains. Long sequences
stay with the fused kernel, whose memory does not grow with the square.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NAME = "fedlora_batched"
BLOCK = 128
"""Queries of a causal block: what lies above the diagonal is computed within a block only."""

_MINDED = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
"""What `sdpa` takes by name and batched products mind as well; of `is_causal` only the usual value."""

LONGEST = 640
"""Longest query for which plain products were faster than the fused kernel, forward and backward."""


def use_batched_attention(model: Any) -> None:
    """Switch a model that runs `sdpa` over to batched products; other implementations are left alone."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        _register(NAME, batched_attention)
        model.set_attn_implementation(NAME)


def is_batched(model: Any) -> bool:
    """Whether a model runs batched products."""
    return getattr(model.config, "_attn_implementation", None) == NAME


def choose_attention(model: Any, *, ours: bool) -> None:
    """Let a model that can run batched products run them, or its own `sdpa` again."""
    model.set_attn_implementation(NAME if ours else "sdpa")


@contextmanager
def watched_attention(model: Any) -> Iterator[set[str]]:
    """Inside, a model runs batched products, and the set fills with the names of options that only `sdpa` minds."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: set[str] = set()
    minded = set(inspect.signature(sdpa_attention_forward).parameters) - _MINDED

    def watch(*arguments: Any, **options: Any) -> tuple[Tensor, None]:
        seen.update(name for name in minded & options.keys() if options[name] is not None)
        if options.get("is_causal") is False:
            seen.add("is_causal")
        return batched_attention(*arguments, **options)

    _register(f"{NAME}_watched", watch)
    model.set_attn_implementation(f"{NAME}_watched")
    try:
        yield seen
    finally:
        model.set_attn_implementation(NAME)


def _register(name: str, attention: Callable[..., tuple[Tensor, None]]) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def batched_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of query (rows, heads, q, d) over key and value (rows, groups, k, d); returns (rows, q, heads, d).

    Without a mask a query of several tokens is causal, as under `sdpa`.
    """
    if query.shape[2] > LONGEST or options.get("dropout"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling") or query.shape[3] ** -0.5
    if query.shape[2] == 1:
        return _attend_once(query * scaling, key, value, attention_mask), None
    return FoldedAttention.apply(query * scaling, key, value, attention_mask), None  # type: ignore[return-value]


class FoldedAttention(torch.autograd.Function):
    """Attention of scaled queries (rows, heads, q, d) over keys and values (rows, groups, k, d) -> (rows, q, heads, d).

    Backwards the masked entries need no treatment of their own, for their weights are zero; autograd would
    copy and mask every score once more, and keep the scores beside the weights.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, length, width = query.shape
        groups = key.shape[1]
        result = query.new_empty(rows, length, heads, value.shape[3])
        kept = []
        for begin, end, seen in _blocks(length, key.shape[2], mask):
            block = query[:, :, begin:end].reshape(rows, groups, -1, width)
            scores = torch.matmul(block, key[:, :, :seen].transpose(2, 3)).view(rows, heads, end - begin, seen)
            if mask is not None:
                _mask_in_place(scores, mask)
            else:
                future = torch.ones(end - begin, end - begin, dtype=torch.bool, device=query.device).triu(1)
                scores[..., begin:].masked_fill_(future, float("-inf"))
            weights = torch.softmax(scores, dim=-1).view(rows, groups, -1, seen)
            answer = torch.matmul(weights, value[:, :, :seen])
            result[:, begin:end] = answer.view(rows, heads, end - begin, -1).transpose(1, 2)
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks = list(_blocks(length, key.shape[2], mask))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        rows, heads, _, width = query.shape
        groups = key.shape[1]
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (begin, end, seen), weights in zip(ctx.blocks, kept, strict=True):
            gradient = gradients[0][:, begin:end].transpose(1, 2).reshape(rows, groups, -1, value.shape[3])
            to_value[:, :, :seen] += torch.matmul(weights.transpose(2, 3), gradient)
            to_weights = torch.matmul(gradient, value[:, :, :seen].transpose(2, 3))
            to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            to_query[:, :, begin:end] = torch.matmul(to_scores, key[:, :, :seen]).view(rows, heads, end - begin, width)
            block = query[:, :, begin:end].reshape(rows, groups, -1, width)
            to_key[:, :, :seen] += torch.matmul(to_scores.transpose(2, 3), block)
        return to_query, to_key, to_value, None


def _blocks(length: int, keys: int, mask: Tensor | None) -> Iterator[tuple[int, int, int]]:
    """(first query, end, keys seen) of each block; with a mask of its own, all queries see all keys."""
    if mask is not None:
        yield 0, length, keys
        return
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        yield begin, end, end


def _attend_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """One scaled query a row (rows, heads, 1, d); returns (rows, 1, heads, d)."""
    rows, heads, _, width = query.shape
    folded = query.view(rows, key.shape[1], -1, width)
    # with few queries torch copies the transposed keys; transposing the queries copies next to nothing
    scores = torch.matmul(key, folded.transpose(2, 3).contiguous()).transpose(2, 3)
    scores = scores.reshape(rows, heads, 1, key.shape[2])
    if mask is not None:
        _mask_in_place(scores, mask)
    weights = torch.softmax(scores, dim=-1).view(rows, key.shape[1], -1, key.shape[2])
    return torch.matmul(weights, value).view(rows, 1, heads, -1)


def _mask_in_place(scores: Tensor, mask: Tensor) -> None:
    """Apply a mask of True (seen) or of numbers to add. A query that sees nothing (padding) gets equal weights."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    else:
        scores += mask
