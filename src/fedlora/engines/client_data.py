"""Every client's rows as examples, with what was held back for validation and what was left out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.errors import DataError
from fedlora.files import sha256_of
from fedlora.llm.examples import ExampleSet, encode_rows
from fedlora.llm.prompts import PromptEncoder
from fedlora.seeds import derive_seed
from fedlora.types import ClientId, Row


@dataclass(frozen=True)
class ClientData:
    """One client: what it trains on, what it validates on, and its line in run.json."""

    client_id: ClientId
    training: ExampleSet
    validation: ExampleSet
    facts: dict[str, Any]


def prepare_client(
    client_id: ClientId, file: Path, rows: Sequence[Row], encoder: PromptEncoder, config: TrainConfig
) -> ClientData:
    """Tokenise one client's rows; `local_val_set_size` of them, drawn by the seed, are held back."""
    training_rows, validation_rows = _hold_back(client_id, rows, config)
    if config.local_val_set_size and not training_rows:
        raise DataError(
            f"{file}: local_val_set_size={config.local_val_set_size} leaves client {client_id} "
            f"none of its {len(rows)} rows to train on",
            hint="lower --local_val_set_size",
        )
    training = encode_rows(training_rows, encoder, cutoff=config.cutoff_len, train_on_inputs=config.train_on_inputs)
    validation = encode_rows(validation_rows, encoder, cutoff=config.cutoff_len)
    facts = {
        "client_id": client_id,
        "file": file.name,
        "sha256": sha256_of(file),
        "num_examples": len(training.examples),
        "num_prompt_tokens": training.num_tokens - training.num_labels,
        "num_response_tokens": training.num_labels,
        "num_empty": training.num_empty,
        "num_shortened": training.num_shortened,
        "num_validation": len(validation.examples),
        "categories": dict(sorted(Counter(row.category for row in training_rows if row.output.strip()).items())),
    }
    return ClientData(client_id, training, validation, facts)


def _hold_back(client_id: ClientId, rows: Sequence[Row], config: TrainConfig) -> tuple[Sequence[Row], Sequence[Row]]:
    if not config.local_val_set_size:
        return rows, []
    order = list(rows)
    random.Random(derive_seed(config.seed, "local_validation", client_id)).shuffle(order)  # noqa: S311
    return order[config.local_val_set_size :], order[: config.local_val_set_size]
