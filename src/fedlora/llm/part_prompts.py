"""Token rule 1: every part of a prompt is encoded by itself.

Adapters that were trained under it answer under it, for other ids would not be those they were trained on. Nothing is
trained under it any more. It knows instruction rows, the alpaca template and the tokenizer's own chat template.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from fedlora.config.prompting import CHAT, PromptSettings
from fedlora.config.train import TrainOn
from fedlora.errors import UsageError
from fedlora.llm.ends import Ends
from fedlora.llm.prompts import EncodedRow, FittedPrompt, PromptEncoder
from fedlora.llm.row_text import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from fedlora.rows import PromptShape, Row

_MARK = "fedlora7content3mark"


class PartsEncoder:
    """What `PromptEncoder` does, by the rule that it replaced."""

    def __init__(self, tokenizer: Any, settings: PromptSettings) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.template = settings.template
        # what does not depend on the rule: the tokenizer's control texts, the checks, the decoding
        self._today = PromptEncoder(tokenizer, settings)
        self.marks, self.decode, self.chat = self._today.marks, self._today.decode, self._today.chat

    @property
    def stop_ids(self) -> frozenset[int]:
        """The id that ended every reply."""
        return frozenset({self.tokenizer.eos_token_id})

    def ends(self, texts: Sequence[str] | None) -> Ends:
        """As `PromptEncoder.ends`."""
        more = self._today.ends(texts)
        return Ends(self.stop_ids | (more.ids - self._today.stop_ids), more.texts, self.tokenizer)

    def check(self, shape: PromptShape, *, cutoff: int, train_on: TrainOn = "assistant") -> None:
        """UsageError for rows that the rule does not know."""
        if shape.kind not in ("instruction", "conversation") or shape.has_system or shape.has_history:
            raise UsageError(
                "the run was trained before there were conversations, and knows instruction rows only",
                hint="give rows with instruction and output, or train again",
            )

    def encode(self, rows: Iterable[Row], *, cutoff: int, train_on: TrainOn = "assistant") -> Iterator[EncodedRow]:
        """Every row as training encoded it under this rule."""
        for row in rows:
            self.check(row.shape, cutoff=cutoff)
            reply = [*self._encode(row.output, is_data=True), self.tokenizer.eos_token_id]
            prompt = self._fit(row, max(cutoff - len(reply), cutoff - cutoff // 2))
            if len(prompt.ids) >= cutoff:
                raise UsageError(f"cutoff_len={cutoff} leaves no room for a response", hint="raise --cutoff_len")
            ids = (prompt.ids + reply)[:cutoff]
            start = 1 if train_on == "all" else max(1, len(prompt.ids))
            yield EncodedRow(ids, ((start, len(ids)),), bool(prompt.num_removed) or len(prompt.ids + reply) > cutoff)

    def question(self, row: Row, *, cutoff: int, context: int | None, max_new_tokens: int) -> FittedPrompt:
        """As `PromptEncoder.question`."""
        self.check(row.shape, cutoff=cutoff)
        room = cutoff if context is None else min(cutoff, max(context - max_new_tokens, context - context // 2))
        fitted = self._fit(row, room)
        if len(fitted.ids) > room:
            raise UsageError(
                f"the {self.template} template alone takes {len(fitted.ids)} tokens, and a prompt may take {room}",
                hint="raise --cutoff_len, or use a model with a longer context",
            )
        return fitted

    def show(self, row: Row, *, cutoff: int, train_on: TrainOn = "assistant") -> list[tuple[str, bool]]:
        """As `PromptEncoder.show`."""
        (found,) = self.encode([row], cutoff=cutoff, train_on=train_on)
        ((start, _),) = found.spans
        return [
            (str(self.tokenizer.decode(ids)), is_reply)
            for ids, is_reply in ((found.ids[:start], False), (found.ids[start:], True))
        ]

    def _fit(self, row: Row, room: int) -> FittedPrompt:
        """At most `room` tokens of a prompt, or its template alone; the input gives way first, then the instruction."""
        segments = self._segments(row)
        length = sum(len(ids) for ids, _ in segments)
        excess = removed = max(0, length - room)
        for position in sorted((i for i, (_, is_data) in enumerate(segments) if is_data), reverse=True):
            ids, _ = segments[position]
            cut = min(excess, len(ids))
            segments[position] = (ids[cut:], True)
            excess -= cut
        return FittedPrompt([token for part, _ in segments for token in part], removed - excess)

    def _segments(self, row: Row) -> list[tuple[list[int], bool]]:
        if self.template == CHAT:
            before, after = self._chat_frame
            parts = [(before, False), (row.instruction, True)]
            parts += [("\n\n", False), (row.input, True)] if row.input else []
            parts += [(after, False)]
        elif row.input:
            head, middle, tail = ALPACA_WITH_INPUT
            parts = [(head, False), (row.instruction, True), (middle, False), (row.input, True), (tail, False)]
        else:
            head, tail = ALPACA_WITHOUT_INPUT
            parts = [(head, False), (row.instruction, True), (tail, False)]
        start = [(self._bos, False)] if self._bos and self.template != CHAT else []
        return start + [(self._encode(text, is_data=is_data), is_data) for text, is_data in parts]

    def _encode(self, text: str, *, is_data: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=is_data)["input_ids"]

    @cached_property
    def _bos(self) -> list[int]:
        """The start token where this tokenizer puts one in front of a text by itself."""
        bos: int | None = self.tokenizer.bos_token_id
        if bos is None or self.tokenizer("a")["input_ids"][:1] != [bos]:
            return []
        return [bos]

    @cached_property
    def _chat_frame(self) -> tuple[str, str]:
        message = [{"role": "user", "content": _MARK}]
        rendered = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, _, after = rendered.partition(_MARK)
        return before, after
