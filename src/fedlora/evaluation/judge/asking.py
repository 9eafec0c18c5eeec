"""Asking a judge at an endpoint what has no verdict yet: forecast, limits, and what a run learns on the way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.console import Progress, say
from fedlora.errors import UsageError
from fedlora.evaluation.judge.completion import complete
from fedlora.evaluation.judge.concessions import RequestShape
from fedlora.evaluation.judge.desks import Desk
from fedlora.evaluation.judge.judge_forecast import forecast_requests
from fedlora.evaluation.judge.key import load_key
from fedlora.evaluation.judge.protocol import ORDERS, Question, Sample, make_question
from fedlora.evaluation.judge.replies import Usage
from fedlora.evaluation.judge.spending import Prices, Spending
from fedlora.plain_text import counted
from fedlora.redaction import redacted_logs

if TYPE_CHECKING:
    from fedlora.evaluation.judge.replies import FailureKind

Sleep = Callable[[float], Awaitable[None]]

_LEAST_REPLY, _PER_SAMPLE, _PER_REASON = 4096, 64, 128
"""Tokens that a reply may have where the cost is limited: thoughts, an entry for each sample, and its reason."""


@dataclass(frozen=True)
class Asked:
    """Why questions got no verdict, by key; of the replies that could not be used the first, and its file."""

    failures: Mapping[str, FailureKind]
    unusable: str = ""
    file: Path | None = None
    is_pending: bool = False
    """Whether questions are in a batch that is not collected."""


class Forecast(NamedTuple):
    """Requests, tokens and cost; `cost` is None without prices."""

    requests: int
    usage: Usage
    cost: float | None

    def text(self) -> str:
        """For a person."""
        text = f"about {self.usage.tokens_in:,} tokens in and {self.usage.tokens_out:,} out"
        return text if self.cost is None else f"{text}: about {self.cost:.2f} in the currency of the prices"


class JudgeEndpoint:
    """One model at an endpoint during one command: what it does not take; `spending` is that of all judges."""

    def __init__(
        self,
        config: EvaluateLlmConfig,
        name: str,
        prices: Prices | None,
        spending: Spending,
        *,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.name = name
        self._config = config
        self.prices = prices
        self._spending = spending
        self._sleep = sleep
        self.shape = RequestShape(_most_tokens(config), reasons=config.reasons)

    @property
    def place(self) -> str:
        """Whose verdicts they are, in the key of each: the endpoint's host."""
        return urlsplit(self._config.base_url).hostname or ""

    def questions(self, sample: Sample) -> tuple[Question, ...]:
        """What is asked about a sample: each repeat in both orders."""
        how = {"judge": self.name, "host": self.place, "reasons": self._config.reasons}
        repeats = range(1, self._config.repeats + 1)
        return tuple(make_question(sample, order, repeat=repeat, **how) for repeat in repeats for order in ORDERS)

    def forecast(self, questions: Sequence[Question]) -> Forecast:
        """What asking `questions` takes, without repairs and retries."""
        # it brings in the client library, which takes a second
        from fedlora.evaluation.judge.judging import make_batches

        batches = make_batches(questions, self._config.batch_size)
        # of most texts a token has about four bytes; the judge's own tokenizer is not here
        usage = forecast_requests(batches, seed=self._config.seed, count_tokens=lambda text: len(text.encode()) // 4)
        return Forecast(len(batches), usage, self.prices.of(usage) if self.prices else None)

    def open(self, desk: Desk) -> None:
        """UsageError where a batch has questions of this judge: they would be paid for twice."""
        if batches := desk.batches.of(self.name, self.place):
            raise UsageError(
                f"{desk.batches.path}: {counted(len(batches), 'batch', 'batches')} of {self.name} not collected",
                hint="add --batch to collect them, or delete the file to give them up",
            )

    def ask(self, questions: Sequence[Question], desk: Desk, *, of: str, total: int) -> Asked:
        """Ask `questions`, which are some of `total` on what `of` says; verdicts go to the log.

        Raises UsageError (key), JudgeError (the endpoint refuses), BudgetError (max_calls, max_cost).
        """
        return self.begin(questions, desk, of=of, total=total, concurrency=self._config.concurrency)[0]

    def begin(
        self, questions: Sequence[Question], desk: Desk, *, of: str, total: int, concurrency: int
    ) -> tuple[Asked, list[Sequence[Question]]]:
        """As `ask`; with a `concurrency` of 0 only until it is known what the endpoint takes and that its replies can
        be used. The requests that were not sent come second."""
        config = self._config
        key = load_key(config.api_key_file, os.environ)

        # these bring in the client library, which takes a second
        from fedlora.evaluation.judge.client import JudgeClient
        from fedlora.evaluation.judge.judging import Judging, Unusable, make_batches

        batches = make_batches(questions, config.batch_size)
        say(f"judge: {of} in both orders, {self._plan(questions, total)}")
        has_verdicts = len(questions) < total
        unusable = Unusable(desk.unusable_file, goes_on=config.allow_partial, has_verdicts=has_verdicts)

        async def ask_all(progress: Progress) -> tuple[dict[str, FailureKind], list[Sequence[Question]]]:
            client = JudgeClient(
                config,
                key,
                model=self.name,
                prices=self.prices,
                shape=self.shape,
                spending=self._spending,
                sleep=self._sleep,
            )
            async with client:
                judging = Judging(client, desk.log, unusable, seed=config.seed, advance=progress.advance)
                try:
                    rest = await judging.run(batches, concurrency)
                finally:
                    say(f"judge: {self._spending.text()}")
                return judging.failures, rest

        with redacted_logs(), Progress("judge", total, "verdicts", done=total - len(questions)) as progress:
            failures, rest = complete(ask_all(progress))
        return Asked(failures, unusable.first, unusable.file if unusable.first else None), rest

    def _plan(self, questions: Sequence[Question], total: int) -> str:
        address, most_calls = urlsplit(self._config.base_url), self._config.max_calls
        forecast = self.forecast(questions)
        text = (
            f"{total - len(questions)} of {counted(total, 'verdict')} stored; "
            f"{counted(forecast.requests, 'request')} (more with repairs and retries) to {self.name} "
            f"at {address.scheme}://{address.netloc}{address.path}, {forecast.text()}"
        )
        if most_calls is not None and most_calls < forecast.requests:
            text += f"; max_calls={most_calls} will end this run early"
        return text


def _most_tokens(config: EvaluateLlmConfig) -> int | None:
    if config.judge_max_tokens is None and config.max_cost is not None:
        return _LEAST_REPLY + (_PER_SAMPLE + _PER_REASON * config.reasons) * config.batch_size
    return config.judge_max_tokens
