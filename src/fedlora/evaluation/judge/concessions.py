"""What an endpoint does not take of a request, found by dropping one thing at a time.

Endpoints with OpenAI's interface refuse optional parts of a request, each in a wording of its own. A part that the
refusal names is dropped; where it names none, the parts are dropped one after another in a fixed order until a request
is accepted. Then those that were dropped on suspicion alone are sent again, once. All this happens at the beginning of
a run, while requests go one by one; a refused request is not paid for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from fedlora.evaluation.judge.protocol import response_format

_SCHEMA = r"json.?schema|response.?format|json.?object|json.?mode|structured.output|grammar|guided"
_WORDS = {
    "response_format.strict": re.compile(r"\bstrict\b", re.IGNORECASE),
    "response_format.json_schema": re.compile(_SCHEMA, re.IGNORECASE),
    "response_format": re.compile(_SCHEMA, re.IGNORECASE),
    "temperature": re.compile(r"temperature", re.IGNORECASE),
    "max_completion_tokens": re.compile(r"max.?completion.?tokens", re.IGNORECASE),
    "system role": re.compile(
        r"system.{0,3}(role|message|prompt|instruction)|developer.instruction|roles? .{0,30}\bsystem\b|must alternate",
        re.IGNORECASE,
    ),
}
CONCESSIONS = tuple(_WORDS)
"""In the order in which they are dropped. A dropped `response_format.json_schema` asks for any JSON object, a dropped
`max_completion_tokens` is sent as max_tokens, and a dropped system role puts its text before the user's."""

_PARTS_OF_FORMAT = ("response_format.strict", "response_format.json_schema")
Dropped = frozenset[str]


class RequestShape:
    """The optional parts that requests of a run still have; `max_tokens` is the limit of a reply, None for none."""

    def __init__(self, max_tokens: int | None = None, *, reasons: bool = False) -> None:
        self.dropped: Dropped = frozenset()
        self.is_settled = False
        """Whether a request of this shape was accepted, and nothing is left to try."""
        self._max_tokens = max_tokens
        self._format = response_format(reasons=reasons)
        self._named: Dropped = frozenset()
        self._suspected: list[str] = []
        self._fallback: Dropped | None = None
        """What was accepted, while less is tried to be dropped."""

    def adopt(self, dropped: Iterable[str]) -> None:
        """Send no request of this run with what an earlier one found to be refused, and look for nothing else."""
        self.dropped, self.is_settled = frozenset(dropped), True

    def write(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """Messages and optional parameters of a request, as the endpoint's function takes them."""
        dropped = self.dropped
        if "system role" in dropped:
            messages = [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
        request: dict[str, Any] = {"messages": messages}
        if "temperature" not in dropped:
            request["temperature"] = 0
        if "response_format" not in dropped:
            request["response_format"] = _format_without(self._format, dropped)
        if self._max_tokens is not None:
            name = "max_tokens" if "max_completion_tokens" in dropped else "max_completion_tokens"
            request[name] = self._max_tokens
        return request

    def accept(self, sent: Dropped) -> None:
        """A request without `sent` was answered."""
        if sent != self.dropped or self.is_settled:
            return
        least = _least(self._named | set(self._suspected[-1:]))
        if self._fallback is None and least != self.dropped:
            self.dropped, self._fallback = least, self.dropped
        else:
            self.is_settled = True

    def refuse(self, complaint: str, sent: Dropped, *, named_only: bool = False) -> bool:
        """A request without `sent` was refused with `complaint`: drop something; False where nothing is to be tried.

        With `named_only` nothing is dropped on suspicion.
        """
        if sent != self.dropped:
            return True
        if name := next((name for name in self._left() if _WORDS[name].search(complaint)), None):
            self._named |= {name}
            self.dropped = _least(self.dropped | {name})
            return True
        if named_only:
            return False
        if self._fallback is not None and not self.is_settled:
            self.dropped, self.is_settled = _least(self._fallback | self._named), True
            return True
        if self.is_settled or not (left := self._left()):
            return False
        self._suspected.append(left[0])
        self.dropped = _least(self.dropped | {left[0]})
        return True

    def _left(self) -> list[str]:
        """What can still be dropped, in order."""
        gone = set(self.dropped) | ({"max_completion_tokens"} if self._max_tokens is None else set())
        if self.dropped & {"response_format", "response_format.json_schema"}:
            gone |= {"response_format.strict"}
        if "response_format" in self.dropped:
            gone |= set(_PARTS_OF_FORMAT)
        return [name for name in CONCESSIONS if name not in gone]


def _least(names: frozenset[str] | set[str]) -> Dropped:
    """`names` without what the others contain."""
    if "response_format" in names:
        return frozenset(names).difference(_PARTS_OF_FORMAT)
    if "response_format.json_schema" in names:
        return frozenset(names) - {"response_format.strict"}
    return frozenset(names)


def _format_without(whole: dict[str, Any], dropped: Dropped) -> dict[str, Any]:
    if "response_format.json_schema" in dropped:
        return {"type": "json_object"}
    if "response_format.strict" not in dropped:
        return whole
    loose = copy.deepcopy(whole)
    del loose["json_schema"]["strict"]
    return loose
