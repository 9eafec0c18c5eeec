"""Causal attention over the pieces of a pack, with its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.llm.fast.kernels import gather, scatter, softmax_, softmax_back_
from fedlora.llm.fast.layer_parts import LayerParts
from fedlora.llm.fast.packed_rows import Block, Pack, Queries


def attend(qkv: Tensor, pack: Pack, parts: LayerParts) -> tuple[Tensor, list[Tensor]]:
    """Attention of rotated and scaled queries over rotated keys, side by side with the values in qkv (n, ...).

    Returns (n, heads * width), and for the gradient the weights (pieces, heads, queries, keys) of every range of
    queries.
    """
    result = qkv.new_empty(len(qkv), parts.heads * parts.width)
    kept = []
    for block in pack.blocks:
        key, value = _keys_and_values(qkv, block, parts)
        for queries in block.queries:
            query = _queries(qkv, queries, parts)
            scores = torch.bmm(query, key[:, : queries.keys].transpose(1, 2))
            weights = softmax_(scores.view(*_shape(queries, parts), queries.keys), queries.starts, queries.ends)
            answer = torch.bmm(scores, value[:, : queries.keys])
            scatter(result, queries.places, answer.view(*_shape(queries, parts), parts.width))
            kept.append(weights)
    return result, kept


def attend_back(gradient: Tensor, qkv: Tensor, weights: list[Tensor], pack: Pack, parts: LayerParts) -> Tensor:
    """The gradient of qkv (n, ...) from that of the attention's result (n, heads * width)."""
    result = torch.empty_like(qkv)
    # what common beginnings get from the pieces that see them is summed in float32
    sums: dict[int, Tensor] = {}
    left = list(weights)
    for block in reversed(pack.blocks):
        key, value = _keys_and_values(qkv, block, parts)
        to_key, to_value = torch.zeros_like(key), torch.zeros_like(value)
        for queries in reversed(block.queries):
            weight, seen = left.pop(), slice(0, queries.keys)
            query, given = _queries(qkv, queries, parts), _queries(gradient, queries, parts)
            folded = weight.view(len(query), -1, queries.keys)
            to_value[:, seen] += torch.bmm(folded.transpose(1, 2), given)
            to_weights = torch.bmm(given, value[:, seen].transpose(1, 2))
            to_scores = softmax_back_(to_weights.view_as(weight), weight, queries.starts, queries.ends).view_as(folded)
            to_key[:, seen] += torch.bmm(to_scores.transpose(1, 2), query)
            to_query = torch.bmm(to_scores, key[:, seen])
            scatter(result, queries.places, to_query.view(*_shape(queries, parts), parts.width))
        _add_keys_and_values(result, sums, to_key, to_value, block, parts)
    keys = result[:, parts.heads * parts.width :]
    for start, share in sums.items():
        keys[start : start + len(share)] += share.to(qkv.dtype)
    return result


def _add_keys_and_values(
    result: Tensor, sums: dict[int, Tensor], to_key: Tensor, to_value: Tensor, block: Block, parts: LayerParts
) -> None:
    """Write the gradients of a block's own keys and values; those of beginnings go to the sums by their first place."""
    heads, groups, width = parts.heads, parts.groups, parts.width
    shape = (len(block.keys), groups, -1, width)
    to_key, to_value = to_key.view(shape), to_value.view(shape)
    scatter(result[:, heads * width :], block.keys, to_key, block.own)
    scatter(result[:, (heads + groups) * width :], block.keys, to_value, block.own)
    for start, length, pieces in block.prefixes:
        both = torch.cat((to_key[pieces, :, :length], to_value[pieces, :, :length]), dim=1)
        share = both.sum(0, dtype=torch.float32).transpose(0, 1).flatten(1)
        sums[start] = sums[start] + share if start in sums else share


def _queries(x: Tensor, queries: Queries, parts: LayerParts) -> Tensor:
    """The heads of x (n, ...) at the places of queries: (pieces * groups, heads / groups * queries, width)."""
    found = gather(x, queries.places, parts.heads, parts.width)
    return found.view(len(found) * parts.groups, -1, parts.width)


def _keys_and_values(qkv: Tensor, block: Block, parts: LayerParts) -> tuple[Tensor, Tensor]:
    """Keys and values of a block, both (pieces * groups, keys, width)."""
    heads, groups, width = parts.heads, parts.groups, parts.width
    key = gather(qkv[:, heads * width :], block.keys, groups, width)
    value = gather(qkv[:, (heads + groups) * width :], block.keys, groups, width)
    return key.flatten(0, 1), value.flatten(0, 1)


def _shape(queries: Queries, parts: LayerParts) -> tuple[int, int, int]:
    return (len(queries.places), parts.heads, queries.places.shape[1])
