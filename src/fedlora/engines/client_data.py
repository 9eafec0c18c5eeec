"""Every client's rows as examples, read when the client's turn comes and forgotten afterwards.

At the start of a run each file is read once and counted; what stays is one line of facts per client, so
memory does not grow with their number. The tokens wait on disk (`TokenFiles`), or, without that cache,
the file is read and encoded again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.data.records import read_rows
from fedlora.errors import DataError
from fedlora.files import sha256_of
from fedlora.llm.examples import Example, ExampleSet, encode_rows
from fedlora.llm.prompts import PromptEncoder
from fedlora.llm.token_files import TokenFiles, fingerprint_tokenizer
from fedlora.seeds import derive_seed
from fedlora.types import ClientId, Row


@dataclass(frozen=True)
class ClientFacts:
    """One client's line in run.json."""

    client_id: ClientId
    file: str
    sha256: str
    num_examples: int
    num_prompt_tokens: int
    num_response_tokens: int
    num_empty: int
    num_shortened: int
    num_validation: int
    num_skipped: int
    categories: dict[str, int]

    def record(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)


class ClientExamples:
    """What the clients train on and validate on; `facts` has a line for each, counted here unless given."""

    def __init__(
        self,
        files: Sequence[Path],
        encoder: PromptEncoder,
        config: TrainConfig,
        tokens: TokenFiles | None,
        facts: Mapping[ClientId, ClientFacts] | None = None,
        *,
        only: Sequence[ClientId] | None = None,
    ) -> None:
        self.files = list(files)
        self.encoder = encoder
        self.config = config
        self.tokens = tokens
        self._tokenizer = fingerprint_tokenizer(encoder.tokenizer)
        counted = range(len(self.files)) if only is None else only
        self.facts = dict(facts or {client: self._count(client) for client in counted})

    def clients(self) -> list[ClientId]:
        """Clients that have something to train on."""
        return [client for client, facts in self.facts.items() if facts.num_examples]

    def training(self, client_id: ClientId) -> list[Example]:
        """A client's training examples."""
        return self._load(client_id)[0].examples

    def validation(self) -> Iterator[list[Example]]:
        """What each client held back, one client after another."""
        for client, facts in self.facts.items():
            if facts.num_validation:
                yield self.own_validation(client)

    def own_validation(self, client_id: ClientId) -> list[Example]:
        """What one client held back."""
        return self._load(client_id)[1].examples if self.facts[client_id].num_validation else []

    def _count(self, client_id: ClientId) -> ClientFacts:
        file, config = self.files[client_id], self.config
        digest = sha256_of(file)
        skipped: list[str] = []
        rows, held_back = self._read(client_id, skipped.append)
        if config.local_val_set_size and not rows:
            raise DataError(
                f"{file}: local_val_set_size={config.local_val_set_size} leaves client {client_id} "
                f"none of its {len(held_back)} rows to train on",
                hint="lower --local_val_set_size",
            )
        training, validation = self._kept(client_id, digest) or self._encode(client_id, digest, rows, held_back)
        return ClientFacts(
            client_id=client_id,
            file=file.name,
            sha256=digest,
            num_examples=len(training.examples),
            num_prompt_tokens=training.num_tokens - training.num_labels,
            num_response_tokens=training.num_labels,
            num_empty=training.num_empty,
            num_shortened=training.num_shortened,
            num_validation=len(validation.examples),
            num_skipped=len(skipped),
            categories=dict(sorted(Counter(row.category for row in rows if row.output.strip()).items())),
        )

    def _load(self, client_id: ClientId) -> tuple[ExampleSet, ExampleSet]:
        digest = self.facts[client_id].sha256
        if kept := self._kept(client_id, digest):
            return kept
        file = self.files[client_id]
        if not file.is_file() or sha256_of(file) != digest:
            raise DataError(
                f"{file}: changed or gone since the run began",
                hint="restore the file, or start the run anew with --overwrite",
            )
        return self._encode(client_id, digest, *self._read(client_id))

    def _kept(self, client_id: ClientId, digest: str) -> tuple[ExampleSet, ExampleSet] | None:
        return self.tokens.load(self._key(client_id, digest)) if self.tokens else None

    def _encode(
        self, client_id: ClientId, digest: str, rows: Sequence[Row], held_back: Sequence[Row]
    ) -> tuple[ExampleSet, ExampleSet]:
        config = self.config
        training = encode_rows(rows, self.encoder, cutoff=config.cutoff_len, train_on_inputs=config.train_on_inputs)
        validation = encode_rows(held_back, self.encoder, cutoff=config.cutoff_len)
        if self.tokens:
            self.tokens.save(self._key(client_id, digest), training, validation)
        return training, validation

    def _key(self, client_id: ClientId, digest: str) -> list[Any]:
        """Everything the tokens depend on; who the client is matters only where the seed draws its validation rows."""
        config = self.config
        drawn = [config.local_val_set_size, config.seed, client_id] if config.local_val_set_size else []
        settings = [self.encoder.template, config.cutoff_len, config.train_on_inputs]
        return [digest, self._tokenizer, *settings, *drawn, *sorted(config.read_rules.record().items())]

    def _read(
        self, client_id: ClientId, on_skip: Callable[[str], None] = lambda message: None
    ) -> tuple[Sequence[Row], Sequence[Row]]:
        """Rows to train on and rows held back: `local_val_set_size` of them, drawn by the seed.

        Which rows are left out was said when the files were checked, and is not said again.
        """
        rows = read_rows(self.files[client_id], may_be_empty=True, rules=self.config.read_rules, on_skip=on_skip)
        size = self.config.local_val_set_size
        if not size:
            return rows, []
        order = list(rows)
        random.Random(derive_seed(self.config.seed, "local_validation", client_id)).shuffle(order)  # noqa: S311
        return order[size:], order[:size]
