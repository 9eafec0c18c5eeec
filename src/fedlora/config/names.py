"""Short names of fields, and how a message spells them.

The fields of every configuration keep the names of the reference project, in attributes, records and files. A flag, a
line of a YAML file and a keyword may use the short name instead; messages then use the spelling that was typed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from fedlora.errors import UsageError

SHORT_NAMES = MappingProxyType(
    {
        "federation_mode": "method",
        "base_model": "model",
        "data_path": "data",
        "test_file_path": "test",
        "target_file": "test",
        "exp_name": "name",
        "exp_names": "names",
        "num_communication_rounds": "rounds",
        "communication_rounds": "round",
        "of_subjects": "of",
        "against_subjects": "against",
        "client_selection_frac": "client_fraction",
        "local_batch_size": "batch_size",
        "local_num_epochs": "epochs",
        "local_learning_rate": "learning_rate",
        "lora_r": "rank",
        "lora_dropout": "dropout",
        "lora_target_modules": "target_modules",
        "prompt_template": "template",
        "gpt_model": "judge_model",
        "base_url": "judge_url",
        "modes": "methods",
    }
)
"""Field -> its short name."""


def short_name(field: str, fields: Collection[str]) -> str:
    """The short name of a field of a configuration with these fields; the field's own where it has none there."""
    short = SHORT_NAMES.get(field, field)
    return field if short in fields else short


def field_names(fields: Collection[str]) -> dict[str, str]:
    """Every name that stands for one of these fields, short or not -> the field."""
    return {short_name(field, fields): field for field in fields} | {field: field for field in fields}


def as_fields(given: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """`given` under the names of fields; unknown names are left as they are. UsageError for a field with two values."""
    known = field_names(fields)
    spelled: dict[str, str] = {}
    for name in given:
        field = known.get(name, name)
        if field in spelled:
            raise UsageError(f"{spelled[field]} and {name} are the same field", hint="keep one of the two")
        spelled[field] = name
    return {field: given[name] for field, name in spelled.items()}


@contextlib.contextmanager
def spelling() -> Iterator[None]:
    """Inside, messages use short names, and a field's own name once that is typed."""
    token = _typed.set(set())
    try:
        yield
    finally:
        _typed.reset(token)


def note_spelling(names: Iterable[str]) -> None:
    """Messages keep to these names from now on."""
    typed = _typed.get()
    if typed is not None:
        typed.update(names)


def spell(text: str) -> str:
    """`text` as the user names the fields; unchanged outside `spelling`."""
    typed = _typed.get()
    return text if typed is None else _FIELD.sub(lambda found: _spelled(found, typed), text)


_typed: ContextVar[set[str] | None] = ContextVar("typed", default=None)
_FIELD = re.compile(rf"(?<![\w/.\-])(--)?({'|'.join(sorted(SHORT_NAMES, key=len, reverse=True))})(?![\w/\-]|\.\w)")


def _spelled(found: re.Match[str], typed: Collection[str]) -> str:
    lead, field = found[1] or "", found[2]
    return found[0] if field in typed else lead + SHORT_NAMES[field]
