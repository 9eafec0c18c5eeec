"""Attention as batched matrix products, for CPUs.

torch's fused CPU kernel is slow backwards (in bfloat16 about eight times its forward pass) and for a
single query. Grouped queries are folded into rows of one product per key-value head, so keys and
values are never repeated. Registered through transformers' own interfaces: every model that can run
`sdpa` gains. Long sequences stay with the fused kernel, whose memory does not grow with the square.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "fedlora_batched"
LONGEST = 640
"""Longest query for which plain products were faster than the fused kernel, forward and backward."""


def use_batched_attention(model: Any) -> None:
    """Switch a model that runs `sdpa` over to batched products; other implementations are left alone."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(NAME, batched_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def batched_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of query (rows, heads, q, d) over key and value (rows, groups, k, d); returns (rows, q, heads, d).

    Without a mask a query of several tokens is causal, as under `sdpa`.
    """
    if query.shape[2] > LONGEST or options.get("dropout"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows, heads, length, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    scaling = options.get("scaling") or width**-0.5
    folded = (query * scaling).reshape(rows, groups, heads // groups * length, width)
    if length == 1:
        # with few queries torch copies the transposed keys; transposing the queries copies next to nothing
        products = torch.matmul(key, folded.transpose(2, 3).contiguous()).transpose(2, 3)
    else:
        products = torch.matmul(folded, key.transpose(2, 3))
    scores = products.reshape(rows, heads, length, keys)
    if attention_mask is not None:
        scores = _add_mask(scores, attention_mask)
    elif length > 1:
        future = torch.ones(length, keys, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    weights = torch.softmax(scores, dim=-1).view(rows, groups, heads // groups * length, keys)
    result = torch.matmul(weights, value).view(rows, heads, length, width)
    return result.transpose(1, 2).contiguous(), None


def _add_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """Apply a mask of True (seen) or of numbers to add. A query that sees nothing (padding) gets equal weights."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask
