"""Text as token ids: whole, as a server of the adapter will tokenise it, and never a control token out of data.

A tokenizer turns the text of an added token (`<|im_end|>`, `<think>`) into that token wherever it stands. Text from
data that holds one is therefore marked before it enters a template, and what is marked is encoded as the characters it
consists of, apart from the text around it. Added tokens of white space alone control nothing and are left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from fedlora.errors import UsageError

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Noncharacters of Unicode, which no text should hold."""


class TextEncoder:
    """One tokenizer, and what it does to a text by itself."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.controls: dict[str, int] = {
            token.content: number for number, token in added.items() if token.content.strip()
        }
        """Text -> id of every token that text from data must not become."""
        self._pattern = _either(self.controls)
        folded = [token.content for token in added.values() if token.content.strip() and token.normalized]
        self._folded = _either([self._normalize(text) for text in folded]) if self._normalizer and folded else None

    @cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer puts in front of a text by itself: the start token, or nothing."""
        plain, whole = self.encode(["a"])[0], list(self.tokenizer("a")["input_ids"])
        starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
        return whole[: next(starts, 0)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokenizer's own ids of every text, in batches on all cores; nothing is added in front or at the end."""
        if not texts:
            return []
        asked = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return self.tokenizer(list(texts), **asked)["input_ids"]

    def encode_marked(self, texts: Sequence[str], marked: Sequence[Marked]) -> list[list[int]]:
        """`encode` for texts in which control text may be marked; each with what its marks stand for."""
        found = self.encode([text for text, marks in zip(texts, marked, strict=True) if not marks.hidden])
        whole = iter(found)
        return [
            self._encode_pieces(text, marks) if marks.hidden else next(whole)
            for text, marks in zip(texts, marked, strict=True)
        ]

    def encode_alone(self, text: str, marks: Marked) -> list[int]:
        """The ids of a text that follows another: without a space that the tokenizer puts in front."""
        return self._encode_pieces(text, marks, start=False)

    def mark(self, texts: Iterable[str]) -> Marked:
        """Texts from data with their control text marked; all of them are free to enter one template."""
        parts = list(texts)
        if not any(self._holds_control(text) for text in parts):
            return Marked(tuple(parts), {})
        joined = "".join(parts)
        free = [mark for mark in _MARKS if mark not in joined]
        if len(free) < 2:
            raise UsageError(
                "a row holds control text and the noncharacters U+FDD0 to U+FDEF as well",
                hint="remove them: no text has a use for them",
            )
        opening, closing = free[:2]
        hidden: dict[str, str] = {}

        def hide(text: str) -> str:
            number = f"{opening}{len(hidden)}{closing}"
            hidden[number] = text
            return number

        return Marked(tuple(self._hide(text, hide) for text in parts), hidden)

    def _hide(self, text: str, hide: Any) -> str:
        marked = self._pattern.sub(lambda found: hide(found[0]), text) if self._pattern else text
        # what is control text only once the tokenizer has normalised it has no place of its own
        return hide(text) if self._folded and self._folded.search(self._normalize(marked)) else marked

    def _holds_control(self, text: str) -> bool:
        if self._pattern and self._pattern.search(text):
            return True
        return bool(self._folded and self._folded.search(self._normalize(text)))

    def _encode_pieces(self, text: str, marks: Marked, *, start: bool = True) -> list[int]:
        """The text between marks as the tokenizer has it, what is marked as plain characters."""
        pieces = marks.pattern.split(text) if marks.hidden else [text]
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            if place % 2:
                ids += self._encode_plain(marks.hidden[piece])
            elif piece:
                ids += self.encode([piece])[0] if start and not place else self._encode_behind(piece)
        return ids

    def _encode_behind(self, text: str) -> list[int]:
        if self._without_space is None:
            return self.encode([text])[0]
        return list(self._without_space.encode(text, add_special_tokens=False).ids)

    def _encode_plain(self, text: str) -> list[int]:
        """Characters only: split until no piece is a control token."""
        if self._plain is None:
            ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        else:
            ids = list(self._plain.encode(text, add_special_tokens=False).ids)
        if not self._control_ids.intersection(ids):
            return ids
        if len(text) < 2:
            raise UsageError(
                f"{text!r} is a control token of this tokenizer and cannot be encoded as plain text",
                hint="remove it from the rows",
            )
        middle = len(text) // 2
        return self._encode_plain(text[:middle]) + self._encode_plain(text[middle:])

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        unknown = self.tokenizer.unk_token_id
        return frozenset(number for number in self.controls.values() if number != unknown)

    @property
    def _normalizer(self) -> Any:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend.normalizer if backend is not None else None

    def _normalize(self, text: str) -> str:
        return self._normalizer.normalize_str(text) if self._normalizer else text

    @cached_property
    def _without_space(self) -> Any:
        """The tokenizer without a space put in front of a text; None where it puts none, or has no such parts."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        rules = json.loads(backend.to_str())
        kept = json.dumps(rules)
        rules["normalizer"] = _drop_prepend(rules["normalizer"])
        rules["pre_tokenizer"] = _drop_prefix(rules["pre_tokenizer"])
        return _make_backend(rules) if json.dumps(rules) != kept else None

    @cached_property
    def _plain(self) -> Any:
        """The tokenizer without added tokens and without a space in front."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        rules = json.loads((self._without_space or backend).to_str())
        return _make_backend({**rules, "added_tokens": [], "post_processor": None})


class Marked:
    """Texts in which control text is marked, and what every mark stands for; nothing where there is none."""

    def __init__(self, texts: tuple[str, ...], hidden: dict[str, str]) -> None:
        self.texts = texts
        self.hidden = hidden

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, self.hidden))})")

    def reveal(self, text: str) -> str:
        """The text with what its marks stand for."""
        return self.pattern.sub(lambda found: self.hidden[found[0]], text) if self.hidden else text


NOT_MARKED = Marked((), {})


def _either(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, texts), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _make_backend(rules: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(rules))


def _drop_prepend(rule: Any) -> Any:
    """A normalizer without `Prepend`, which is how SentencePiece's space in front is written in some files."""
    if rule is None or rule["type"] == "Prepend":
        return None
    if rule["type"] == "Sequence":
        return {**rule, "normalizers": [kept for each in rule["normalizers"] if (kept := _drop_prepend(each))]}
    return rule


def _drop_prefix(rule: Any) -> Any:
    """A pre-tokenizer that puts no space in front."""
    if rule is None:
        return None
    if rule["type"] == "Sequence":
        return {**rule, "pretokenizers": [_drop_prefix(each) for each in rule["pretokenizers"]]}
    if rule["type"] == "Metaspace":
        return {**rule, "prepend_scheme": "never"}
    return {**rule, "add_prefix_space": False} if rule.get("add_prefix_space") else rule
