"""What the requests of a run cost, and limits that are never exceeded.

Before a request leaves, the most that it can cost is set aside: a token has at least one byte, and the length of a
reply is limited in the request. Afterwards the endpoint's own count takes its place. An answer without a count, and a
request that may have been answered, count with all that was set aside.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.errors import BudgetError
from fedlora.evaluation.judge.replies import Usage
from fedlora.plain_text import counted

_FRAME = 256
"""Tokens that a chat template and an endpoint's own instructions may add to a request."""


@dataclass(frozen=True)
class Prices:
    """Of a million tokens that the judge reads and writes."""

    tokens_in: float
    tokens_out: float

    def of(self, usage: Usage) -> float:
        """In the currency of the prices."""
        return (usage.tokens_in * self.tokens_in + usage.tokens_out * self.tokens_out) / 1e6


def judge_prices(price_in: tuple[float, ...], price_out: tuple[float, ...], judges: int) -> list[Prices]:
    """Of each judge at an endpoint, from one price for all of them or one for each."""
    every_in, every_out = (prices * judges if len(prices) == 1 else prices for prices in (price_in, price_out))
    return [Prices(one, other) for one, other in zip(every_in, every_out, strict=True)]


class Spending:
    """Requests, tokens and cost of a command, over all its judges and pairs; `max_cost` needs prices."""

    def __init__(self, *, max_calls: int | None, max_cost: float | None, has_prices: bool) -> None:
        self.calls = self.tokens_in = self.tokens_out = 0
        self.uncounted = 0
        """Answers for which the endpoint reported no tokens."""
        self.cost = 0.0
        self._has_prices = has_prices
        self._max_calls, self._max_cost = max_calls, max_cost
        self._set_aside: list[float] = []
        self._waiting: list[asyncio.Future[None]] = []

    async def find_room(self, price: float) -> None:
        """Return once `price` can be set aside for a request; BudgetError where that would pass the limit.

        Waits for requests in flight where their end may leave enough.
        """
        while self._max_cost is not None and self.cost + sum(self._set_aside) + price > self._max_cost:
            if not self._set_aside:
                spent = f"{self.cost:.4f} is spent, and the next request may cost {price:.4f}"
                raise BudgetError(f"max_cost={self._max_cost:g}: {spent}")
            settled = asyncio.get_running_loop().create_future()
            self._waiting.append(settled)
            await settled

    def begin(self, set_aside: float) -> None:
        """Count one request, for which `set_aside` is kept; BudgetError where the limit on calls is reached."""
        if self._max_calls is not None and self.calls >= self._max_calls:
            raise BudgetError(f"the limit of max_calls={self._max_calls} is reached")
        self.calls += 1
        self._set_aside.append(set_aside)

    def end(self, set_aside: float, usage: Usage | None, prices: Prices | None, *, may_be_charged: bool) -> None:
        """The request for which `set_aside` was kept is over; `usage` is the endpoint's count, None for none."""
        self._set_aside.remove(set_aside)
        if usage is not None:
            self.tokens_in += usage.tokens_in
            self.tokens_out += usage.tokens_out
            self.cost += prices.of(usage) if prices else 0.0
        elif may_be_charged:
            self.uncounted += 1
            self.cost += set_aside
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    def text(self) -> str:
        """For a person."""
        text = f"{counted(self.calls, 'call')} in this run"
        if self.tokens_in or self.tokens_out:
            text += f", {self.tokens_in:,} tokens in and {self.tokens_out:,} out"
        if self.uncounted and self._has_prices:
            text += f", {counted(self.uncounted, 'answer')} without a count of tokens"
        if self._has_prices:
            text += f": {'at most ' if self.uncounted else ''}{self.cost:.4f} in the currency of the prices"
        return text

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "calls": self.calls,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "answers_without_count": self.uncounted,
            "cost": self.cost if self._has_prices else None,
        }


def most_tokens(request: Mapping[str, Any]) -> Usage:
    """The most tokens of a request whose reply is limited, and of that reply."""
    texts = [message["content"] for message in request["messages"]]
    size = sum(len(text.encode()) for text in texts) + len(json.dumps(request.get("response_format", "")))
    return Usage(size + _FRAME, request.get("max_completion_tokens", request.get("max_tokens", 0)))
