"""Conversations from files: turns of OpenAI's form (role, content) and of ShareGPT's (from, value).

Every stage trusts what passes here: at most one system turn, which comes first, then user and assistant in turn. What
a chat template would have to guess at (two turns of one side, tools, pictures) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from fedlora.data.field_text import FieldText, kind_of, refuse
from fedlora.data.raw_records import shorten
from fedlora.rows import Role, Turn

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
}
_TOOLS = frozenset({"tool", "function", "function_call", "observation", "ipython"})
_CALLS = ("tool_calls", "function_call")
_KEYS = (("role", "from"), ("content", "value"))
_USED = frozenset(key for keys in _KEYS for key in keys)
_ORDER = "a conversation is a system turn or none, then user and assistant in turn, and ends with the assistant"
_MESSAGES = 'a list of messages is [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
_PAIRS = 'a history is [["question", "answer"], ...]; write other turns as messages'
_NO_TOOLS = "leave out rows with tools, or give --skip_bad"

Last = Literal["assistant", "user", "any"]
"""Who speaks last in a conversation: the assistant where it holds its reply, the user where the reply is elsewhere."""


class Said(NamedTuple):
    """A turn, and what errors call the fields of its role and its content, such as `messages[3].role`."""

    turn: Turn
    role_at: str
    content_at: str


class ConversationReader:
    """Turns of the values of fields; `note_unused` is given the names of a turn's keys that are not used."""

    def __init__(self, texts: FieldText, note_unused: Callable[[Iterable[str]], None]) -> None:
        self._texts = texts
        self._note_unused = note_unused

    def read_turns(self, value: Any, name: str) -> list[Said]:
        """The turns of a list of messages, or of a text that is such a list as JSON; in any order yet."""
        messages = self._texts.decode(value, name)
        if type(messages) is not list:
            raise refuse(f"the field {name!r} must be a list of messages, got {kind_of(messages)}", _MESSAGES)
        return [self._read_turn(each, f"{name}[{place}]", name) for place, each in enumerate(messages)]

    def read_history(self, value: Any, name: str) -> list[Said]:
        """The turns of a list of pairs (user, assistant)."""
        pairs = self._texts.decode(value, name)
        if type(pairs) is not list:
            raise refuse(f"the field {name!r} must be a list of pairs, got {kind_of(pairs)}", _PAIRS)
        said: list[Said] = []
        for place, pair in enumerate(pairs):
            if type(pair) is not list or len(pair) != 2:
                got = f"{len(pair)} values" if type(pair) is list else kind_of(pair)
                raise refuse(f"the field '{name}[{place}]' must be a pair of texts, got {got}", _PAIRS)
            for side, role in enumerate(("user", "assistant")):
                called = f"{name}[{place}][{side}]"
                said.append(Said(Turn(role, self._texts.clean(pair[side], called)), called, called))
        return said

    def _read_turn(self, message: Any, called: str, name: str) -> Said:
        if type(message) is not dict:
            what = f"the field {called!r} must be an object with role and content, got {kind_of(message)}"
            raise refuse(what, _MESSAGES)
        if not _USED.issuperset(message):
            for key in _CALLS:
                if message.get(key):
                    raise refuse(f"the field '{called}.{key}': tools are not supported", _NO_TOOLS)
            self._note_unused([f"{name}[].{key}" for key in message if key not in _USED and key not in _CALLS])
        if not set(_KEYS[0]).intersection(message):
            keys = ", ".join(map(shorten, message)) or "no keys"
            raise refuse(f"the field {called!r} has neither 'role' nor 'from', but {keys}", _MESSAGES)
        role, role_at = _pick(message, called, _KEYS[0])
        content, content_at = _pick(message, called, _KEYS[1])
        turn = Turn(self._read_role(role, role_at), self._read_content(content, content_at))
        return Said(turn, role_at, content_at)

    def _read_role(self, value: Any, called: str) -> Role:
        role = ROLES.get(value) if type(value) is str else None
        if role is not None:
            return role
        if value in (None, ""):
            raise refuse(f"the field {called!r} is empty", _ORDER)
        if type(value) is str and value in _TOOLS:
            raise refuse(f"the field {called!r} is {value!r}: tools are not supported", _NO_TOOLS)
        text = self._texts.clean(value, called)
        raise refuse(f"the field {called!r} is no known role: {shorten(text)}", f"roles are {', '.join(ROLES)}")

    def _read_content(self, value: Any, called: str) -> str:
        """Text, or a list of parts that are text."""
        if value is None:
            raise refuse(f"the field {called!r} must be text, got null", 'write "" for a reply that is empty')
        if type(value) is not list:
            return self._texts.clean(value, called)
        texts = []
        for place, part in enumerate(value):
            kind = part.get("type") if type(part) is dict else kind_of(part)
            if type(part) is not dict or kind != "text":
                what = f"the field '{called}[{place}]' is a part of the type {shorten(str(kind))}"
                raise refuse(f"{what}; only text is supported", 'a part is {"type": "text", "text": ...}')
            texts.append(self._texts.clean(part.get("text"), f"{called}[{place}].text"))
        return "".join(texts)


def add_system(said: list[Said], system: Said) -> list[Said]:
    """The conversation with the system turn of another field; RecordError where it has a different one."""
    if not said or said[0].turn.role != "system":
        return [system, *said]
    if said[0].turn != system.turn:
        raise refuse(
            f"the fields {system.content_at!r} and {said[0].content_at!r} are different system prompts", _ORDER
        )
    return said


def check_turns(said: Sequence[Said], last: Last = "any") -> None:
    """RecordError with the turn that stands where it must not."""
    before = None
    for turn, at, _ in said:
        if turn.role == before:
            raise refuse(f"the field {at!r} repeats {before!r}", _ORDER)
        if turn.role == "system" and before is not None:
            raise refuse(f"the field {at!r}: the system turn must be the first", _ORDER)
        if turn.role == "assistant" and before != "user":
            raise refuse(f"the field {at!r}: the conversation starts with the assistant", _ORDER)
        before = turn.role
    if before in (None, "system"):
        raise refuse("the conversation has no user turn", _ORDER)
    for turn, _, at in said[:-1] if before == "assistant" else said:
        if not turn.content.strip():
            raise refuse(f"the field {at!r} is empty", "only the last turn, the reply, may be empty")
    if last not in ("any", before):
        raise refuse(f"the field {said[-1].role_at!r}: the conversation must end with the {last}", _ORDER)


def _pick(message: dict[str, Any], called: str, keys: tuple[str, str]) -> tuple[Any, str]:
    """The value of one of two keys and what errors call it; RecordError where both are there and differ."""
    usual, other = keys
    if other not in message:
        return message.get(usual), f"{called}.{usual}"
    first, second = message.get(usual), message[other]
    if first is None or first == second:
        return second, f"{called}.{other}"
    if second is None:
        return first, f"{called}.{usual}"
    raise refuse(f"the fields '{called}.{usual}' and '{called}.{other}' differ")
