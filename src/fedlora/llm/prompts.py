"""The prompt and the reply of a row as token ids, and the one rule by which a row is made to fit.

A prompt has the ids that the tokenizer makes of its whole text, as a server that is asked the same will have them. The
reply has the ids that follow them in the whole text; where a token crosses the border, it is encoded by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from fedlora.config.prompting import ALPACA, PromptSettings
from fedlora.config.train import TrainOn
from fedlora.console import say
from fedlora.errors import UsageError
from fedlora.llm.chat_template import ChatTemplate
from fedlora.llm.ends import Ends
from fedlora.llm.row_text import HEADINGS, RowWriter, Written, show_error
from fedlora.llm.text_ids import TextEncoder
from fedlora.rows import PromptShape, Row, Turn

Span = tuple[int, int]
CHUNK = 512
"""Rows that are tokenised in one batch: enough for every core."""


@dataclass(frozen=True)
class FittedPrompt:
    """Token ids of a prompt and how many were left out to make room."""

    ids: list[int]
    num_removed: int


@dataclass(frozen=True)
class EncodedRow:
    """One row as ids; `spans` are the ranges of ids that are predicted, in order.

    `is_apart` says that the reply is not what the whole text has after the prompt.
    """

    ids: list[int]
    spans: tuple[Span, ...]
    is_shortened: bool = False
    num_turns: int = 1
    num_cut_turns: int = 0
    holds_control: bool = False
    is_apart: bool = False


@dataclass(frozen=True)
class _Ids:
    """A row as ids that nothing has been cut from."""

    prompt: list[int]
    reply: list[int]
    earlier: tuple[Span, ...]
    is_apart: bool


class PromptEncoder:
    """Turns rows into token ids with one template and one tokenizer, for training and generation alike."""

    def __init__(self, tokenizer: Any, settings: PromptSettings | str = ALPACA) -> None:
        """UsageError where the template does not fit the tokenizer, or nothing could end a reply."""
        self.settings = settings if isinstance(settings, PromptSettings) else PromptSettings(settings)
        self.tokenizer = tokenizer
        self.template = self.settings.template
        self.text = TextEncoder(tokenizer)
        self.chat: ChatTemplate | None = None
        if self.template != ALPACA:
            self.chat = ChatTemplate(tokenizer, self.settings, list(self.text.controls))
        elif self.settings.kwargs:
            raise UsageError(f"template_kwargs: the template {ALPACA} takes none", hint="leave them out")
        self.writer = RowWriter(self.text, self.chat)
        if tokenizer.eos_token_id is None and not (self.chat and self.chat.end):
            raise UsageError("this tokenizer has no end-of-sequence token", hint="choose another base model")

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: the template's end of a turn and the tokenizer's end of a text."""
        ends = {self.tokenizer.eos_token_id} - {None}
        return frozenset(ends | set(self.text.encode([self.chat.end])[0][-1:] if self.chat and self.chat.end else ()))

    @cached_property
    def next_turn(self) -> Ends:
        """What the template would begin after a reply: its own token for that, or its text."""
        if self.chat is None:
            return Ends(texts=[f"\n{line}" for line in HEADINGS], tokenizer=self.tokenizer)
        text = self.chat.next_turn
        found = [number for number in self.text.encode([text])[0] if number in self.text.controls.values()]
        if found:
            return Ends(found[:1])
        return Ends(texts=[text.rstrip()] if text.strip() else (), tokenizer=self.tokenizer)

    def ends(self, texts: Sequence[str] | None) -> Ends:
        """What ends an answer: the end of a turn, and these texts; None is what the template would begin next."""
        more = self.next_turn if texts is None else Ends(texts=texts)
        return Ends(self.stop_ids | more.ids, more.texts, self.tokenizer)

    def encode(self, rows: Iterable[Row], *, cutoff: int, train_on: TrainOn = "assistant") -> Iterator[EncodedRow]:
        """Every row for training, at most `cutoff` ids each; what is too long is shortened.

        The reply is promised at most half the cutoff. Whole turns before the last exchange go first, the oldest first,
        then the input gives way, then the instruction, each from its left; a system turn goes last. Then the reply is
        cut, and has no end token. Raises UsageError when the template alone leaves no room.
        """
        waiting = iter(rows)
        while chunk := list(islice(waiting, CHUNK)):
            for row, text, ids in self._encode_chunk(chunk, train_on):
                yield self._fit_row(row, text, ids, cutoff, train_on)

    def question(self, row: Row, *, cutoff: int, context: int | None, max_new_tokens: int) -> FittedPrompt:
        """The ids of a prompt that is to be answered, at most `cutoff`; the answer comes on top.

        What training saw whole stays whole: it is shortened, by training's rule, only when it is longer than the
        cutoff, or when the answer would pass the end of the model's `context` (None: no end). There, too, the answer
        is promised at most half. Raises UsageError when the template alone takes more.
        """
        room = cutoff if context is None else min(cutoff, max(context - max_new_tokens, context - context // 2))
        try:
            whole = self._prompt(row)
        except UsageError as error:
            raise show_error(row, error) from error
        _, ids = self._fit(row, whole, room)
        if len(ids) > room:
            raise UsageError(
                f"the {self.template} template alone takes {len(ids)} tokens, and a prompt may take {room} of "
                f"cutoff_len={cutoff}" + (f" and a context of {context}" if context is not None else ""),
                hint="raise --cutoff_len, or use a model with a longer context",
            )
        return FittedPrompt(ids, len(whole) - len(ids))

    def check(self, shape: PromptShape, *, cutoff: int, train_on: TrainOn = "assistant") -> None:
        """UsageError when rows of this shape cannot be encoded, or their template alone leaves no room in `cutoff`.

        Says what becomes of a system turn that the template does not take.
        """
        system = (Turn("system", "-"),) if shape.has_system else ()
        history = (Turn("user", "-"), Turn("assistant", "-")) if shape.has_history else ()
        row = Row("", "-" if shape.has_input else "", "-", "", (*system, *history), shape.kind)
        if self.chat and shape.has_history and train_on == "assistant" and (reason := self.chat.rewrites_history):
            raise UsageError(
                f"{reason}, so earlier replies cannot be trained on as they are generated",
                hint="give --train_on last to train on the last reply of a conversation, or another template",
            )
        (written,) = self.writer.write([row], train_on)
        self._fit_row(row, written, self._encode_written([written])[0], cutoff, train_on)
        if shape.has_system and self.chat and not self.chat.takes_system:
            say("the template has no system turn: a system turn is put in front of the first user turn")

    def marks(self) -> list[str]:
        """The texts that mean something in a prompt: the tokenizer's control tokens and the template's headings."""
        return sorted({*self.text.controls, *HEADINGS})

    def decode(self, ids: list[int]) -> str:
        """Generated ids as text, without control tokens and without white space at the ends."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def show(self, row: Row, *, cutoff: int, train_on: TrainOn = "assistant") -> list[tuple[str, bool]]:
        """The row as the model sees it in training: stretches of text, and whether their tokens are predicted."""
        (found,) = self.encode([row], cutoff=cutoff, train_on=train_on)
        parts: list[tuple[str, bool]] = []
        at = 0
        for start, end in (*found.spans, (len(found.ids), len(found.ids))):
            for ids, is_trained in ((found.ids[at:start], False), (found.ids[start:end], True)):
                if ids:
                    parts.append((str(self.tokenizer.decode(ids, skip_special_tokens=False)), is_trained))
            at = end
        return parts

    def _encode_chunk(self, rows: Sequence[Row], train_on: TrainOn) -> Iterator[tuple[Row, Written, _Ids]]:
        """Rows as text and as ids; an error shows the row that it is about."""
        try:
            written = self.writer.write(rows, train_on)
            encoded = self._encode_written(written)
        except UsageError as error:
            if len(rows) == 1:
                raise show_error(rows[0], error) from error
            for row in rows:
                yield from self._encode_chunk([row], train_on)
        else:
            yield from zip(rows, written, encoded, strict=True)

    def _fit_row(self, row: Row, text: Written, ids: _Ids, cutoff: int, train_on: TrainOn) -> EncodedRow:
        room = max(cutoff - len(ids.reply), cutoff - cutoff // 2)
        fitted, prompt = row, ids.prompt
        if len(prompt) > room:
            fitted, prompt = self._fit(row, prompt, room)
            # a shorter row is encoded like one that came so
            ids = self._encode_written(self.writer.write([fitted], train_on))[0]
        if len(prompt) >= cutoff:
            raise UsageError(
                f"cutoff_len={cutoff} leaves no room for a response: the {self.template} template alone "
                f"takes {len(prompt)} tokens",
                hint="raise --cutoff_len",
            )
        reply = ids.reply[: cutoff - len(prompt)]
        whole = [*prompt, *reply]
        spans = ((len(prompt), len(whole)),) if train_on == "last" else (*ids.earlier, (len(prompt), len(whole)))
        if train_on == "all" or row.kind == "text":
            spans = ((1, len(whole)),)
        # nothing predicts the first token
        spans = tuple((max(1, start), end) for start, end in spans if end > max(1, start))
        return EncodedRow(
            whole,
            spans,
            is_shortened=fitted is not row or len(reply) < len(ids.reply),
            num_turns=len(row.before) + 2 if row.kind != "text" else 1,
            num_cut_turns=len(row.before) - len(fitted.before),
            holds_control=bool(text.marks.hidden),
            is_apart=ids.is_apart,
        )

    def _fit(self, row: Row, prompt: list[int], room: int) -> tuple[Row, list[int]]:
        """The row and its prompt's ids with as much left out as `room` demands, or with the template alone."""
        while len(prompt) > room and (shorter := _without_oldest(row)) is not None:
            row, prompt = shorter, self._prompt(shorter)
        for part in ("input", "instruction", "system"):
            if len(prompt) <= room:
                break
            row, prompt = self._cut_left(row, part, prompt, room)
        return row, prompt

    def _cut_left(self, row: Row, part: str, prompt: list[int], room: int) -> tuple[Row, list[int]]:
        """A part of the row without its beginning, and the prompt that is left: as long as `room` if that suffices."""
        text = _part_of(row, part)
        starts = self._token_starts(text)
        count = 0
        while len(prompt) > room and count < len(starts):
            count = min(len(starts), count + len(prompt) - room)
            row = _with_part(row, part, text[starts[count] :] if count < len(starts) else "")
            prompt = self._prompt(row)
        return row, prompt

    def _token_starts(self, text: str) -> list[int]:
        """Where the text can be cut: the first character of every token, each place once."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return list(range(len(text)))
        return sorted({start for start, _ in backend.encode(text, add_special_tokens=False).offsets})

    def _prompt(self, row: Row) -> list[int]:
        # only what is asked: a template may mind an empty reply
        written = self.writer.write([replace(row, output="-")], "last")[0]
        return self._prefix(written) + self.text.encode_marked([written.prompt], [written.marks])[0]

    def _prefix(self, written: Written) -> list[int]:
        """What stands before a text: a chat template writes its own start token."""
        return [] if written.is_chat else self.text.prefix

    def _encode_written(self, written: Sequence[Written]) -> list[_Ids]:
        texts = [(each, text) for each in written for text in (each.prompt, each.whole, *sum(each.earlier, ()))]
        found = iter(self.text.encode_marked([text for _, text in texts], [each.marks for each, _ in texts]))
        result = []
        for each in written:
            prompt, whole = next(found), next(found)
            earlier = tuple((_common(next(found), prompt), _common(next(found), prompt)) for _ in each.earlier)
            is_joined = bool(each.whole) and whole[: len(prompt)] == prompt
            reply = whole[len(prompt) :] if is_joined else self.text.encode_alone(each.reply, each.marks)
            if not (each.is_chat and self.chat and self.chat.end):
                reply = [*reply, self.tokenizer.eos_token_id]
            prefix = self._prefix(each)
            shifted = tuple((start + len(prefix), end + len(prefix)) for start, end in earlier)
            result.append(_Ids(prefix + prompt, reply, shifted, not is_joined))
        return result


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    if other[: len(one)] == one:
        return len(one)
    return next(at for at, (left, right) in enumerate(zip([*one, -1], [*other, -2], strict=False)) if left != right)


def _without_oldest(row: Row) -> Row | None:
    """The row without the oldest exchange before the last; None when there is none left."""
    system = [turn for turn in row.before if turn.role == "system"]
    rest = row.before[len(system) :]
    return replace(row, before=(*system, *rest[2:])) if rest else None


def _part_of(row: Row, part: str) -> str:
    if part == "system":
        return row.before[0].content if row.before else ""
    return row.input if part == "input" else row.instruction


def _with_part(row: Row, part: str, text: str) -> Row:
    if part == "system":
        return replace(row, before=(Turn("system", text),) if text else ())
    return replace(row, **{part: text})
