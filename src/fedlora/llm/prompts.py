"""The prompt of a row, and the one rule by which a row is made to fit.

A prompt is a list of segments that are tokenised apart. Text from data never becomes a control
token: what looks like `<|im_end|>` in a row is encoded as the characters it consists of.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedlora.errors import UsageError
from fedlora.rows import Row

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n",
    "\n\n### Input:\n",
    "\n\n### Response:\n",
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n",
    "\n\n### Response:\n",
)
"""Prompt of Stanford Alpaca (Taori et al., 2023), the format this field's instruction tuning uses."""

_MARK = "fedlora7content3mark"


@dataclass(frozen=True)
class FittedPrompt:
    """Token ids of a prompt and how many were left out to make room."""

    ids: list[int]
    num_removed: int


class PromptEncoder:
    """Turns rows into token ids with one template and one tokenizer, for training and generation alike."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise UsageError("this tokenizer has no chat template", hint="use --prompt_template alpaca")
        if tokenizer.eos_token_id is None:
            raise UsageError("this tokenizer has no end-of-sequence token", hint="choose another base model")
        self.tokenizer = tokenizer
        self.template = template
        self.eos_id: int = tokenizer.eos_token_id

    def prompt(self, row: Row, *, cutoff: int, response_length: int) -> FittedPrompt:
        """The prompt's ids, shortened so that a response of `response_length` tokens fits in `cutoff`.

        The response is promised at most half the cutoff. The input gives way first, then the
        instruction, each from its left. Raises UsageError when the template alone leaves no room.
        """
        fitted = self._fit(row, max(cutoff - response_length, cutoff - cutoff // 2))
        if len(fitted.ids) >= cutoff:
            raise UsageError(
                f"cutoff_len={cutoff} leaves no room for a response: the {self.template} template alone "
                f"takes {len(fitted.ids)} tokens",
                hint="raise --cutoff_len",
            )
        return fitted

    def question(self, row: Row, *, cutoff: int, context: int | None, max_new_tokens: int) -> FittedPrompt:
        """The ids of a prompt that is to be answered, at most `cutoff`; the answer comes on top.

        What training saw whole stays whole: it is shortened, by training's rule, only when it is longer than the
        cutoff, or when the answer would pass the end of the model's `context` (None: no end). There, too, the answer
        is promised at most half. Raises UsageError when the template alone takes more.
        """
        room = cutoff if context is None else min(cutoff, max(context - max_new_tokens, context - context // 2))
        fitted = self._fit(row, room)
        if len(fitted.ids) > room:
            raise UsageError(
                f"the {self.template} template alone takes {len(fitted.ids)} tokens, and a prompt may take {room} of "
                f"cutoff_len={cutoff}" + (f" and a context of {context}" if context is not None else ""),
                hint="raise --cutoff_len, or use a model with a longer context",
            )
        return fitted

    def _fit(self, row: Row, room: int) -> FittedPrompt:
        """At most `room` tokens of a prompt, or its template alone."""
        segments = self._segments(row)
        length = sum(len(ids) for ids, _ in segments)
        excess = removed = max(0, length - room)
        for position in sorted((i for i, (_, is_data) in enumerate(segments) if is_data), reverse=True):
            ids, _ = segments[position]
            cut = min(excess, len(ids))
            segments[position] = (ids[cut:], True)
            excess -= cut
        return FittedPrompt([token for part, _ in segments for token in part], removed - excess)

    def check_cutoff(self, cutoff: int, *, has_input: bool) -> None:
        """UsageError when the template alone, of rows with or without an input, leaves no room in `cutoff`."""
        self.prompt(Row("", "-" if has_input else "", "", ""), cutoff=cutoff, response_length=0)

    def response(self, text: str) -> list[int]:
        """The response's ids followed by the end-of-sequence token."""
        return [*self._encode(text, is_data=True), self.eos_id]

    def marks(self) -> list[str]:
        """The texts that mean something in a prompt: the tokenizer's control tokens and the template's headings."""
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        headings = {line for part in ALPACA_WITH_INPUT for line in part.splitlines() if line.startswith("###")}
        return sorted(tokens | headings)

    def decode(self, ids: list[int]) -> str:
        """Generated ids as text, without control tokens and without white space at the ends."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _segments(self, row: Row) -> list[tuple[list[int], bool]]:
        if self.template == "chat":
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
        start = [(self._bos, False)] if self._bos and self.template != "chat" else []
        return start + [(self._encode(text, is_data=is_data), is_data) for text, is_data in parts]

    def _encode(self, text: str, *, is_data: bool) -> list[int]:
        cache = self._fixed_ids
        if not is_data and text in cache:
            return cache[text]
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=is_data)["input_ids"]
        if not is_data:
            cache[text] = ids
        return ids

    @cached_property
    def _fixed_ids(self) -> dict[str, list[int]]:
        return {}

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
        before, mark, after = rendered.partition(_MARK)
        if not mark:
            raise UsageError("the chat template drops the user's message", hint="use --prompt_template alpaca")
        return before, after
