"""Calls to an OpenAI-compatible endpoint: retries that end, a hard limit on calls, and a guarded key.

The library's own retries and redirects are off. Every request that leaves counts against the limit,
retries included; a redirect would carry the key to another host, so it ends the run. No exception of
the library leaves this module: it holds the request, and with it the key.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlsplit

import openai
from pydantic import SecretStr

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.errors import BudgetError, JudgeError, UsageError
from fedlora.evaluation.judge.key import Redactor
from fedlora.evaluation.judge.protocol import RESPONSE_FORMAT
from fedlora.evaluation.judge.replies import (
    FailureKind,
    Fault,
    RefusedParameter,
    Reply,
    read_completion,
    read_status,
)
from fedlora.seeds import derive_seed

Sleep = Callable[[float], Awaitable[None]]

_FIRST_BACKOFF, _LONGEST_BACKOFF = 1.0, 60.0
_GIVE_UP_AFTER = 5
"""Requests in a row that failed after all their retries: then the endpoint is down, and asking on is no use."""


class Halted(Exception):  # noqa: N818
    """The run was stopped elsewhere while this request waited for its turn."""


class JudgeClient:
    """An asynchronous context manager around one endpoint.

    `calls` counts the requests that left, those of earlier clients included; `dropped` names the parameters that the
    endpoint refused.
    """

    def __init__(
        self, config: EvaluateLlmConfig, key: SecretStr, *, sleep: Sleep = asyncio.sleep, calls: int = 0
    ) -> None:
        self.calls = calls
        self.dropped: list[str] = []
        self._config = config
        self._redactor = Redactor(key)
        self._sleep = sleep
        self._halted = asyncio.Event()
        self._parameters: dict[str, Any] = {"temperature": 0, "response_format": RESPONSE_FORMAT}
        self._failed_in_a_row = 0
        address = urlsplit(config.base_url)
        self._host = address.netloc
        # http:// is for this machine alone; a proxy from the environment would see the key in the clear
        client = _make_http_client(trust_env=address.scheme != "http")
        self._openai = openai.AsyncOpenAI(
            api_key=key.get_secret_value(),
            base_url=config.base_url,
            max_retries=0,
            timeout=config.timeout_seconds,
            http_client=client,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._openai.close()

    def halt(self) -> None:
        """Let requests in flight finish and start no other: every later or waiting `ask` raises Halted."""
        self._halted.set()

    async def ask(self, messages: list[dict[str, str]]) -> Reply:
        """One reply, after at most `max_retries` retries.

        Raises JudgeError where a retry cannot help, BudgetError when the limit on calls is reached.
        """
        retries = 0
        while True:
            outcome = await self._call(messages)
            if isinstance(outcome, JudgeError):
                raise outcome
            if isinstance(outcome, Reply):
                self._failed_in_a_row = 0
                return outcome
            if isinstance(outcome, RefusedParameter):
                self._drop(outcome.name)
                continue
            if retries == self._config.max_retries:
                return self._give_up(outcome.kind)
            await self._pause(self._backoff(retries) if outcome.wait is None else outcome.wait)
            retries += 1

    async def _call(self, messages: list[dict[str, str]]) -> Reply | Fault | RefusedParameter | JudgeError:
        if self._halted.is_set():
            raise Halted
        limit = self._config.max_calls
        if limit is not None and self.calls >= limit:
            raise BudgetError(f"the limit of max_calls={limit} is reached")
        self.calls += 1
        sent = dict(self._parameters)
        create = self._openai.chat.completions.with_raw_response.create
        try:
            # the library's timeout is per read: a server that drips one byte at a time would hold us for ever
            async with asyncio.timeout(self._config.timeout_seconds):
                raw = await create(model=self._config.gpt_model, messages=cast(Any, messages), **sent)
            return read_completion(raw.http_response.content, self._redactor)
        except (TimeoutError, openai.APITimeoutError):
            return Fault("timeout")
        except openai.APIConnectionError:
            return Fault("connection")
        except openai.APIStatusError as error:
            return read_status(error, sent, self._host, self._redactor)

    def _drop(self, name: str) -> None:
        # a request that left before the first refusal came back may report the same parameter again
        if self._parameters.pop(name, None) is not None:
            self.dropped.append(name)

    def _give_up(self, kind: FailureKind) -> Reply:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _GIVE_UP_AFTER:
            what = f"{self._host} failed {_GIVE_UP_AFTER} requests in a row, each with all its retries ({kind} at last)"
            raise JudgeError(what, hint="check --base_url, or run again later; verdicts so far are kept")
        return Reply(failure=kind)

    def _backoff(self, retries: int) -> float:
        """Seconds before the next retry: doubling, with a jitter of half."""
        longest = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**retries)
        jitter = derive_seed(self._config.seed, "judge backoff", self.calls) / 2**63
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
