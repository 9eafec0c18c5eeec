"""Rows that name several replies, of which one is right: which of them a model finds most probable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlora.errors import DataError
from fedlora.evaluation.matching import excerpt
from fedlora.rows import Row

COLUMN = "choices"


@dataclass(frozen=True)
class Choice:
    """A row's candidate replies as rows of their own, and the place of the right one."""

    candidates: tuple[Row, ...]
    right: int

    def is_right(self, losses: Sequence[float], *, per_byte: bool = False) -> bool:
        """Whether the right reply alone has the least loss, where `losses` are sums over each reply's tokens; per byte
        of UTF-8 a longer reply is no less probable for its length."""
        sizes = [len(row.output.encode()) if per_byte else 1 for row in self.candidates]
        each = [loss / size for loss, size in zip(losses, sizes, strict=True)]
        return all(each[self.right] < loss for place, loss in enumerate(each) if place != self.right)


def read_choice(row: Row) -> Choice | None:
    """The choice that a row's column `choices` names; None where it has none.

    Raises DataError where it is no list of at least two different texts, or where the row's reply is not among them.
    """
    texts = row.more.get(COLUMN)
    if texts is None:
        return None
    is_list = isinstance(texts, list | tuple) and len(texts) > 1
    if not is_list or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{excerpt(row)}: {COLUMN} is no list of at least two texts", hint="give each choice as text")
    stripped = [text.strip() for text in texts]
    if len(set(stripped)) < len(stripped) or row.output.strip() not in stripped:
        raise DataError(
            f"{excerpt(row)}: the reply is not one of the {COLUMN}, or one of them stands twice",
            hint="name each choice once, and the right one as the row's reply, in the same words",
        )
    return Choice(tuple(replace(row, output=text) for text in texts), stripped.index(row.output.strip()))
