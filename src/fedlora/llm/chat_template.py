"""A chat template: conversations as text, and what the template does besides writing down the turns.

What it does is found by rendering short conversations, not by reading its source: which text ends a reply, whether it
takes a system turn, which system prompt it writes when there is none, whether it inserts the date.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from fedlora.config.prompting import PromptSettings
from fedlora.errors import UsageError
from fedlora.nearest import suggest
from fedlora.rows import Turn

_USER, _REPLY, _SYSTEM = "fedlora7question3mark", "fedlora7reply3mark", "fedlora7system3mark"
_OTHER_DATE = "1999-12-31"
_DATE_FORMAT = re.compile(r"""(["'])((?:(?!\1).)*%(?:(?!\1).)*)\1""")
_WORD = re.compile(r"\w+")
_CALENDAR = (
    "{% macro strftime_now(format) %}{{ fedlora_dates[format] if format in fedlora_dates else "
    "raise_exception('strftime_now takes a literal format') }}{% endmacro %}{{ '' }}"
)
"""In front of a template that asks for today: its `strftime_now` gives the date of the settings."""


class ChatTemplate:
    """One template of one tokenizer, with its keyword arguments and its date."""

    def __init__(self, tokenizer: Any, settings: PromptSettings, controls: Sequence[str]) -> None:
        """`controls` are the texts of the tokenizer's added tokens.

        UsageError for a tokenizer without a template, for a template that drops a turn, and for a keyword argument
        that the template does not use.
        """
        text = settings.text
        if not text and not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "this tokenizer has no chat template", hint="use --prompt_template alpaca, or a Jinja file"
            )
        self.tokenizer = tokenizer
        self.source: str = text or tokenizer.get_chat_template()
        self.kwargs = dict(settings.kwargs)
        self.date = settings.date
        self.controls = controls
        self._called = f"the chat template {settings.template}" if text else "the chat template"
        self._check_kwargs()
        self._check_turns()

    def render(self, conversations: Sequence[Sequence[Turn]], *, asks: bool) -> list[str]:
        """Each conversation as text; `asks` writes what stands before a reply. UsageError with the template's words."""
        return self._render(conversations, asks=asks, date=self.date)

    @cached_property
    def suffix(self) -> str:
        """What the template writes after the last reply."""
        return self._once([Turn("user", _USER), Turn("assistant", _REPLY)]).rpartition(_REPLY)[2]

    @cached_property
    def end(self) -> str:
        """The suffix up to the token that ends a turn; empty where the template has no such token."""
        found = [(at, control) for control in self.controls if (at := self.suffix.find(control)) >= 0]
        if not found:
            return ""
        at, control = min(found, key=lambda each: (each[0], -len(each[1])))
        return self.suffix[: at + len(control)]

    @cached_property
    def next_turn(self) -> str:
        """What the template writes between the end of a reply and the next user's text."""
        turns = [Turn("user", _USER), Turn("assistant", _REPLY), Turn("user", _USER)]
        return self._once(turns).partition(_REPLY)[2].partition(_USER)[0].removeprefix(self.end)

    def close(self, text: str) -> str:
        """A rendered conversation up to the end of its last reply."""
        if not text.endswith(self.suffix):
            raise UsageError(
                f"{self._called} ends this conversation in another way than a short one",
                hint="use a template whose replies all end alike",
            )
        return text[: len(text) - len(self.suffix)] + self.end

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system turn is written; else it is put in front of the first user turn."""
        try:
            return _SYSTEM in self._once([Turn("system", _SYSTEM), Turn("user", _USER)], asks=True)
        except UsageError:
            return False

    @cached_property
    def rewrites_history(self) -> str:
        """Why a reply that later turns follow is not what it was as the last one; empty where it is."""
        first = [Turn("user", _USER), Turn("assistant", _REPLY)]
        both = self._once([*first, Turn("user", _USER), Turn("assistant", _REPLY)])
        if not both.startswith(self.close(self._once(first))):
            return "the template writes a reply differently once another turn follows it"
        if not both.startswith(self._once(first[:1], asks=True)):
            return "the template writes text in front of a new reply that it leaves out in front of an earlier one"
        return ""

    @cached_property
    def default_system(self) -> str:
        """The system prompt that the template writes where a conversation has none."""
        if not self.takes_system:
            return ""
        before = self._once([Turn("user", _USER)], asks=True).partition(_USER)[0]
        rendered = self._once([Turn("system", _SYSTEM), Turn("user", _USER)], asks=True)
        head, _, rest = rendered.partition(_SYSTEM)
        tail = rest.partition(_USER)[0]
        has_default = before.startswith(head) and before.endswith(tail) and len(before) > len(head) + len(tail)
        return before[len(head) : len(before) - len(tail)] if has_default else ""

    @cached_property
    def inserts_date(self) -> bool:
        """Whether the text depends on the date."""
        turns = [[Turn("user", _USER)]]
        return self._render(turns, asks=True, date=_OTHER_DATE) != self._render(turns, asks=True, date=self.date)

    def dates(self, date: str = "") -> dict[str, str] | None:
        """Format -> the day as the template writes it; None where the template does not ask for today."""
        if "strftime_now" not in self.source:
            return None
        day = datetime.date.fromisoformat(date or self.date)
        formats = {match[2] for match in _DATE_FORMAT.finditer(self.source)}
        return {one: day.strftime(one) for one in sorted(formats)}

    def _once(self, turns: Sequence[Turn], *, asks: bool = False) -> str:
        return self.render([turns], asks=asks)[0]

    def _render(self, conversations: Sequence[Sequence[Turn]], *, asks: bool, date: str) -> list[str]:
        if not conversations:
            return []
        source, kwargs = self.source, self.kwargs
        if (dates := self.dates(date)) is not None:
            source, kwargs = _CALENDAR + source, {**kwargs, "fedlora_dates": dates}
        messages = [[turn.as_dict() for turn in turns] for turns in conversations]
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=asks, **kwargs
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise UsageError(
                f"{self._called} refuses a conversation: {type(error).__name__}: {error}",
                hint="use another template, or change --template_kwargs",
            ) from error

    def _check_kwargs(self) -> None:
        words = set(_WORD.findall(self.source)) - {"messages", "add_generation_prompt"}
        for name in self.kwargs.keys() - words:
            raise UsageError(
                f"template_kwargs: {self._called} takes no {name!r}",
                hint=suggest(name, words) or "give the name of a variable that the template reads",
            )

    def _check_turns(self) -> None:
        rendered = self._once([Turn("user", _USER), Turn("assistant", _REPLY)])
        if _USER not in rendered or _REPLY not in rendered:
            lost = "user" if _USER not in rendered else "assistant"
            raise UsageError(f"{self._called} drops the {lost}'s message", hint="use --prompt_template alpaca")
