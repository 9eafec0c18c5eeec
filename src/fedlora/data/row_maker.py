"""A row of the fields of a record, for each kind of row. Where two names of one field are there, their values must
agree; null is an empty field. What cannot be used (a system prompt of a plain text) is refused, not left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedlora.data.columns import ColumnMap
from fedlora.data.conversations import ConversationReader, Last, Said, add_system, check_turns
from fedlora.data.field_text import FieldText, refuse
from fedlora.data.raw_records import ROW_HINT, RecordError, shorten
from fedlora.row_shapes import Names, RowShape
from fedlora.rows import Row, Turn

_CATEGORY: Names = ("category",)
_EMPTY = (None, "", "[]", [])
_LISTED = 90

Fields = Mapping[str, Any]
"""A record under the names of a row."""


class MissingFieldError(RecordError):
    """A record lacks a field that rows of its kind need."""


class RowMaker:
    """Makes rows; RecordError names the field, as the file calls it. `note` is given names that are not used."""

    def __init__(
        self,
        texts: FieldText,
        columns: ColumnMap,
        note: Callable[[Iterable[str]], None],
        *,
        needs_reply: bool,
        needs_category: bool,
    ) -> None:
        self._clean = texts.clean
        self._columns = columns
        self.needs_reply = needs_reply
        self._needs_category = needs_category
        self._conversations = ConversationReader(texts, note)
        self._makers = {
            "instruction": self._instruction,
            "messages": self._messages,
            "conversations": self._messages,
            "completion": self._completion,
            "text": self._plain_text,
        }

    def expect_replies(self, needs_reply: bool) -> None:
        """From the next row on, whether a row needs a reply."""
        self.needs_reply = needs_reply

    def make(self, fields: Fields, shape: RowShape) -> Row:
        """The row of a record of this shape."""
        return self._makers[shape.kind](fields, shape)

    def either(self, group: Names) -> str:
        """The names of a field in a message."""
        return " or ".join(map(repr, self._columns.labels(group)))

    def _instruction(self, fields: Fields, shape: RowShape) -> Row:
        instruction = self._text(fields, shape.asks[0], True)
        given = self._text(fields, shape.may[0])
        output = self._text(fields, shape.reply, self.needs_reply)
        category = self._category(fields)
        if "system" not in fields and "history" not in fields:
            return Row(instruction, given, output, category)
        said: list[Said] = []
        if not _is_empty(fields.get("history")):
            said = self._conversations.read_history(fields["history"], self._label("history"))
        said = self._with_system(fields, said)
        asked = self._label(shape.asks[0][0])
        check_turns([*said, Said(Turn("user", "-"), asked, asked)], "user")
        return Row(instruction, given, output, category, tuple(each.turn for each in said))

    def _messages(self, fields: Fields, shape: RowShape) -> Row:
        name = shape.asks[0][0]
        self._refuse_field(fields, "history", shape, "a conversation holds its turns itself")
        said = self._turns(fields, name)
        other = shape.may[0][0]
        others = said if _is_empty(fields.get(other)) else self._turns(fields, other)
        if [each.turn for each in others] != [each.turn for each in said]:
            raise refuse(f"the fields {self._label(name)!r} and {self._label(other)!r} are two conversations")
        return self._conversation(fields, said, shape.reply)

    def _completion(self, fields: Fields, shape: RowShape) -> Row:
        prompt, completion = fields.get("prompt"), fields.get(shape.reply[0])
        self._refuse_field(fields, "history", shape, "write the turns as messages")
        if shape.reply == ("completion",) and {type(prompt), type(completion)} == {str, list}:
            both = f"{self._label('prompt')!r} and {self._label('completion')!r}"
            raise refuse(f"of the fields {both} one is text, the other a list", "give both as text or as messages")
        if type(prompt) is not list:
            self._refuse_field(fields, "system", shape, "no template frames a completion; write messages")
            asked = self._text(fields, shape.asks[0], True)
            answer = self._text(fields, shape.reply, self.needs_reply)
            return Row(asked, "", answer, self._category(fields), (), "completion")
        said = self._turns(fields, "prompt")
        if shape.reply != ("completion",):
            return self._conversation(fields, said, shape.reply)
        if completion is not None or self.needs_reply:
            said += self._turns(fields, "completion")
        return self._conversation(fields, said, ())

    def _plain_text(self, fields: Fields, shape: RowShape) -> Row:
        for name in ("system", "history"):
            self._refuse_field(fields, name, shape, "a text is trained on as it is; write messages")
        return Row("", "", self._text(fields, shape.reply, True), self._category(fields), (), "text")

    def _conversation(self, fields: Fields, said: list[Said], reply: Names) -> Row:
        """The row of a conversation; with a `reply` its answer is in that field, and the user speaks last."""
        last: Last = "any" if not self.needs_reply else "user" if reply else "assistant"
        said = self._with_system(fields, said)
        check_turns(said, last)
        answer = self._text(fields, reply, self.needs_reply) if reply else ""
        turns = [each.turn for each in said]
        if turns[-1].role == "assistant":
            answer = turns.pop().content
        return Row(turns[-1].content, "", answer, self._category(fields), tuple(turns[:-1]), "conversation")

    def _turns(self, fields: Fields, name: str) -> list[Said]:
        if name not in fields:
            self._lacking(fields, (name,))
        return self._conversations.read_turns(fields[name], self._label(name))

    def _with_system(self, fields: Fields, said: list[Said]) -> list[Said]:
        system, label = self._text(fields, ("system",)), self._label("system")
        return add_system(said, Said(Turn("system", system), label, label)) if system.strip() else said

    def _category(self, fields: Fields) -> str:
        category = self._text(fields, _CATEGORY, self._needs_category)
        if self._needs_category and not category.strip():
            raise refuse(f"the field {self._label('category')!r} is empty")
        return category

    def _refuse_field(self, fields: Fields, name: str, shape: RowShape, reason: str) -> None:
        if not _is_empty(fields.get(name)):
            raise refuse(f"the field {self._label(name)!r} has no place beside {shape}", f"{reason}, or leave it out")

    def _label(self, name: str) -> str:
        return self._columns.label(name)

    def _text(self, fields: Fields, group: Names, required: bool = False) -> str:
        present = [name for name in group if fields.get(name) is not None]
        if not present:
            return self._lacking(fields, group) if required else ""
        text = fields[present[0]]
        if type(text) is not str or not text.isascii():
            text = self._clean(text, self._label(present[0]))
        for name in present[1:]:
            if self._clean(fields[name], self._label(name)) != text:
                raise refuse(f"the fields {' and '.join(repr(self._label(each)) for each in present)} differ")
        return text

    def _lacking(self, fields: Fields, group: Names) -> str:
        """RecordError of a field that is null or not there."""
        for name in group:
            if name in fields:
                self._clean(None, self._label(name))
        hint = self._columns.suggest(group) or ROW_HINT
        raise MissingFieldError("", f"the field {self.either(group)} is missing", hint=hint)


def listed(names: Iterable[str]) -> str:
    """Names from a file in a message, as many as a line has room for."""
    shown = ", ".join(map(shorten, names))
    return shown if len(shown) <= _LISTED else shown[:_LISTED] + "..."


def _is_empty(value: Any) -> bool:
    return value in _EMPTY
