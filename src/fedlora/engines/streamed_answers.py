"""Answers that are heard of while they are written: every model has a prompt of its own, and all answer in one batch.

Models that stand on other bases, or on other additions to it, answer one group after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.generate import GenerateConfig
from fedlora.config.prompting import ALPACA
from fedlora.engines.answerers import Answerers, OpenAnswerers, by_round, find_answerers
from fedlora.engines.answering import Answering
from fedlora.llm.decoding import Request
from fedlora.llm.generation import generate_answers
from fedlora.llm.memory import plan_batch
from fedlora.llm.resident_base import ResidentBase
from fedlora.paths import OutputName
from fedlora.rows import Row
from fedlora.runs.subjects import Subject

HEARD_SECONDS = 0.05
"""A text is decoded and passed on at most so often."""
OnText = Callable[[Subject, str], None]


@dataclass(frozen=True)
class Reply:
    """What a model answered: text, tokens, seconds until its group had finished; `is_cut` where the limit ended it."""

    text: str
    num_tokens: int
    seconds: float
    is_cut: bool
    prompt: str
    """What the model was given, with its control tokens."""


class StreamedAnswers:
    """Subjects whose files are checked, and the base in memory from the first question on."""

    def __init__(self, subjects: Sequence[Subject], load: Callable[..., Any] | None = None) -> None:
        self.subjects = tuple(subjects)
        self._load = load or ResidentBase().load
        self._found: tuple[Any, dict[tuple[str, int], Answerers]] = (None, {})
        self._open: tuple[tuple[str, int], OpenAnswerers, list[list[OutputName]], int] | None = None

    def template(self, config: GenerateConfig, subject: Subject) -> str:
        """The name of the template that frames what a model is asked. Raises UsageError, StorageError."""
        return self._find(config)[subject.run, subject.round_number].source.prompting.template

    def takes_turns(self, config: GenerateConfig, subject: Subject) -> bool:
        """Whether that template has a place for a system turn and for earlier turns."""
        return self.template(config, subject) != ALPACA

    def answer(
        self, config: GenerateConfig, rows: Mapping[Subject, Row], number: int, on_text: OnText
    ) -> dict[Subject, Reply]:
        """Everybody's reply to its own row; `number` is that of the question, which decides what sampling draws.

        Raises UsageError where a row does not fit a template, TrainingError where memory runs out.
        """
        replies: dict[Subject, Reply] = {}
        for place, found in self._find(config).items():
            opened, groups, tokens = self._opened(place, found, config)
            who = {one.output: one for one in self.subjects if (one.run, one.round_number) == place}
            asking = config.model_copy(update={"tokens_per_pass": tokens})
            options = {"label": place[0], "called": found.called}
            for group in groups:
                asked = [who[name] for name in group]
                answering = Answering(
                    asking, found.source, opened.base, opened.lora, [rows[one] for one in asked], **options
                )
                together = answering.set_adapters(*opened.load(group))
                replies |= _stream(answering, asked, together, number, on_text)
        return {one: replies[one] for one in self.subjects}

    def _find(self, config: GenerateConfig) -> dict[tuple[str, int], Answerers]:
        """Whose adapters answer under the prompts of `config`; looked up again where another template is asked for."""
        key = (config.prompt_template, config.template_text)
        if self._found[0] != key:
            self._open = None
            places = by_round(self.subjects)
            self._found = (key, {place: find_answerers(config, place, found) for place, found in places.items()})
        return self._found[1]

    def _opened(
        self, place: tuple[str, int], found: Answerers, config: GenerateConfig
    ) -> tuple[OpenAnswerers, list[list[OutputName]], int]:
        """The base with layers for one round's adapters, who answers together, and how many tokens a pass may hold;
        opening another round takes the layers away."""
        if self._open is None or self._open[0] != place:
            self._open = None
            opened = found.open(config, self._load)
            # both try the model, so before adapters are stacked
            groups, tokens = opened.group(1, together=True), config.tokens_per_pass or plan_batch(opened.base)
            self._open = (place, opened, groups, tokens)
        return self._open[1:]


def _stream(
    answering: Answering, asked: Sequence[Subject], together: Any, number: int, on_text: OnText
) -> dict[Subject, Reply]:
    began, heard = time.monotonic(), [0.0] * len(asked)

    def read(ids: Sequence[int]) -> str:
        return answering.ends.cut(answering.encoder.decode(list(ids)))

    def hear(place: int, ids: Sequence[int]) -> None:
        if (now := time.monotonic()) - heard[place] >= HEARD_SECONDS:
            heard[place] = now
            on_text(asked[place], read(ids))

    requests = [Request(prompt.ids, number, place) for place, prompt in enumerate(answering.prompts)]
    found = generate_answers(
        answering.base,
        requests,
        answering.decoding,
        tokens_per_pass=answering.tokens,
        ends=answering.ends,
        lora=together,
        on_token=hear,
    )
    seconds, most = time.monotonic() - began, answering.decoding.max_new_tokens
    replies = {}
    for one, request, ids in zip(asked, requests, found, strict=True):
        prompt = str(answering.encoder.tokenizer.decode(list(request.prompt), skip_special_tokens=False))
        replies[one] = Reply(read(ids), len(ids), seconds, len(ids) >= most, prompt)
        on_text(one, replies[one].text)
    return replies
