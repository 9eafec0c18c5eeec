"""Calls to an OpenAI-compatible endpoint: retries that end, hard limits on calls and cost, and a guarded key.

The library's own retries and redirects are off. Every request that leaves counts against the limits,
retries included; a redirect would carry the key to another host, so it ends the run. No exception of
the library leaves this module: it holds the request, and with it the key.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlsplit

import openai
from pydantic import SecretStr

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.errors import JudgeError, UsageError
from fedlora.evaluation.judge.concessions import RequestShape
from fedlora.evaluation.judge.key import Redactor
from fedlora.evaluation.judge.replies import Fault, Refusal, Reply, read_completion, read_status
from fedlora.evaluation.judge.spending import Prices, Spending, most_tokens
from fedlora.plain_text import counted
from fedlora.seeds import derive_seed

Sleep = Callable[[float], Awaitable[None]]

_FIRST_BACKOFF, _LONGEST_BACKOFF = 1.0, 60.0
_GIVE_UP_AFTER = 5
"""Requests in a row that failed after all their retries: then the endpoint is down, and asking on is no use."""


class Halted(Exception):  # noqa: N818
    """The run was stopped elsewhere while this request waited for its turn."""


class JudgeClient:
    """An asynchronous context manager around one model; its `shape` and the `spending` are of the whole run."""

    def __init__(
        self,
        config: EvaluateLlmConfig,
        key: SecretStr,
        *,
        model: str,
        prices: Prices | None,
        shape: RequestShape,
        spending: Spending,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.redactor = Redactor(key)
        self._config = config
        self._sleep = sleep
        self._model, self._prices = model, prices
        self._shape, self._spending = shape, spending
        self._halted = asyncio.Event()
        self._refused_first: JudgeError | None = None
        self._failed_in_a_row = 0
        self._was_reached = False
        self._host = urlsplit(config.base_url).netloc
        self._openai = open_endpoint(config, key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._openai.close()

    @property
    def is_settled(self) -> bool:
        """Whether it is known what the endpoint takes; until then requests go one by one."""
        return self._shape.is_settled

    def halt(self) -> None:
        """Let requests in flight finish and start no other: every later or waiting `ask` raises Halted."""
        self._halted.set()

    async def ask(self, messages: list[dict[str, str]]) -> Reply:
        """One reply, after at most `max_retries` retries.

        Raises JudgeError where a retry cannot help, BudgetError when a limit is reached.
        """
        retries = 0
        while True:
            sent = self._shape.dropped
            outcome = await self._call(self._shape.write(messages))
            if isinstance(outcome, JudgeError):
                raise outcome
            if isinstance(outcome, Reply):
                self._shape.accept(sent)
                self._refused_first = None
                self._failed_in_a_row = 0
                return replace(outcome, dropped=tuple(sorted(sent)))
            if isinstance(outcome, Refusal):
                if self._try_without(outcome, sent):
                    continue
                outcome = outcome.otherwise
            if isinstance(outcome, JudgeError):
                raise self._refused_first or outcome
            if retries == self._config.max_retries:
                return self._give_up(outcome)
            await self._pause(self._backoff(retries) if outcome.wait is None else outcome.wait)
            retries += 1

    async def _call(self, request: dict[str, Any]) -> Reply | Fault | Refusal | JudgeError:
        set_aside = self._prices.of(most_tokens(request)) if self._prices else 0.0
        await self._spending.find_room(set_aside)
        if self._halted.is_set():
            raise Halted
        self._spending.begin(set_aside)
        outcome: Reply | Fault | Refusal | JudgeError | None = None
        try:
            outcome = await self._send(request)
            self._was_reached |= not (isinstance(outcome, Fault) and outcome.kind == "connection")
            return outcome
        finally:
            usage = outcome.usage if isinstance(outcome, Reply) else None
            # a refusal is paid for like an answer, and what was lost on the way may have been answered
            lost = outcome is None or (isinstance(outcome, Fault) and outcome.may_be_charged)
            self._spending.end(set_aside, usage, self._prices, may_be_charged=isinstance(outcome, Reply) or lost)

    async def _send(self, request: dict[str, Any]) -> Reply | Fault | Refusal | JudgeError:
        create = self._openai.chat.completions.with_raw_response.create
        try:
            # the library's timeout is per read: a server that drips one byte at a time would hold us for ever
            async with asyncio.timeout(self._config.timeout_seconds):
                raw = await create(model=self._model, **cast(Any, request))
            return read_completion(raw.http_response.content, self.redactor)
        except (TimeoutError, openai.APITimeoutError):
            return Fault("timeout", may_be_charged=True)
        except openai.APIConnectionError:
            return Fault("connection", may_be_charged=True)
        except openai.APIStatusError as error:
            return read_status(error, self._host, self.redactor)

    def _try_without(self, refusal: Refusal, sent: frozenset[str]) -> bool:
        if isinstance(refusal.otherwise, JudgeError):
            self._refused_first = self._refused_first or refusal.otherwise
        return self._shape.refuse(refusal.complaint, sent, named_only=isinstance(refusal.otherwise, Fault))

    def _give_up(self, fault: Fault) -> Reply:
        if not self._was_reached:
            # a wrong address or no network: every other request would wait through its retries for the same
            tried = counted(self._config.max_retries + 1, "attempt")
            what = f"{self._host} cannot be reached: the connection failed in {tried}, and there was no reply before"
            raise JudgeError(what, hint="check --judge_url and the network; verdicts so far are kept")
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _GIVE_UP_AFTER:
            last = f"{fault.kind} at last{f': {fault.reason}' if fault.reason else ''}"
            what = f"{self._host} failed {_GIVE_UP_AFTER} requests in a row, each with all its retries ({last})"
            raise JudgeError(what, hint="check --judge_url, or run again later; verdicts so far are kept")
        return Reply(failure=fault.kind)

    def _backoff(self, retries: int) -> float:
        """Seconds before the next retry: doubling, with a jitter of half."""
        longest = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**retries)
        jitter = derive_seed(self._config.seed, "judge backoff", self._spending.calls) / 2**63
        return longest * (0.5 + 0.5 * jitter)

    async def _pause(self, seconds: float) -> None:
        """Sleep, but wake when the run is halted."""
        sleeping = asyncio.ensure_future(self._sleep(seconds))
        halting = asyncio.ensure_future(self._halted.wait())
        try:
            await asyncio.wait((sleeping, halting), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            halting.cancel()
            await asyncio.gather(sleeping, halting, return_exceptions=True)


def open_endpoint(config: EvaluateLlmConfig, key: SecretStr) -> openai.AsyncOpenAI:
    """The library's client, without its retries and redirects; its owner closes it."""
    # http:// is for this machine or its network; a proxy from the environment would see the key in the clear
    client = _make_http_client(trust_env=urlsplit(config.base_url).scheme != "http")
    secret = key.get_secret_value()
    return openai.AsyncOpenAI(
        api_key=secret,
        base_url=config.base_url,
        max_retries=0,
        timeout=config.timeout_seconds,
        http_client=client,
        default_query=dict(config.judge_query),
        # addresses that name a version of the interface, as Azure's do, take the key under this name
        default_headers={"api-key": secret} if "api-version" in config.judge_query else None,
    )


def _make_http_client(*, trust_env: bool) -> Any:
    """The HTTP client; UsageError when the environment names certificates or proxies that cannot be used."""
    try:
        return openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=trust_env)
    except OSError as error:
        named = [f"{name}={os.environ[name]}" for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        what = f"the certificates for HTTPS cannot be read ({error.strerror or type(error).__name__})"
        raise UsageError(
            f"{what}: {', '.join(named) or 'those of this system'}",
            hint="let SSL_CERT_FILE name a file of certificates, or unset it",
        ) from None
    except (ValueError, ImportError) as error:
        # the address of a proxy may hold a password, so it is not quoted
        raise UsageError(
            f"the proxy that the environment names cannot be used ({type(error).__name__})",
            hint="correct or unset HTTPS_PROXY, HTTP_PROXY and ALL_PROXY",
        ) from None
