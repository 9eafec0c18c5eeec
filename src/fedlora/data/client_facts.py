"""What one pass over a client's file says of it: its SHA-256 and its rows, checked and counted; no row is kept.

Counting tokens takes a tokenizer, so they are counted when the rows are first encoded (`engines.client_data`), and the
first bad row of any file is an error before a model is loaded.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.data.records import iter_rows
from fedlora.errors import DataError
from fedlora.seeds import derive_seed
from fedlora.typed_json import to_json
from fedlora.types import ClientId, Row

T = TypeVar("T")


@dataclass(frozen=True)
class ClientFacts:
    """One client's line in run.json; the counts that take a tokenizer are None until its rows are encoded."""

    client_id: ClientId
    file: str
    sha256: str
    num_examples: int
    num_empty: int
    num_validation: int
    num_skipped: int
    categories: Mapping[str, int]
    num_prompt_tokens: int | None = None
    num_response_tokens: int | None = None
    num_shortened: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of all training examples; ValueError while they are not counted."""
        if self.num_prompt_tokens is None or self.num_response_tokens is None:
            raise ValueError(f"the tokens of client {self.client_id} are not counted")
        return self.num_prompt_tokens + self.num_response_tokens

    def record(self) -> dict[str, Any]:
        """The facts as JSON values, without those that are not counted yet."""
        return to_json(self)


@dataclass(frozen=True)
class ClientFile:
    """A client's file, and what it held when the run began; `inputs` says whether its examples have an input, and has
    both answers where only some do."""

    path: Path
    facts: ClientFacts
    inputs: frozenset[bool] = frozenset()


def read_client_files(
    files: Mapping[ClientId, Path], config: TrainConfig, *, on_row: Callable[[ClientId, Row], None] | None = None
) -> dict[ClientId, ClientFile]:
    """Read each file once; `on_row` is given every row. Each row that is left out is reported; raises what `read_rows`
    raises, and DataError when a client keeps no row to train on."""
    return {client: _read_file(client, path, config, on_row) for client, path in files.items()}


def split_rows(rows: Sequence[T], config: TrainConfig, client_id: ClientId) -> tuple[Sequence[T], Sequence[T]]:
    """Rows to train on and rows held back: `local_val_set_size` of them, drawn by the seed."""
    size = config.local_val_set_size
    if not size:
        return rows, []
    order = list(rows)
    random.Random(derive_seed(config.seed, "local_validation", client_id)).shuffle(order)  # noqa: S311
    return order[size:], order[:size]


def _read_file(
    client: ClientId, path: Path, config: TrainConfig, on_row: Callable[[ClientId, Row], None] | None
) -> ClientFile:
    digest, skipped = hashlib.sha256(), 0
    inputs: set[bool] = set()

    def skip(message: str) -> None:
        nonlocal skipped
        skipped += 1
        say(message)

    # of a row: its category, None where its response is empty
    rows: list[str | None] = []
    for row in iter_rows(path, may_be_empty=True, rules=config.read_rules, on_skip=skip, digest=digest):
        rows.append(row.category if row.output.strip() else None)
        inputs |= {bool(row.input)} if row.output.strip() else set()
        if on_row is not None:
            on_row(client, row)
    training, held_back = split_rows(rows, config, client)
    if config.local_val_set_size and not training:
        raise DataError(
            f"{path}: local_val_set_size={config.local_val_set_size} leaves client {client} none of its "
            f"{len(held_back)} rows to train on",
            hint="lower --local_val_set_size",
        )
    labelled = [category for category in training if category is not None]
    facts = ClientFacts(
        client_id=client,
        file=path.name,
        sha256=digest.hexdigest(),
        num_examples=len(labelled),
        num_empty=len(training) - len(labelled),
        num_validation=sum(category is not None for category in held_back),
        num_skipped=skipped,
        categories=dict(sorted(Counter(labelled).items())),
    )
    return ClientFile(path, facts, frozenset(inputs))
