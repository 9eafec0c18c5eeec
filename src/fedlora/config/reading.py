"""The fields of every configuration whose stage reads rows from a user's files.

Help shows them after a stage's other fields (`flags.py`), although a base class comes first.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from fedlora.config.schema import Config, Pairs, flag
from fedlora.row_shapes import find_shapes
from fedlora.rows import STRICT, ReadRules, RowFormat


class ReadingConfig(Config):
    """How strictly rows are read; the defaults refuse the first bad one."""

    skip_bad: int = flag(
        STRICT.skip_bad, "bad rows of a file that may be left out; each is reported", group="data", ge=0
    )
    max_record_bytes: int = flag(
        STRICT.max_record_bytes, "largest row that is read, in bytes", group="data", ge=1024, le=1 << 30
    )
    numbers_as_text: bool = flag(
        STRICT.numbers_as_text, "accept a number where text is expected, as it is written", group="data"
    )
    surrogates: Literal["refuse", "replace"] = flag(
        STRICT.surrogates, "half a surrogate pair in a text: refuse it, or replace it by U+FFFD", group="data"
    )

    row_kind: RowFormat = flag(
        STRICT.row_kind,
        "kind of the rows; auto: by the fields of a file's first, in this order; any: by those of each",
        group="data",
    )
    columns: Pairs = flag(
        {},
        "fields of a row and the columns that hold them, such as prompt=question,response=answer.text",
        group="data",
        if_none="columns have the fields' names",
    )

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        find_shapes(self.row_kind, self.columns)
        return self

    @property
    def read_rules(self) -> ReadRules:
        """The rules as the readers take them."""
        return ReadRules(**{name: getattr(self, name) for name in READING_FIELDS})


READING_FIELDS = frozenset(ReadingConfig.model_fields)
