"""A key-value cache with room: new tokens are written in place, finished rows leave without moving the others.

transformers' own cache is a concatenation that copies every key and value at every step, which on a CPU
costs more than the matrix products of the step. Attention sees the whole buffer, room included and masked:
a shorter view is not contiguous, and a batched product would copy it at every step. Layers with a sliding
window keep transformers' class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK_TOKENS = 64
"""Room is made this many tokens at a time: one copy in as many steps, and at most so much masked room to compute."""


def room_for(length: int) -> int:
    """The next multiple of the block that leaves room for at least one token more."""
    return (length // BLOCK_TOKENS + 1) * BLOCK_TOKENS


class RoomyLayer(DynamicLayer):
    """Keys and values in buffers (rows, groups, room, d), zero after the `length` tokens that are written."""

    # None only until the first update, which every other method comes after
    keys: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values (rows, groups, q, d) after the old ones; returns the buffers with their room.

        The first call returns what it was given: attention over a prompt alone needs no room.
        """
        end = self.length + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values, self.length = key_states, value_states, end
            return key_states, value_states
        if end > self.keys.shape[2]:
            self.keys = self._with_room(self.keys, end)
            self.values = self._with_room(self.values, end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens written so far."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next update returns."""
        if not self.is_initialized:
            return query_length, 0
        needed = self.length + query_length
        room = self.keys.shape[2]
        return (room if needed <= room else room_for(needed)), 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row `indices[i]` in place i; when rows leave, one that stays in place is not touched."""
        if len(indices) > len(self.keys):
            self.keys, self.values = self.keys[indices], self.values[indices]
            return
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for buffer in (self.keys, self.values):
            buffer[moved, :, : self.length] = buffer[indices[moved], :, : self.length]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]

    def _with_room(self, old: Tensor, end: int) -> Tensor:
        new = old.new_zeros(*old.shape[:2], room_for(end), old.shape[3])
        new[:, :, : self.length] = old[:, :, : self.length]
        return new


def make_cache(config: Any) -> DynamicCache:
    """An empty cache for a model's configuration."""
    cache = DynamicCache(config=config)
    # a cache made without a list of layers makes them as they are asked for; those stay transformers' own
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_share_rows(config: Any) -> bool:
    """Whether every layer sees all tokens before it, so that padding between two real tokens hides nothing."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
