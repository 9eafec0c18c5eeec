"""The judges of one command: models at the endpoint, which share its limits, and models on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.config.judge_models import judges_at_endpoint
from fedlora.evaluation.judge.asking import Asked, Forecast, JudgeEndpoint, Sleep
from fedlora.evaluation.judge.batch_judge import BatchJudge
from fedlora.evaluation.judge.desks import Desk
from fedlora.evaluation.judge.protocol import Question, Sample
from fedlora.evaluation.judge.replies import Usage
from fedlora.evaluation.judge.spending import Prices, Spending, judge_prices
from fedlora.evaluation.judge.verdict_results import ComparedAnswers
from fedlora.plain_text import counted

if TYPE_CHECKING:
    from fedlora.llm.base_model import BaseModel


class Judge(Protocol):
    """One model at an endpoint or on this machine."""

    @property
    def name(self) -> str: ...

    @property
    def place(self) -> str: ...

    def questions(self, sample: Sample) -> tuple[Question, ...]: ...

    def forecast(self, questions: Sequence[Question]) -> Forecast: ...

    def open(self, desk: Desk) -> None: ...

    def ask(self, questions: Sequence[Question], desk: Desk, *, of: str, total: int) -> Asked: ...


def make_judges(
    config: EvaluateLlmConfig, sleep: Sleep, load: Callable[..., BaseModel] | None
) -> tuple[list[Judge], Spending]:
    """The judges in the order of their names, and what they spend together; `load` as in `evaluate_llm.run`."""
    has_prices = config.judge_price_in is not None
    spending = Spending(max_calls=config.max_calls, max_cost=config.max_cost, has_prices=has_prices)
    names = judges_at_endpoint(config.gpt_model)
    prices: Sequence[Prices | None] = [None] * len(names)
    if config.judge_price_in is not None and config.judge_price_out is not None:
        prices = judge_prices(config.judge_price_in, config.judge_price_out, len(names))
    judges: list[Judge] = []
    for name in config.judges:
        if name in names:
            endpoint = JudgeEndpoint(config, name, prices[names.index(name)], spending, sleep=sleep)
            judges.append(BatchJudge(config, endpoint, spending, sleep=sleep) if config.batch else endpoint)
        else:
            judges.append(_local_judge(config, name, load))
    return judges, spending


def forecast_text(judges: Sequence[Judge], panels: Sequence[tuple[Sequence[ComparedAnswers], Desk]]) -> str:
    """What a command takes that asks several judges or about several pairs; empty where one forecast says it all.

    Each panel has what is compared, with the questions of each judge, and where the verdicts are.
    """
    seen: set[str] = set()
    forecasts: list[Forecast] = []
    for panel, desk in panels:
        pending = desk.batches.keys
        for judge, answers in zip(judges, panel, strict=True):
            # the other direction of a pair is not asked about again
            waiting = [
                one
                for one in answers.open_questions(desk.log)
                if not {one.key, one.mirror} & seen and one.key not in pending
            ]
            seen |= {question.key for question in waiting}
            if waiting:
                forecasts.append(judge.forecast(waiting))
    asked = [one for one in forecasts if one.requests]
    if len(asked) < 2:
        return ""
    tokens = Usage(sum(one.usage.tokens_in for one in asked), sum(one.usage.tokens_out for one in asked))
    costs = [one.cost for one in asked if one.cost is not None]
    whole = Forecast(sum(one.requests for one in asked), tokens, sum(costs) if costs else None)
    return f"{counted(whole.requests, 'request')} in all, {whole.text()}"


def _local_judge(config: EvaluateLlmConfig, name: str, load: Callable[..., BaseModel] | None) -> Judge:
    # these bring in torch
    from fedlora.evaluation.judge.local_judge import LocalJudge
    from fedlora.llm.base_model import load_base_model

    return LocalJudge(config, name, load or load_base_model)
