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
from typing import Any, Generic, TypeVar

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.data.fields import RowFields
from fedlora.data.held_out import draw_test_rows, prompt_key
from fedlora.data.raw_records import shown_name
from fedlora.data.records import iter_rows
from fedlora.errors import DataError
from fedlora.plain_text import counted
from fedlora.row_shapes import INSTRUCTION
from fedlora.rows import PromptShape, Row
from fedlora.seeds import derive_seed
from fedlora.typed_json import to_json
from fedlora.types import ClientId

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
    num_control: int | None = None
    """Rows that hold text of a control token, which is encoded as plain characters."""
    num_turns: int | None = None
    num_cut_turns: int | None = None
    """Turns that were left out whole to fit."""
    num_test: int = 0
    """Rows that `test_share` held out."""
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
    """A client's file, and what it held when the run began; `shapes` are what its examples ask of a template, each with
    its first row, counted from 1."""

    path: Path
    facts: ClientFacts
    shapes: Mapping[PromptShape, int] = field(default_factory=dict)


class FieldsReport:
    """What several files hold other than plain instruction rows, and the names in them that no row has use for; each
    is reported once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[str]] = {}

    def note(self, file: Path) -> Callable[[RowFields], None]:
        """What `iter_rows` calls with what it found in a file."""

        def note(fields: RowFields) -> None:
            found = [(f"{kind} rows, read from {shape}", "") for kind, shape in fields.kinds if shape != INSTRUCTION]
            if fields.unused:
                found.append(("not used", f": {', '.join(map(shown_name, fields.unused))}"))
            for each in found:
                self._found.setdefault(each, []).append(file.name)

        return note

    def report(self, num_files: int) -> None:
        """Say what there is, and in which files where it is not all of them."""
        for (before, after), of in self._found.items():
            where = "" if len(of) == num_files else f" in {', '.join(of[:3])}" + (", ..." if len(of) > 3 else "")
            say(f"{before}{where}{after}")


def read_client_files(
    files: Mapping[ClientId, Path], config: TrainConfig, *, on_row: Callable[[ClientId, Row], None] | None = None
) -> dict[ClientId, ClientFile]:
    """Read each file once; `on_row` is given every row. Each row that is left out is reported, and once the kinds of
    rows and the fields that are not used. Raises what `read_rows` raises, and DataError when a client keeps no row to
    train on."""
    found = FieldsReport()
    read = {client: _read_file(client, path, config, on_row, found.note(path)) for client, path in files.items()}
    found.report(len(files))
    return read


@dataclass(frozen=True)
class Split(Generic[T]):
    """A client's rows: to train on, to validate on, to test on."""

    training: Sequence[T]
    validation: Sequence[T]
    test: Sequence[T]


def split_rows(
    rows: Sequence[T], prompts: Sequence[bytes | None], config: TrainConfig, client_id: ClientId
) -> Split[T]:
    """`test_share` of the rows for testing, `local_val_set_size` of the others for validation, both drawn by the seed.

    `prompts` has the `prompt_key` of every row; it is not looked at where nothing is held out for testing.
    """
    test: Sequence[T] = []
    if config.test_share:
        drawn = draw_test_rows(prompts, config.test_share, config.seed)
        test = [rows[place] for place in sorted(drawn)]
        rows = [row for place, row in enumerate(rows) if place not in drawn]
    size = config.local_val_set_size
    if not size:
        return Split(rows, [], test)
    order = list(rows)
    random.Random(derive_seed(config.seed, "local_validation", client_id)).shuffle(order)  # noqa: S311
    return Split(order[size:], order[:size], test)


def _read_file(
    client: ClientId,
    path: Path,
    config: TrainConfig,
    on_row: Callable[[ClientId, Row], None] | None,
    on_fields: Callable[[RowFields], None],
) -> ClientFile:
    digest, skipped = hashlib.sha256(), 0
    shapes: dict[PromptShape, int] = {}

    def skip(message: str) -> None:
        nonlocal skipped
        skipped += 1
        say(message)

    # of a row: its category, None where its response is empty
    rows: list[str | None] = []
    prompts: list[bytes | None] = []
    reading = {"rules": config.read_rules, "on_skip": skip, "digest": digest, "on_fields": on_fields}
    for row in iter_rows(path, may_be_empty=True, **reading):
        rows.append(row.category if row.output.strip() else None)
        if row.output.strip():
            shapes.setdefault(row.shape, len(rows))
        if config.test_share:
            prompts.append(prompt_key(row))
        if on_row is not None:
            on_row(client, row)
    split = split_rows(rows, prompts, config, client)
    _check_split(split, path, config)
    labelled = [category for category in split.training if category is not None]
    facts = ClientFacts(
        client_id=client,
        file=path.name,
        sha256=digest.hexdigest(),
        num_examples=len(labelled),
        num_empty=len(split.training) - len(labelled),
        num_validation=sum(category is not None for category in split.validation),
        num_skipped=skipped,
        categories=dict(sorted(Counter(labelled).items())),
        num_test=len(split.test),
    )
    return ClientFile(path, facts, shapes)


def _check_split(split: Split[str | None], path: Path, config: TrainConfig) -> None:
    """DataError where what is held back leaves nothing, or a share of the rows is no row."""
    if config.local_val_set_size and not split.training:
        raise DataError(
            f"{path}: local_val_set_size={config.local_val_set_size} leaves none of the client's "
            f"{counted(len(split.validation), 'row')} to train on",
            hint="lower --local_val_set_size",
        )
    if config.test_share and not split.test and any(category is not None for category in split.training):
        raise DataError(
            f"{path}: test_share={config.test_share:g} can hold out no row: all rows with a response have one prompt",
            hint="give the client rows with different prompts, or leave test_share out",
        )
