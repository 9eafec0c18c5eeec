"""How the adapted layers are named: plain names, paths with wildcards, and regular expressions after `re:`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from fedlora.config.schema import split_names

ALL_LINEAR = "all-linear"
REGULAR = "re:"
MOST_TARGETS = 10_000
LONGEST_TARGET = 1000
_REGULAR_START = re.compile(rf"(?:^|,)\s*{REGULAR}")


def is_pattern(target: str) -> bool:
    """Whether a target stands for all names of a form and not for the end of a path."""
    return target.startswith(REGULAR) or "*" in target or "?" in target


def split_targets(value: Any) -> Any:
    """`q_proj,v_proj` as a list of targets; `re:` takes the rest of the text, commas and brackets included."""
    if isinstance(value, list | tuple):
        return [part for each in value for part in (split_targets(each) if isinstance(each, str) else [each])]
    found = _REGULAR_START.search(value) if isinstance(value, str) else None
    if found is None:
        return split_names(value)
    return [*split_names(value[: found.start()]), REGULAR + value[found.end() :].strip()]


def check_targets(value: tuple[str, ...]) -> tuple[str, ...]:
    """The targets, each once and sorted; ValueError for none, and for what is no regular expression."""
    if not value:
        raise ValueError("name at least one layer, or all-linear")
    if len(value) > MOST_TARGETS or max(map(len, value)) > LONGEST_TARGET:
        raise ValueError(f"at most {MOST_TARGETS} targets of {LONGEST_TARGET} characters")
    for target in value:
        if not target.startswith(REGULAR):
            continue
        try:
            re.compile(target.removeprefix(REGULAR))
        except re.error as error:
            raise ValueError(f"{target!r} is not a regular expression: {error}") from None
    return tuple(sorted(set(value)))


Targets = Annotated[tuple[str, ...], BeforeValidator(split_targets), AfterValidator(check_targets)]
"""Type of a field that names adapted layers."""
