"""What the requests of a run cost, and limits that are never exceeded.

Before a request leaves, the most that it can cost is set aside: a token has at least one byte, and the length of a
reply is limited in the request. Afterwards the endpoint's own count takes its place. An answer without a count, and a
request that may have been answered, count with all that was set aside. So do requests of a batch until it is collected.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

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


class Spent(BaseModel):
    """Requests, tokens and cost; `uncounted` answers had no count of tokens."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0
    cost: float = 0.0

    def plus(self, other: Spent) -> Spent:
        """Both together."""
        return Spent(**{name: value + getattr(other, name) for name, value in self})

    def minus(self, other: Spent) -> Spent:
        """What was spent after `other`."""
        return Spent(**{name: value - getattr(other, name) for name, value in self})

    @classmethod
    def on(cls, usage: Usage | None, most: float, prices: Prices | None, *, calls: int) -> Spent:
        """A reply with this count of tokens; one without costs the most that it can."""
        if usage is None:
            return cls(calls=calls, uncounted=1, cost=most)
        cost = prices.of(usage) if prices else 0.0
        return cls(calls=calls, tokens_in=usage.tokens_in, tokens_out=usage.tokens_out, cost=cost)


class Spending:
    """What a command spends, over all its judges and pairs; `max_cost` needs prices."""

    def __init__(self, *, max_calls: int | None, max_cost: float | None, has_prices: bool) -> None:
        self.spent = Spent()
        self._has_prices = has_prices
        self._max_calls, self._max_cost = max_calls, max_cost
        self._set_aside: list[float] = []
        self._held: list[float] = []
        """The most that each request of a batch can cost."""
        self._waiting: list[asyncio.Future[None]] = []
        self._is_resumed = False

    @property
    def calls(self) -> int:
        """Requests that were sent."""
        return self.spent.calls

    async def find_room(self, price: float) -> None:
        """Return once `price` can be set aside for a request; BudgetError where that would pass the limit.

        Waits for requests in flight where their end may leave enough.
        """
        while self._is_too_much(price):
            if not self._set_aside:
                self._refuse(price)
            settled = asyncio.get_running_loop().create_future()
            self._waiting.append(settled)
            await settled

    def begin(self, set_aside: float) -> None:
        """Count one request, for which `set_aside` is kept; BudgetError where the limit on calls is reached."""
        self._check_calls()
        self.add(Spent(calls=1))
        self._set_aside.append(set_aside)

    def end(self, set_aside: float, usage: Usage | None, prices: Prices | None, *, may_be_charged: bool) -> None:
        """The request for which `set_aside` was kept is over; `usage` is the endpoint's count, None for none."""
        self._set_aside.remove(set_aside)
        if usage is not None or may_be_charged:
            self.add(Spent.on(usage, set_aside, prices, calls=0))
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    def resume(self, spent: Spent) -> None:
        """Count what earlier calls of the command spent, as far as its batches are not collected."""
        self._is_resumed = self._is_resumed or spent != Spent()
        self.add(spent)

    def add(self, spent: Spent) -> None:
        """Count what is over."""
        self.spent = self.spent.plus(spent)

    def reserve(self, price: float) -> None:
        """Set `price` aside for a request of a batch to be; BudgetError where that would pass a limit."""
        self._check_calls()
        if self._is_too_much(price):
            self._refuse(price)
        self.hold(price)

    def hold(self, price: float) -> None:
        """Set `price` aside for a request of a batch that an endpoint works on."""
        self._held.append(price)

    def _is_too_much(self, price: float) -> bool:
        there = self.spent.cost + sum(self._set_aside) + sum(self._held)
        return self._max_cost is not None and there + price > self._max_cost

    def _refuse(self, price: float) -> None:
        held = f", {sum(self._held):.4f} set aside for batches" if self._held else ""
        spent = f"{self.spent.cost:.4f} is spent{held}, and the next request may cost {price:.4f}"
        raise BudgetError(f"max_cost={self._max_cost:g}: {spent}")

    def _check_calls(self) -> None:
        if self._max_calls is not None and self.spent.calls + len(self._held) >= self._max_calls:
            raise BudgetError(f"the limit of max_calls={self._max_calls} is reached")

    def text(self) -> str:
        """For a person."""
        spent = self.spent
        text = f"{counted(spent.calls, 'call')} {'since the first batch' if self._is_resumed else 'in this run'}"
        if spent.tokens_in or spent.tokens_out:
            text += f", {spent.tokens_in:,} tokens in and {spent.tokens_out:,} out"
        if spent.uncounted and self._has_prices:
            text += f", {counted(spent.uncounted, 'answer')} without a count of tokens"
        if self._has_prices:
            text += f": {'at most ' if spent.uncounted else ''}{spent.cost:.4f} in the currency of the prices"
        if self._held:
            most = f", at most {sum(self._held):.4f}" if self._has_prices else ""
            text += f"; {counted(len(self._held), 'request')} in batches{most}"
        return text

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        spent = self.spent
        return {
            "calls": spent.calls,
            "tokens_in": spent.tokens_in,
            "tokens_out": spent.tokens_out,
            "answers_without_count": spent.uncounted,
            "cost": spent.cost if self._has_prices else None,
        }


def most_tokens(request: Mapping[str, Any]) -> Usage:
    """The most tokens of a request whose reply is limited, and of that reply."""
    texts = [message["content"] for message in request["messages"]]
    size = sum(len(text.encode()) for text in texts) + len(json.dumps(request.get("response_format", "")))
    return Usage(size + _FRAME, request.get("max_completion_tokens", request.get("max_tokens", 0)))
