"""The prompt format of a run for other programs: as a Jinja chat template, and as a template of Ollama.

The Jinja text needs nothing beside it: keyword arguments and the date that a run gave its template are written into it.
Ollama's is composed of the pieces that the template writes around the texts of a conversation.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.llm.chat_template import ChatTemplate
from fedlora.llm.prompts import PromptEncoder
from fedlora.llm.row_text import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from fedlora.rows import Turn

_SYSTEM, _USER, _REPLY = "fedlora7system3mark", "fedlora7user3mark", "fedlora7reply3mark"
_ALPACA_REFUSAL = "this model was trained on single questions: one user message, no system message"


@dataclass(frozen=True)
class ServingTemplate:
    """How a prompt is framed, and what ends an answer."""

    jinja: str
    ollama: str
    stops: tuple[str, ...]
    """Texts before which an answer ends."""
    stop_ids: tuple[int, ...]
    about: str
    """A sentence for the model card."""


def make_serving_template(encoder: PromptEncoder) -> ServingTemplate:
    """The template of a run, from the encoder that made its prompts."""
    ends = encoder.ends(None)
    tokens = encoder.tokenizer.convert_ids_to_tokens(sorted(ends.ids))
    stops = tuple(dict.fromkeys([*map(str, tokens), *ends.texts]))
    ids = tuple(sorted(encoder.stop_ids))
    if encoder.chat is None:
        return ServingTemplate(_alpaca_jinja(encoder), _alpaca_ollama(), stops, ids, _about_alpaca())
    name = "the tokenizer's own" if not encoder.settings.text else f"`{encoder.settings.template}`"
    about = f"Prompts were framed by {name} chat template, which the tokenizer here carries."
    return ServingTemplate(_standalone(encoder.chat), _chat_ollama(encoder), stops, ids, about)


def _standalone(chat: ChatTemplate) -> str:
    """The template with the values that the run gave it; a server that gives an argument itself keeps its own."""
    given = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in sorted(chat.kwargs.items())
    )
    dates = chat.dates()
    calendar = f"{{% macro strftime_now(format) %}}{{{{ {dates!r}[format] }}}}{{% endmacro %}}" if dates else ""
    return f"{given}{calendar}{chat.source}"


def _alpaca_jinja(encoder: PromptEncoder) -> str:
    """One user message becomes the prompt of a row without an input."""
    head, tail = ALPACA_WITHOUT_INPUT
    start = "{{ bos_token }}" if encoder.text.prefix else ""
    return (
        "{% for message in messages %}"
        "{% if loop.index0 == 0 and message['role'] == 'user' %}"
        f"{start}{{{{ {head!r} }}}}{{{{ message['content'] }}}}{{{{ {tail!r} }}}}"
        "{% elif loop.index0 == 1 and message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
        f"{{% else %}}{{{{ raise_exception({_ALPACA_REFUSAL!r}) }}}}{{% endif %}}"
        "{% endfor %}"
    )


def _alpaca_ollama() -> str:
    head, tail = ALPACA_WITHOUT_INPUT
    return f"{_go(head)}{{{{ .Prompt }}}}{_go(tail)}{{{{ .Response }}}}"


def _about_alpaca() -> str:
    without, within = ("".join(f"{part}{slot}" for part, slot in pairs) for pairs in _alpaca_pairs())
    return (
        "Prompts were framed as those of Alpaca; the chat template here writes the first form, for one user message. "
        f"As plain text:\n\n```text\n{without}\n```\n\nand with an input:\n\n```text\n{within}\n```"
    )


def _alpaca_pairs() -> tuple[Any, Any]:
    without = zip(ALPACA_WITHOUT_INPUT, ("{instruction}", ""), strict=True)
    return without, zip(ALPACA_WITH_INPUT, ("{instruction}", "{input}", ""), strict=True)


def _chat_ollama(encoder: PromptEncoder) -> str:
    """The pieces around system, user and assistant texts, put together in Go's template language.

    The text of the start token is left out where it comes first: llama.cpp adds the token itself.
    """
    chat = encoder.chat
    if chat is None:
        raise ValueError("a chat template is needed")
    user, reply = Turn("user", _USER), Turn("assistant", _REPLY)
    first, _, tail = chat.render([[user]], asks=True)[0].partition(_USER)
    between = chat.render([[user, reply, user]], asks=True)[0].partition(_REPLY)[2].partition(_USER)[0]
    start = str(getattr(encoder.tokenizer, "bos_token", None) or "")
    if adds_start_token(encoder.tokenizer):
        first = first.removeprefix(start)
    opening = _go(first)
    if chat.takes_system:
        head, _, rest = chat.render([[Turn("system", _SYSTEM), user]], asks=True)[0].partition(_SYSTEM)
        if adds_start_token(encoder.tokenizer):
            head = head.removeprefix(start)
        middle = rest.partition(_USER)[0]
        opening = f"{{{{ if .System }}}}{_go(head)}{{{{ .System }}}}{_go(middle)}{{{{ else }}}}{opening}{{{{ end }}}}"
    return (
        f"{opening}{{{{ $n := 0 }}}}{{{{ range .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ if $n }}}}{_go(between)}{{{{ end }}}}{{{{ $n = 1 }}}}'
        f"{{{{ .Content }}}}{_go(tail)}"
        '{{ else if eq .Role "assistant" }}{{ .Content }}{{ end }}{{ end }}'
    )


def adds_start_token(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its start token in front of a text."""
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _go(text: str) -> str:
    """Plain text inside a template of Go."""
    return text.replace("{{", '{{ "{{" }}')


def save_tokenizer(tokenizer: Any, template: ServingTemplate, folder: Path) -> None:
    """The tokenizer's files in `folder`, with this chat template."""
    kept = copy.copy(tokenizer)
    kept.chat_template = template.jinja
    kept.save_pretrained(folder)
