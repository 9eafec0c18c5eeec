"""Adapters of one loaded base that score and answer in turn, or side by side, without being loaded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedlora.llm.base_model import BaseModel
from fedlora.llm.decoding import Decoding, Request
from fedlora.llm.ends import Ends
from fedlora.llm.generation import generate_answers
from fedlora.llm.likelihood import Continuation, Likelihood, score_continuations
from fedlora.llm.lora import LoraModel
from fedlora.llm.memory import USEFUL_TOKENS
from fedlora.types import AdapterState


@dataclass(frozen=True)
class ResidentAdapters:
    """A base, and adapters for its layers by number; None is the base itself. `background` is what all stand on."""

    base: BaseModel
    lora: LoraModel | None
    states: Sequence[AdapterState | None]
    background: AdapterState | None
    tokens: int
    """Most tokens of a batch of answers, measured before adapters were stacked."""
    most_rows: int | None = None

    def score(
        self, number: int, asked: Sequence[Continuation], *, on_done: Callable[[int], None] = lambda count: None
    ) -> list[Likelihood]:
        """The likelihood of every continuation under one adapter."""
        self._set(number)
        budget = min(self.tokens, USEFUL_TOKENS[self.base.device.type])
        return score_continuations(self.base, asked, tokens_per_pass=budget, on_done=on_done)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        ends: Ends,
        *,
        on_done: Callable[[int], None] = lambda count: None,
    ) -> list[list[list[int]]]:
        """Adapter by adapter the ids of its answers to all prompts; several adapters share the batches."""
        together = self.lora if len(self.states) > 1 else None
        if together is None:
            self._set(0)
        else:
            together.set_background(self.background)
            together.stack_adapters(self.states, self.base.dtype)
        requests = [
            Request(prompt, row, adapter) for adapter in range(len(self.states)) for row, prompt in enumerate(prompts)
        ]
        found = generate_answers(
            self.base,
            requests,
            decoding,
            tokens_per_pass=self.tokens,
            most_rows=self.most_rows,
            lora=together,
            ends=ends,
            on_rows=on_done,
        )
        return [found[start : start + len(prompts)] for start in range(0, len(found), len(prompts))]

    def _set(self, number: int) -> None:
        if self.lora is not None:
            self.lora.set_background(self.background)
            self.lora.set_adapter(self.states[number])
