"""Which judges are asked, and what their tokens cost: what `evaluate_llm` and `plan` have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from fedlora.config.schema import split_names

LOCAL = "local:"
"""Begins the name of a judge that is a base model on this machine."""


def _read_judges(value: Any) -> Any:
    """`a,b` or a list of names as one text, each name once."""
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    if not isinstance(value, str) or not value:
        return value
    names = split_judges(value)
    if "" in names:
        raise ValueError("names no model between two commas")
    if LOCAL in names:
        raise ValueError("name a model, such as local:smollm2-135m")
    if again := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{again!r} is given twice; repeats asks one judge several times")
    return ",".join(names)


def _read_prices(value: Any) -> Any:
    """`2,0.4`, a list or one number as a tuple; nothing for None."""
    if isinstance(value, bool):
        return value
    parts = [value] if isinstance(value, int | float) else split_names(value)
    if not isinstance(parts, list | tuple):
        return parts
    prices = tuple(map(float, parts))
    if any(not math.isfinite(price) or price < 0 for price in prices):
        raise ValueError("must be finite numbers of at least 0")
    return prices or None


JudgeNames = Annotated[str, BeforeValidator(_read_judges)]
JudgePrices = Annotated[tuple[float, ...] | None, BeforeValidator(_read_prices)]


def split_judges(names: str) -> tuple[str, ...]:
    """The names in `a,b`."""
    return tuple(name.strip() for name in names.split(","))


def judges_at_endpoint(names: str) -> tuple[str, ...]:
    """The judges among `names` that are no models on this machine."""
    return tuple(name for name in split_judges(names) if not name.startswith(LOCAL))


def check_prices(price_in: Sequence[float] | None, price_out: Sequence[float] | None, names: str) -> None:
    """ValueError for one price without the other, and for another number of prices than of judges with a price."""
    if (price_in is None) != (price_out is None):
        raise ValueError("give judge_price_in and judge_price_out, or neither")
    judges = len(judges_at_endpoint(names))
    for name, prices in (("judge_price_in", price_in), ("judge_price_out", price_out)):
        if prices is not None and len(prices) not in (1, judges):
            raise ValueError(f"{name} has {len(prices)} prices: give one for all judges, or one for each of {judges}")
