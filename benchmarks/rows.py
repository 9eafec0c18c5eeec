"""The rows that every part is timed on: Dolly rows of real length, or short rows that need no file.

Both sides of a comparison get the same token ids in the same order. Dolly is never part of the repository:
its file is named with --data, and without it only short rows are timed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.data.records import read_rows
from fedlora.data.skills import make_skill_rows
from fedlora.files import write_json
from fedlora.llm.examples import Example, encode_rows
from fedlora.llm.prompts import PromptEncoder
from fedlora.rows import Row

CUTOFF = 512
TEMPLATE = "alpaca"
NUM_SKILLS = 8


def load_rows(data: str | None, count: int, seed: int = 0) -> list[Row]:
    """`count` rows drawn by the seed: of the Dolly file `data`, or short rows (`skills`) when it is None."""
    draw = random.Random(seed)
    if data is not None:
        rows = [row for row in read_rows(Path(data)) if row.output.strip()]
        return draw.sample(rows, count)
    made = make_skill_rows(-(-count // NUM_SKILLS), seed=seed)
    draw.shuffle(made)
    return [Row(row["instruction"], row["context"], row["response"], row["category"]) for row in made[:count]]


def encode(rows: Sequence[Row], tokenizer: Any) -> list[Example]:
    """The rows as token ids with fedlora's default prompt, at most CUTOFF tokens each; for both sides."""
    return encode_rows(rows, PromptEncoder(tokenizer, TEMPLATE), cutoff=CUTOFF).examples


def write_client_file(rows: Sequence[Row], path: Path) -> Path:
    """One client's training file, as allocation writes it."""
    write_json(path, [vars(row) for row in rows])
    return path
