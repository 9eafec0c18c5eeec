"""What counts as the judge's answer: one JSON object, and around it only what no answer under judgement can write.

A reply may be fenced once as a whole and may begin with one block of thoughts, because servers add both. Prose around
the object is refused, and so is a second fence or block: a judge that quotes an answer in its prose or its thoughts
would otherwise let that answer speak for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fedlora.evaluation.judge.protocol import SentText, Verdict

_THOUGHTS = re.compile(r"<think>((?:(?!</?think>).)*)</think>(?!.*</?think>)", re.DOTALL)
_FENCED = re.compile(r"```(?:json)?[ \t]*\r?\n(.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)
_VERDICTS: dict[str, Verdict] = {"a": "A", "b": "B", "tie": "tie"}


def _whole(value: Any) -> Any:
    """40.0 is 40: some servers write every number with a point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _verdict(value: Any) -> Any:
    return _VERDICTS.get(value.lower(), value) if isinstance(value, str) else value


def _text(value: Any) -> Any:
    """A reason decides nothing, so one of another type is none."""
    return value if isinstance(value, str) else ""


Score = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=100)]


class Opinion(BaseModel):
    """What the judge says about one sample of a request; further keys are not read."""

    model_config = ConfigDict(strict=True, frozen=True)

    id: str
    score_a: Score
    score_b: Score
    verdict: Annotated[Verdict, BeforeValidator(_verdict)]
    reason: Annotated[str, BeforeValidator(_text)] = ""


def parse_reply(text: str, questions: Sequence[SentText]) -> dict[str, Opinion]:
    """Opinions by question key; a question whose entry is missing, doubled or malformed is left out.

    One bad entry does not spoil the others of the same reply; text that is not the object spoils all.
    """
    try:
        reply = json.loads(_unwrapped(text), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(reply, dict) or not isinstance(reply.get("results"), list):
        return {}
    claims: dict[str, list[Any]] = {}
    for entry in reply["results"]:
        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
            claims.setdefault(entry["id"], []).append(entry)
    opinions = {}
    for number, question in enumerate(questions, start=1):
        entries = claims.get(f"s{number}", [])
        opinion = _parse_entry(entries[0]) if len(entries) == 1 else None
        if opinion is not None:
            opinions[question.key] = opinion
    return opinions


def _unwrapped(text: str) -> str:
    """The text without one leading block of thoughts and without one fence around all the rest."""
    text = text.removeprefix("\ufeff").strip()
    if thoughts := _THOUGHTS.match(text):
        text = text[thoughts.end() :].strip()
    fenced = _FENCED.fullmatch(text)
    return fenced.group(1) if fenced else text


def _parse_entry(entry: Any) -> Opinion | None:
    try:
        return Opinion.model_validate(entry)
    except ValidationError:
        return None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is given twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
