"""What ends an answer besides the end tokens of the tokenizer and of the generation configuration.

A base that was not tuned to a template answers and then runs on into the template's next turn. Its answer ends there,
so that a comparison with an adapter is one of answers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

_SPARE = 4
"""Tokens that a decoded tail holds beyond the longest text: a character may be cut at its start."""


class Ends:
    """Ids that end an answer, and texts before which it ends; a text that starts a line also starts an answer."""

    def __init__(self, ids: Collection[int] = (), texts: Sequence[str] = (), tokenizer: Any = None) -> None:
        self.ids = frozenset(ids)
        self.texts = tuple(texts)
        self._tokenizer = tokenizer
        # a token has at least one byte
        self._tail = max((len(text.encode()) for text in texts), default=0) + _SPARE

    def is_over(self, written: Sequence[int]) -> bool:
        """Whether the last of these tokens completes one of the texts."""
        if not self.texts:
            return False
        text = self._tokenizer.decode(list(written[-self._tail :]), skip_special_tokens=True)
        seen = f"\n{text}" if len(written) <= self._tail else text
        return any(end in seen for end in self.texts)

    def cut(self, answer: str) -> str:
        """The answer up to the first of the texts."""
        seen = f"\n{answer}"
        places = [place for text in self.texts if (place := seen.find(text)) >= 0]
        return seen[: min(places)].strip() if places else answer


NO_ENDS = Ends()
