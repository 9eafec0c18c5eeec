"""Which of our faster ways to compute are right for a base, as its self-check found.

For every way there is a slower one that is the model's own. A limit is the longest row, answer included, for which a
way gives the model's own results: 0 is never, ALWAYS is at any length.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

ALWAYS = sys.maxsize

HeadKind = Literal["linear", "own", "model"]
"""How logits come from hidden states: the output layer alone; the model's own code after its decoder (scales, soft
caps); only the whole forward pass, for all positions."""


@dataclass(frozen=True)
class Abilities:
    """What a base computes as it would by itself. The defaults are those of Llama and its like.

    `equal_rows` is several rows of one length in a training pass, `padding` those of different lengths, `shared_prefix`
    their first tokens computed once; `own_cache` is our cache and decoding, `equal_prompts`, `padded_prompts` and
    `shared_prompts` the same three while answering.
    `fast_layers` is the longest row of a training pass through `llm/fast`, if the base is of Llama's kind.
    `longest` is the longest row that the model itself computes without regard to the rows before it.
    """

    decoder: str = "model"
    """Path of the part that turns token ids into hidden states; empty where there is none apart from the head."""
    head: HeadKind = "linear"
    own_attention: bool = True
    equal_rows: bool = True
    padding: int = ALWAYS
    shared_prefix: int = ALWAYS
    own_cache: int = ALWAYS
    equal_prompts: bool = True
    padded_prompts: int = ALWAYS
    shared_prompts: int = ALWAYS
    fast_layers: int = 0
    longest: int = ALWAYS
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Field -> what was seen without it, of each that is off or limited because results differed."""

    def on(self, names: Iterable[str]) -> Abilities:
        """The same with some ways right at any length."""
        return replace(self, **{name: _level(name, on=True) for name in names})

    def off(self, names: Iterable[str]) -> Abilities:
        """The same without some ways."""
        return replace(self, **{name: _level(name, on=False) for name in names})

    def up_to(self, limit: int, names: Iterable[str]) -> Abilities:
        """The same with some ways right up to a length, and without those that know no length."""
        found = {}
        for name in names:
            value = getattr(self, name)
            found[name] = False if isinstance(value, bool) else min(value, limit)
        return replace(self, **found)

    def record(self) -> dict[str, Any]:
        """JSON values; a limit that is none is null."""
        return {name: None if value == ALWAYS else value for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Abilities:
        """The abilities of a record; ValueError where it is not one."""
        if set(record) != {one.name for one in fields(cls)} or record["head"] not in get_args(HeadKind):
            raise ValueError("not a record of abilities")
        values: dict[str, Any] = {name: ALWAYS if value is None else value for name, value in record.items()}
        return cls(**values)

    def sentence(self) -> str:
        """What is computed in a slower way because the faster one differs; empty where nothing is."""
        hidden = {padded for equal, padded in _INCLUDED if equal in self.reasons}
        return ", ".join(self._slower(name) for name in _SLOWER if name in self.reasons and name not in hidden)

    def _slower(self, name: str) -> str:
        value = getattr(self, name)
        beyond = "" if value in (0, False) or isinstance(value, str) else f" beyond {value:,} tokens"
        return _SLOWER[name] + beyond


def _level(name: str, *, on: bool) -> bool | int:
    """What a way is when it is right at any length, or not at all."""
    return on if isinstance(getattr(Abilities(), name), bool) else on * ALWAYS


_INCLUDED = (("equal_rows", "padding"), ("equal_prompts", "padded_prompts"))
_SLOWER = {
    "head": "its own forward pass gives the logits of all positions",
    "own_attention": "its own attention",
    "equal_rows": "training passes hold one row",
    "padding": "training passes hold rows of one length",
    "shared_prefix": "no shared prefix in training",
    "own_cache": "transformers' own cache and generate()",
    "equal_prompts": "prompts are answered one by one",
    "padded_prompts": "prompts of one length are answered together",
    "shared_prompts": "no shared prefix of prompts",
    "fast_layers": "its own layers in training",
    "longest": "refused: rows",
}
