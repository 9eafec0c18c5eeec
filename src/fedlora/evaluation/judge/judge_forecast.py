"""What judging one set of answers will take, from the test file alone: the stage's own questions and messages.

Answers do not exist yet, so the right answer stands in for both. Repairs and retries come on top, and the judge's own
tokenizer may count differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedlora.evaluation.judge.protocol import ORDERS, Question, make_question, request_code, write_messages
from fedlora.evaluation.judge.replies import Usage
from fedlora.evaluation.judge.samples import make_sample
from fedlora.evaluation.judge.spending import Prices
from fedlora.rows import Row


@dataclass(frozen=True)
class JudgeForecast:
    """For one comparison of two prediction files."""

    num_samples: int
    num_calls: int
    tokens_in: int
    tokens_out: int

    def times(self, count: int) -> JudgeForecast:
        """The same asked as often."""
        return JudgeForecast(self.num_samples, self.num_calls * count, self.tokens_in * count, self.tokens_out * count)

    def cost(self, prices: Sequence[Prices]) -> float:
        """What this takes of each judge, at the prices of each."""
        return sum(each.of(Usage(self.tokens_in, self.tokens_out)) for each in prices)


def forecast_judging(
    rows: Sequence[Row], *, batch_size: int, judge: str, seed: int, count_tokens: Callable[[str], int]
) -> JudgeForecast:
    """Calls and tokens of one judge on an answer to every row against another, in both orders, once."""
    # it brings in the client library, which takes a second
    from fedlora.evaluation.judge.judging import make_batches

    samples = [make_sample(number, row, row, row.output) for number, row in enumerate(rows, start=1)]
    every = [make_question(sample, order, judge=judge, host="") for sample in samples for order in ORDERS]
    batches = make_batches(list({question.key: question for question in every}.values()), batch_size)
    usage = forecast_requests(batches, seed=seed, count_tokens=count_tokens)
    return JudgeForecast(len(samples), len(batches), usage.tokens_in, usage.tokens_out)


def forecast_requests(batches: Sequence[Sequence[Question]], *, seed: int, count_tokens: Callable[[str], int]) -> Usage:
    """Tokens of one request for each batch, and of replies of the usual size."""
    asked = [message["content"] for batch in batches for message in write_messages(batch, request_code(batch, seed, 0))]
    return Usage(sum(map(count_tokens, asked)), sum(count_tokens(_reply(batch)) for batch in batches))


def _reply(batch: Sequence[Question]) -> str:
    """A reply of the usual size."""
    entries = [
        {"id": f"s{i}", "score_a": 75, "score_b": 50, "verdict": "A"} | ({"reason": "x" * 120} if one.reasons else {})
        for i, one in enumerate(batch, start=1)
    ]
    return json.dumps({"results": entries})
