"""What a prompt is made with besides the tokenizer: the template, what it is given, and the rule for token ids."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from fedlora.config.schema import Config, flag
from fedlora.errors import UsageError
from fedlora.nearest import nearest

ALPACA, CHAT = "alpaca", "chat"
TEMPLATES = (ALPACA, CHAT)
"""Templates that need no file."""

FOLDER = Path("templates")
"""Where a template is found by its name."""

ENDINGS = (".jinja", ".jinja2", ".j2")
DATE = "2024-07-26"
"""The date that templates see: the one that Llama's own templates fall back to."""

TOKEN_RULE = 2
"""How text becomes ids. 1 encoded every part of a prompt by itself; 2 encodes the whole text, as servers do."""


RECORDED_ONLY = frozenset({"template_text", "token_rule"})
"""Fields that are kept with a run and are no flags."""


@dataclass(frozen=True)
class PromptSettings:
    """A template by name, its text where it comes from a file, its keyword arguments, and the date it may insert."""

    template: str = ALPACA
    text: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str = DATE
    token_rule: int = TOKEN_RULE

    def record(self) -> dict[str, Any]:
        """What decides the ids of a prompt, as JSON values; settings that older records lack only where they differ
        from what these had."""
        later = {
            "token_rule": (self.token_rule, 1),
            "template_text": (self.text, ""),
            "template_kwargs": (dict(self.kwargs), {}),
            "template_date": (self.date, DATE),
        }
        return {"prompt_template": self.template} | {name: now for name, (now, then) in later.items() if now != then}


def _split_settings(value: Any) -> Any:
    """Accept `name=value,other=value` for a mapping; values are read as YAML has them."""
    import yaml

    if not isinstance(value, str):
        return value
    found: dict[str, Any] = {}
    for part in filter(None, (each.strip() for each in value.split(","))):
        name, equals, text = (word.strip() for word in part.partition("="))
        if not name or not equals:
            raise ValueError(f"{part!r} is not name=value")
        found[name] = yaml.safe_load(text)
    return found


def _check_date(value: Any) -> Any:
    text = value.isoformat() if isinstance(value, datetime.date) else value
    if isinstance(text, str) and text:
        try:
            datetime.date.fromisoformat(text)
        except ValueError:
            raise ValueError("not a date such as 2026-01-31") from None
    return text


TemplateKwargs = Annotated[dict[str, Any], BeforeValidator(_split_settings)]
TemplateDate = Annotated[str, BeforeValidator(_check_date)]


class NamesTemplate(Config):
    """Base of configurations with a field `prompt_template`: the file it names is read once, and its text kept."""

    template_text: str = flag("", "text of the template's file")

    @classmethod
    def flat_fields(cls) -> dict[str, Any]:
        return {name: found for name, found in super().flat_fields().items() if name not in RECORDED_ONLY}

    @model_validator(mode="before")
    @classmethod
    def _read_template(cls, given: Any) -> Any:
        name = given.get("prompt_template") if isinstance(given, Mapping) else None
        if name is None or name in (*TEMPLATES, "auto") or given.get("template_text"):
            return given
        file = find_template(str(name))
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: not a readable template: {error}", hint="save it as UTF-8 text") from None
        if not text.strip():
            raise UsageError(f"{file}: the template is empty", hint="write a Jinja chat template, or use chat")
        return {**given, "prompt_template": file.name, "template_text": text}


def find_template(name: str) -> Path:
    """The file of a template: itself, or `templates/NAME.jinja`. UsageError where there is none."""
    file = Path(name).expanduser()
    if name.endswith(ENDINGS):
        if file.is_file():
            return file
        raise UsageError(f"prompt_template={name}: no such file", hint="give a Jinja chat template, alpaca or chat")
    found = [FOLDER / f"{name}{ending}" for ending in ENDINGS]
    if file := next((each for each in found if each.is_file()), None):
        return file
    there = sorted(each.stem for each in FOLDER.glob("*") if each.name.endswith(ENDINGS)) if FOLDER.is_dir() else []
    close = nearest(name, [*TEMPLATES, *there])
    raise UsageError(
        f"prompt_template={name!r}: no such template" + (f" (did you mean {close}?)" if close else ""),
        hint=f"give {', '.join([*TEMPLATES, *there])}, or a file such as my.jinja",
    )
