"""Which rows of a client are held out: drawn by the seed, by prompt, the same for every method.

Rows with one prompt stand on one side, so no held-out prompt is trained on in the same file. The draw depends on seed
and prompt and not on the client, so a prompt that two clients have mostly falls on one side for both.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence

from fedlora.seeds import derive_seed
from fedlora.types import Row


def prompt_key(row: Row) -> bytes | None:
    """A hash of a row's prompt; None where the response is empty, for such a row measures nothing."""
    return hashlib.sha256(json.dumps(row.prompt).encode()).digest()[:16] if row.output.strip() else None


def draw_rows(prompts: Sequence[bytes | None], count: int, seed: int, purpose: str) -> frozenset[int]:
    """The positions of `count` rows, or of a few more where prompts repeat; at least one prompt is never drawn.

    Rows without a prompt are not drawn. Fewer come back where the rows have too few different prompts.
    """
    places: defaultdict[bytes, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        if prompt is not None:
            places[prompt].append(place)
    salt = str(derive_seed(seed, purpose)).encode()
    order = sorted(places, key=lambda prompt: hashlib.sha256(salt + prompt).digest())
    drawn: list[int] = []
    for prompt in order[:-1]:
        if len(drawn) >= count:
            break
        drawn += places[prompt]
    return frozenset(drawn)


def draw_test_rows(prompts: Sequence[bytes | None], share: float, seed: int) -> frozenset[int]:
    """The positions of `share` of a client's rows, at least one where it has two prompts: its test rows."""
    labelled = sum(prompt is not None for prompt in prompts)
    return draw_rows(prompts, max(1, round(share * labelled)), seed, "test_rows") if share and labelled else frozenset()
