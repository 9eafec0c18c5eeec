"""The row lengths at which a model's configuration says that it computes differently."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_NAMES = re.compile(r"window|chunk|local_attention|index_topk|block_size|compress")
_ORIGINAL = "original_max_position_embeddings"
_STATIC_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}
"""Kinds of rotary positions whose frequencies are the same for rows of any length."""


@dataclass(frozen=True, order=True)
class ChangeLength:
    """Rows of more than `tokens` are computed differently; `in_positions`: all of their positions are."""

    tokens: int
    in_positions: bool


def change_lengths(config: Any) -> list[ChangeLength]:
    """The lengths that the text part of a configuration names, shortest first, up to its number of positions."""
    facts = config.get_text_config().to_dict()
    end = facts.get("max_position_embeddings")
    found = {ChangeLength(size, False) for size in _sizes(facts)}
    kinds = set(_rope_kinds(facts)) - _STATIC_ROPE
    if kinds:
        found |= {ChangeLength(size, True) for size in _sizes(facts, _ORIGINAL)}
    if any("dynamic" in kind for kind in kinds) and isinstance(end, int):
        found.add(ChangeLength(end, True))
    longest = end if isinstance(end, int) and end > 0 else None
    return sorted(one for one in found if longest is None or one.tokens < longest or one.in_positions)


def _sizes(facts: Any, name: str | None = None) -> Iterator[int]:
    """Positive integers, alone or in lists, under names that speak of a length, at any depth."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _sizes(value, name)
        speaks = key == name if name else _NAMES.search(str(key)) and "layers" not in str(key)
        if speaks:
            for size in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(size, int) and not isinstance(size, bool) and size > 0:
                    yield size


def _rope_kinds(facts: Any) -> Iterator[str]:
    """The kinds of rotary positions that a configuration names, at any depth."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _rope_kinds(value)
        elif key == "rope_type" and isinstance(value, str):
            yield value
