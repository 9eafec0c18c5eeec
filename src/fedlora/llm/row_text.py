"""A row as text: its prompt, its reply, and where earlier replies of a conversation begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from fedlora.config.train import TrainOn
from fedlora.console import printable
from fedlora.data.raw_records import excerpt_of
from fedlora.errors import UsageError
from fedlora.llm.chat_template import ChatTemplate
from fedlora.llm.text_ids import Marked, TextEncoder
from fedlora.rows import Row, Turn

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


HEADINGS = tuple(line for part in ALPACA_WITH_INPUT for line in part.splitlines() if line.startswith("###"))
"""The headings of an Alpaca prompt."""


@dataclass(frozen=True)
class Written:
    """A row as text: its prompt, prompt and reply together, the reply alone, and the earlier replies, each as the text
    that ends before it and the text that ends with it."""

    prompt: str
    whole: str
    reply: str
    marks: Marked
    earlier: tuple[tuple[str, str], ...] = ()
    is_chat: bool = False


def show_error(row: Row, error: UsageError) -> UsageError:
    """The error of a row, and the beginning of the row."""
    shown = printable(excerpt_of(row.question or row.output))
    return UsageError(f"{error}\n    {shown}", hint=error.hint)


class RowWriter:
    """Writes rows with one template: `chat`, or alpaca where there is none."""

    def __init__(self, text: TextEncoder, chat: ChatTemplate | None) -> None:
        self.text = text
        self.chat = chat

    def write(self, rows: Sequence[Row], train_on: TrainOn) -> list[Written]:
        """Rows as text. A kind that has no roles needs no template."""
        chats = [row for row in rows if self.chat and row.kind in ("instruction", "conversation")]
        conversations = iter(self._write_chats(chats, train_on))
        written = []
        for row in rows:
            if row.kind in ("completion", "text"):
                marks = self.text.mark([row.instruction, row.output])
                prompt, reply = marks.texts
                written.append(Written(prompt, prompt + reply, reply, marks))
            else:
                written.append(next(conversations) if self.chat else self._write_alpaca(row))
        return written

    def _write_alpaca(self, row: Row) -> Written:
        if row.before:
            what = "a system turn" if row.before[0].role == "system" else "several turns"
            raise UsageError(f"the alpaca template has no place for {what}", hint="give --prompt_template chat")
        marks = self.text.mark([row.instruction, row.input, row.output])
        instruction, given, reply = marks.texts
        if given:
            head, middle, tail = ALPACA_WITH_INPUT
            prompt = f"{head}{instruction}{middle}{given}{tail}"
        else:
            head, tail = ALPACA_WITHOUT_INPUT
            prompt = f"{head}{instruction}{tail}"
        return Written(prompt, prompt + reply, reply, marks)

    def _write_chats(self, rows: Sequence[Row], train_on: TrainOn) -> list[Written]:
        chat = self.chat
        if chat is None:
            return []
        marked = [self.text.mark([turn.content for turn in row.turns]) for row in rows]
        turns = [self._turns(row, marks) for row, marks in zip(rows, marked, strict=True)]
        # the place of every reply that is trained on and is not the last
        places = [_earlier_replies(each) if train_on == "assistant" else [] for each in turns]
        found = list(zip(turns, places, strict=True))
        asked = [part for each, at in found for part in (each[:-1], *(each[:place] for place in at))]
        answered = [part for each, at in found for part in (each, *(each[: place + 1] for place in at))]
        prompts, wholes = iter(chat.render(asked, asks=True)), map(chat.close, chat.render(answered, asks=False))
        written = []
        for each, at, marks in zip(turns, places, marked, strict=True):
            prompt, whole = next(prompts), next(wholes)
            earlier = tuple((next(prompts), next(wholes)) for _ in at)
            if not _is_chain(earlier, prompt):
                raise UsageError(
                    "the template writes earlier replies of a conversation differently once another turn follows",
                    hint="give --train_on last to train on the last reply of a conversation, or another template",
                )
            # a prompt that the whole text does not begin with is followed by the reply alone
            is_beginning = whole.startswith(prompt)
            reply = whole[len(prompt) :] if is_beginning else each[-1].content + chat.end
            written.append(Written(prompt, whole if is_beginning else "", reply, marks, earlier, is_chat=True))
        return written

    def _turns(self, row: Row, marks: Marked) -> list[Turn]:
        """The turns with their control text marked; a system turn that the template refuses joins the first user's."""
        turns = [turn._replace(content=text) for turn, text in zip(row.turns, marks.texts, strict=True)]
        if turns[0].role == "system" and self.chat and not self.chat.takes_system:
            system, user, *rest = turns
            return [user._replace(content=f"{system.content}\n\n{user.content}"), *rest]
        return turns


def _earlier_replies(turns: Sequence[Turn]) -> list[int]:
    return [place for place, turn in enumerate(turns[:-1]) if turn.role == "assistant"]


def _is_chain(earlier: Sequence[tuple[str, str]], prompt: str) -> bool:
    """Whether every text is the beginning of the next: before a reply, with it, before the next one, the prompt."""
    return all(after.startswith(before) for before, after in pairwise([*chain.from_iterable(earlier), prompt]))
