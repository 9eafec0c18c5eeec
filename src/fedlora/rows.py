"""One example as every stage knows it, and the rules by which examples are read from files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant"]
RowKind = Literal["instruction", "conversation", "completion", "text"]
"""An instruction with its input, a conversation of roles, a prompt and what follows it, and plain text."""

RowFormat = Literal["auto", "any", "instruction", "messages", "conversations", "completion", "text"]
"""How rows are written: auto finds it by the fields of a file's first row, any by those of each."""

_NOTHING: Mapping[str, Any] = {}


class Turn(NamedTuple):
    """What one side of a conversation says."""

    role: Role
    content: str

    def as_dict(self) -> dict[str, str]:
        """The turn as a message of OpenAI's format."""
        return {"role": self.role, "content": self.content}


class PromptShape(NamedTuple):
    """What a template must have a place for, in rows of one kind."""

    kind: RowKind = "instruction"
    has_input: bool = False
    has_system: bool = False
    has_history: bool = False


@dataclass(frozen=True)
class Row:
    """One example as stored: the last exchange of a conversation, the turns before it, and what else the row held.

    `instruction` with `input` is the last user turn, `output` the assistant's reply. `before` starts with the system
    turn, if there is one, and then alternates user and assistant. A completion has a prompt in `instruction` that no
    template frames; a text is all `output`. `more` holds the columns that the reader was asked to keep.
    """

    instruction: str
    input: str
    output: str
    category: str
    before: tuple[Turn, ...] = ()
    kind: RowKind = "instruction"
    more: Mapping[str, Any] = field(default_factory=lambda: _NOTHING, compare=False)

    @property
    def prompt(self) -> tuple[str, ...]:
        """What decides the answer; two rows with the same prompt are duplicates. Of a text it is the text."""
        if self.kind == "text":
            return (self.output, "")
        return (self.instruction, self.input, *(part for turn in self.before for part in turn))

    @property
    def earlier_prompts(self) -> tuple[tuple[str, ...], ...]:
        """The `prompt` of every exchange before the last: a row that has one of them is this row's beginning."""
        replies = [place for place, turn in enumerate(self.before) if turn.role == "assistant"]
        return tuple(
            (self.before[place - 1].content, "", *(part for turn in self.before[: place - 1] for part in turn))
            for place in replies
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that is said, in order; what is not there is empty."""
        return (*(turn.content for turn in self.before), self.instruction, self.input, self.output)

    @property
    def question(self) -> str:
        """The last user turn as one text."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction

    @property
    def asked(self) -> tuple[Turn, ...]:
        """The conversation up to the reply."""
        return (*self.before, Turn("user", self.question))

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The whole conversation."""
        return (*self.asked, Turn("assistant", self.output))

    @property
    def shape(self) -> PromptShape:
        """What its template must have a place for."""
        has_system = bool(self.before) and self.before[0].role == "system"
        return PromptShape(self.kind, bool(self.input), has_system, len(self.before) > has_system)

    def as_dict(self) -> dict[str, Any]:
        """The row as a file holds it; reading it again gives the same row, but for `more`."""
        if self.kind == "conversation":
            return {"messages": [turn.as_dict() for turn in self.turns], "category": self.category}
        if self.kind == "completion":
            return {"prompt": self.instruction, "completion": self.output, "category": self.category}
        if self.kind == "text":
            return {"text": self.output, "category": self.category}
        return {**self._instruction(), "output": self.output, "category": self.category}

    def as_answered(self, answer: str) -> dict[str, Any]:
        """The row of a file of predictions: what was asked, and the answer. A text asks nothing."""
        if self.kind == "conversation":
            asked: dict[str, Any] = {"messages": [turn.as_dict() for turn in self.asked]}
        elif self.kind == "completion":
            asked = {"prompt": self.instruction}
        else:
            asked = self._instruction()
        return {**asked, "answer": answer, "category": self.category}

    def _instruction(self) -> dict[str, Any]:
        system = [turn.content for turn in self.before if turn.role == "system"]
        said = [turn.content for turn in self.before if turn.role != "system"]
        history = [list(pair) for pair in zip(said[::2], said[1::2], strict=True)]
        return {
            "instruction": self.instruction,
            "input": self.input,
            **({"system": system[0]} if system else {}),
            **({"history": history} if history else {}),
        }


@dataclass(frozen=True)
class ReadRules:
    """How rows are read from a file: which fields they have, what is tolerated, what is mended rather than refused.

    `skip_bad` is how many bad rows of a file are left out, each named, before one is an error. `columns` maps a field
    of a row to the name that the file has for it, nested names with dots. `keep` names columns that `Row.more` holds as
    text and every row has, `keep_any` columns that it holds as they are, where a row has them.
    """

    max_record_bytes: int = 4 << 20
    skip_bad: int = 0
    numbers_as_text: bool = False
    surrogates: Literal["refuse", "replace"] = "refuse"
    row_kind: RowFormat = "auto"
    columns: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    keep: tuple[str, ...] = ()
    keep_any: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The rules that differ from the default, as JSON values: what decides the rows besides the file."""
        found = {name: value for name, value in vars(self).items() if value != getattr(STRICT, name)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}


STRICT = ReadRules()
"""Every row counts and nothing is mended."""

MIXED = ReadRules(row_kind="any")
"""For files that fedlora wrote from several, whose rows may be of several kinds."""
