"""Batches that an endpoint works on, and what was spent since the first of them: kept beside the verdicts.

A batch is on record as soon as its file is uploaded and before it is created. A process that dies in between leaves a
record without an id: the next one looks for the batch of that file before it creates one, so nothing is paid for twice.
The record is removed once all results are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedlora.errors import DataError
from fedlora.evaluation.judge.protocol import Order
from fedlora.evaluation.judge.replies import FailureKind, Usage
from fedlora.evaluation.judge.spending import Spent
from fedlora.files import read_text, write_json

MOST_TIMES = 3
"""Replies without a verdict on a question, after which it is not asked again until there is a result."""


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class SentQuestion(_Record):
    """What of a question is needed to store its verdict."""

    key: str
    row: int
    order: Order
    reasons: bool = False
    repeat: int = 1


class SentRequest(_Record):
    """One request of a batch; `code` is its custom_id, `most_in` and `most_out` the most tokens that it can take."""

    code: str
    questions: list[SentQuestion]
    most_in: int
    most_out: int

    @property
    def most(self) -> Usage:
        """The most tokens."""
        return Usage(self.most_in, self.most_out)


class SentBatch(_Record):
    """A batch of one model at one host; `id` is empty until the endpoint has said it."""

    model: str
    host: str
    file: str
    id: str = ""
    since: int
    """Seconds since 1970, when its file was uploaded."""
    requests: list[SentRequest]


class Tried(_Record):
    """How many replies of batches brought no verdict on a question, and why the last one did not."""

    times: int
    kind: FailureKind


class _State(_Record):
    batches: list[SentBatch] = Field(default_factory=list)
    spent: Spent = Field(default_factory=Spent)
    tried: dict[str, Tried] = Field(default_factory=dict)
    dropped: dict[str, list[str]] = Field(default_factory=dict)
    """What a model does not take of a request, by its host and name."""


class BatchState:
    """The record at `path`; without a file there is nothing on it. DataError where it was edited."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = _State()
        if path.is_file():
            try:
                self._state = _State.model_validate_json(read_text(path))
            except ValidationError:
                hint = "if no batch is worked on, delete the file; else restore it, or its batches are paid for again"
                raise DataError(f"{path}: not a record of batches", hint=hint) from None

    @property
    def spent(self) -> Spent:
        """Since the first batch."""
        return self._state.spent

    @property
    def tried(self) -> dict[str, Tried]:
        """By the key of the question; changed in place."""
        return self._state.tried

    def known(self, model: str, host: str) -> list[str] | None:
        """What a model does not take of a request; None where that was not found yet."""
        return self._state.dropped.get(f"{host}/{model}")

    def learn(self, model: str, host: str, dropped: Iterable[str]) -> None:
        """Put on record what a model does not take; on disk when this returns."""
        self._state.dropped[f"{host}/{model}"] = sorted(dropped)
        self.save()

    @property
    def batches(self) -> list[SentBatch]:
        """Those that are not collected."""
        return list(self._state.batches)

    def of(self, model: str, host: str) -> list[SentBatch]:
        """The batches of one judge."""
        return [batch for batch in self._state.batches if (batch.model, batch.host) == (model, host)]

    @property
    def keys(self) -> set[str]:
        """Of the questions in all batches."""
        return set(_keys(self._state.batches))

    def add(self, batch: SentBatch) -> None:
        """Put a batch on record; on disk when this returns."""
        self._state.batches.append(batch)
        self.save()

    def name(self, batch: SentBatch, id: str) -> SentBatch:
        """Put the id of a batch on record, which is on disk when this returns; the batch with it."""
        named = batch.model_copy(update={"id": id})
        batches = [named if one is batch else one for one in self._state.batches]
        self._state = self._state.model_copy(update={"batches": batches})
        self.save()
        return named

    def remove(self, batch: SentBatch, spent: Spent) -> None:
        """A batch is collected or was never created, and `spent` is what it cost; on disk when this returns."""
        self._state.batches.remove(batch)
        self.count(spent)

    def count(self, spent: Spent) -> None:
        """Add to what was spent; on disk when this returns."""
        self._state = self._state.model_copy(update={"spent": self._state.spent.plus(spent)})
        self.save()

    def save(self) -> None:
        """Write what was changed in place."""
        write_json(self.path, self._state.model_dump(mode="json"))

    def give_up(self) -> None:
        """There is no result: the next call asks again what had no verdict, as if for the first time."""
        if self._state.tried and not self._state.batches:
            self._state.tried.clear()
            self.save()

    def close(self) -> None:
        """All results are written: of a record without batches nothing is left."""
        if self._state.batches:
            self._state = _State(batches=self._state.batches, dropped=self._state.dropped)
            self.save()
        else:
            self.path.unlink(missing_ok=True)


def _keys(batches: list[SentBatch]) -> Iterator[str]:
    return (one.key for batch in batches for request in batch.requests for one in request.questions)
