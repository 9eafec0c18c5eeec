"""Every client's rows as examples, read when the client's turn comes and forgotten afterwards.

What stays in memory is one line of facts per client, so it does not grow with their rows. A file is encoded when its
client is first drawn, and must then be the file that was read at the start; the tokens wait on disk (`TokenFiles`), or,
without that cache, the file is read and encoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedlora.config.train import TrainConfig, TrainOn
from fedlora.data.client_facts import ClientFacts, ClientFile, split_rows
from fedlora.data.held_out import prompt_key
from fedlora.data.records import iter_rows
from fedlora.errors import DataError, UsageError
from fedlora.llm.examples import Encoder, Example, ExampleSet, encode_rows
from fedlora.llm.token_files import TokenFiles, fingerprint_tokenizer
from fedlora.rows import PromptShape, Row
from fedlora.types import ClientId


class ClientExamples:
    """What the clients train on and validate on; `facts` has a line for each. UsageError where the template of an
    example leaves no room for a response."""

    def __init__(
        self,
        clients: Mapping[ClientId, ClientFile],
        encoder: Encoder,
        config: TrainConfig,
        tokens: TokenFiles | None,
    ) -> None:
        self.files = dict(clients)
        self.facts = {client: file.facts for client, file in clients.items()}
        self.encoder = encoder
        self.config = config
        self.tokens = tokens
        self._tokenizer = fingerprint_tokenizer(encoder.tokenizer)
        found: dict[PromptShape, str] = {}
        for file in clients.values():
            for shape, row in file.shapes.items():
                found.setdefault(shape, f"{file.path}: row {row}")
        for shape, place in sorted(found.items()):
            with _at(place):
                encoder.check(shape, cutoff=config.cutoff_len, train_on=config.trained_tokens)

    @property
    def names(self) -> dict[ClientId, str]:
        """The name of every client's file, for `shown_client`."""
        return {client: facts.file for client, facts in self.facts.items()}

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

    def count_tokens(self, client_id: ClientId) -> ClientFacts:
        """A client's facts with its tokens counted, its rows encoded for that if they are not yet."""
        if self.facts[client_id].num_prompt_tokens is None:
            self._load(client_id)
        return self.facts[client_id]

    def count_all_tokens(self) -> None:
        """Complete the facts of clients that were never drawn, but of those whose file has changed since the start."""
        for client in self.facts:
            with contextlib.suppress(DataError):
                self.count_tokens(client)

    def _load(self, client_id: ClientId) -> tuple[ExampleSet, ExampleSet]:
        key = self._key(client_id)
        found = self.tokens.load(key) if self.tokens else None
        if found is None:
            with _at(str(self.files[client_id].path)):
                found = self._encode(client_id)
            if self.tokens:
                self.tokens.save(key, *found)
        training, _ = found
        self.facts[client_id] = replace(
            self.facts[client_id],
            num_prompt_tokens=training.num_tokens - training.num_labels,
            num_response_tokens=training.num_labels,
            num_shortened=training.counts.num_shortened,
            num_control=training.counts.num_control,
            num_turns=training.counts.num_turns,
            num_cut_turns=training.counts.num_cut_turns,
        )
        return found

    def _encode(self, client_id: ClientId) -> tuple[ExampleSet, ExampleSet]:
        """Row by row, in as many passes over the file as it takes to know which rows train: no row is kept."""
        config, cutoff = self.config, self.config.cutoff_len
        if not config.test_share and not config.local_val_set_size:
            rows = self._read(client_id)
            return encode_rows(rows, self.encoder, cutoff=cutoff, train_on=config.trained_tokens), ExampleSet([])
        prompts = [prompt_key(row) if config.test_share else None for row in self._read(client_id)]
        split = split_rows(range(len(prompts)), prompts, config, client_id)
        training = self._encode_places(client_id, split.training, config.trained_tokens)
        return training, self._encode_places(client_id, split.validation, config.measured_tokens)

    def _encode_places(self, client_id: ClientId, places: Sequence[int], train_on: TrainOn) -> ExampleSet:
        """The examples of the rows at these places of the file, in the order of the places."""
        wanted, labelled = set(places), []

        def chosen() -> Iterator[Row]:
            for place, row in enumerate(self._read(client_id) if wanted else ()):
                if place in wanted:
                    if row.output.strip():
                        labelled.append(place)
                    yield row

        found = encode_rows(chosen(), self.encoder, cutoff=self.config.cutoff_len, train_on=train_on)
        at = dict(zip(labelled, found.examples, strict=True))
        return ExampleSet([at[place] for place in places if place in at], found.counts)

    def _read(self, client_id: ClientId) -> Iterator[Row]:
        """The rows of the file that was read at the start; DataError after the last when it is another. Which rows are
        left out was said then, and is not said again."""
        file, digest = self.files[client_id], hashlib.sha256()
        # a file that was read once and now cannot be has changed, like one with other bytes
        with contextlib.suppress(DataError, UsageError):
            yield from iter_rows(
                file.path,
                may_be_empty=True,
                rules=self.config.read_rules,
                on_skip=lambda message: None,
                digest=digest,
            )
        if digest.hexdigest() != file.facts.sha256:
            raise DataError(
                f"{file.path}: changed or gone since the run began",
                hint="restore the file, or start the run again with --overwrite",
            )

    def _key(self, client_id: ClientId) -> list[Any]:
        """Everything the tokens depend on; who the client is matters only where the seed draws its validation rows."""
        config, digest = self.config, self.facts[client_id].sha256
        drawn = [config.local_val_set_size, config.seed, client_id] if config.local_val_set_size else []
        settings = [self.encoder.settings.record(), config.cutoff_len, config.trained_tokens, config.measured_tokens]
        drawn += ["test_share", config.test_share, config.seed] if config.test_share else []
        return [digest, self._tokenizer, *settings, *drawn, *sorted(config.read_rules.record().items())]


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    """Adds the place to the error of rows that the template or the tokenizer cannot take."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{place}: {error}", hint=error.hint) from error
