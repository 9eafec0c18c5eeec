"""Who a stage is about and after which round: the fields `of`, `against` and `round`, as they are typed.

`runs/subjects.py` finds the adapters and files that they mean.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from fedlora.config.schema import Config, split_names

WORDS = "base, global, all, a client's name or number, 0-3, or NAME/ROUND/who for another run; several with commas"
"""What `of` and `against` take."""
ROUNDS = "a number, last or best (lowest held-out loss)"
"""What `round` takes."""


def read_round(value: Any) -> Any:
    """A round as typed: a number from 1, `last`, `best`, or None; ValueError for anything else."""
    if value is None or value in ("last", "best") or (type(value) is int and value >= 1):
        return value
    text = value.strip() if isinstance(value, str) else ""
    if isinstance(value, str) and not text:
        return None
    if text.isascii() and text.isdigit() and int(text[:10]) >= 1:
        return int(text)
    raise ValueError("takes a number from 1, last or best")


def _read_last(value: Any) -> Any:
    """As `read_round`, without `best`: for what is about several runs."""
    if value == "best":
        raise ValueError("each run has its own best round: takes a number from 1 or last")
    return read_round(value)


def _read_words(value: Any) -> Any:
    """`base,library` or a list of names and numbers; nothing for None."""
    parts = split_names(value)
    if isinstance(parts, int) and not isinstance(parts, bool):
        parts = [parts]
    if not isinstance(parts, list | tuple):
        return parts
    return tuple(str(part) if isinstance(part, int) else part for part in parts) or None


WhichRound = Annotated[int | Literal["last", "best"] | None, BeforeValidator(read_round)]
LastRound = Annotated[int | Literal["last"] | None, BeforeValidator(_read_last)]
Subjects = Annotated[tuple[str, ...] | None, BeforeValidator(_read_words)]


def contract_words(*, is_base_model: bool, is_global_model: bool, client_id: int) -> tuple[str, ...]:
    """The reference project's three flags as `of` has it; the base model wins over the others."""
    if is_base_model:
        return ("base",)
    return ("global",) if is_global_model else (str(client_id),)


def refuse_both(config: Config, field: str, *others: str) -> None:
    """ValueError where a field and one of those that it takes the place of are given."""
    given = [name for name in others if config.chosen(name)]
    if getattr(config, field) is not None and given:
        raise ValueError(f"{field} takes the place of {given[0]}: give one of them")
