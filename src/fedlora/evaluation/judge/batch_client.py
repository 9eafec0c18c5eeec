"""Calls to the Batch API of an OpenAI-compatible endpoint: upload, create, look, fetch.

A request that creates a batch is never simply sent again: where its answer was lost, the batch of the same file is
looked for first.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import openai
from pydantic import BaseModel, SecretStr, ValidationError

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.errors import JudgeError
from fedlora.evaluation.judge.client import Sleep, open_endpoint
from fedlora.evaluation.judge.error_body import read_codes, read_reason
from fedlora.evaluation.judge.key import Redactor
from fedlora.evaluation.judge.replies import Fault, Refusal, Reply, read_completion, read_refused, read_status

T = TypeVar("T", bound=BaseModel)

_RUNNING = frozenset({"validating", "queued", "running", "in_progress", "finalizing", "cancelling"})
_A_DAY = 86_400
_WITHOUT = frozenset({404, 405, 501})
_NOT_REACHED = frozenset({"batch_expired", "batch_cancelled"})
_PAUSE = 2.0
"""Seconds before a request is sent again."""


class RemoteBatch(BaseModel):
    """A batch as the endpoint describes it."""

    id: str
    status: str
    input_file_id: str = ""
    created_at: float | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: Any = None
    request_counts: Any = None

    @property
    def is_running(self) -> bool:
        """Whether it is to be looked at later."""
        return self.status in _RUNNING

    @property
    def done(self) -> int:
        """Requests that are over."""
        counts = self.request_counts if isinstance(self.request_counts, Mapping) else {}
        return sum(value for name in ("completed", "failed") if isinstance(value := counts.get(name), int))


class _Page(BaseModel):
    data: list[RemoteBatch]
    has_more: bool = False


class BatchRefusedError(JudgeError):
    """The endpoint did not create a batch."""


class BatchClient:
    """An asynchronous context manager around one endpoint. No exception of the library leaves it."""

    def __init__(self, config: EvaluateLlmConfig, key: SecretStr, *, sleep: Sleep) -> None:
        self.redactor = Redactor(key)
        self.host = urlsplit(config.base_url).netloc
        self._config = config
        self._sleep = sleep
        self._openai = open_endpoint(config, key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._openai.close()

    async def check(self) -> None:
        """JudgeError where the endpoint has no Batch API."""
        await self._insist("batches", lambda: self._openai.batches.with_raw_response.list(limit=1))

    async def upload(self, content: bytes) -> str:
        """The id of a new file of requests."""
        file = ("fedlora.jsonl", content, "application/jsonl")
        send = self._openai.files.with_raw_response.create
        body = await self._insist("files", lambda: send(file=file, purpose="batch"))
        try:
            return str(json.loads(body)["id"])
        except (ValueError, KeyError, TypeError):
            raise self._unreadable("files", body) from None

    async def create(self, file: str, *, since: float, may_be_there: bool) -> RemoteBatch:
        """The batch of an uploaded file: the one that is there, else a new one; BatchRefusedError where there is none.

        `may_be_there` says that an earlier request for it may have been accepted, at `since` or later.
        """
        send = partial(
            self._openai.batches.with_raw_response.create,
            input_file_id=file,
            endpoint="/v1/chat/completions",
            completion_window="24h",
        )
        attempt = 0
        while True:
            if (attempt or may_be_there) and (found := await self._find(file, since)):
                return found
            try:
                outcome = await self._send(send)
            except JudgeError as error:
                raise BatchRefusedError(str(error), hint=error.hint) from None
            if not isinstance(outcome, Fault):
                return self._read("batches", outcome, RemoteBatch)
            if attempt == self._config.max_retries:
                raise self._failed("batches", outcome)
            attempt += 1
            await self._pause(attempt, outcome.wait)

    async def look(self, batch: str) -> RemoteBatch:
        """A batch as it is now."""
        body = await self._insist(f"batches/{batch}", lambda: self._openai.batches.with_raw_response.retrieve(batch))
        return self._read("batches", body, RemoteBatch)

    async def fetch(self, file: str) -> bytes:
        """What is in a file."""
        return await self._insist(f"files/{file}", lambda: self._openai.files.with_raw_response.content(file))

    async def _find(self, file: str, since: float) -> RemoteBatch | None:
        query: dict[str, Any] = {"limit": 100}
        while True:
            send = partial(self._openai.batches.with_raw_response.list, **query)
            page = self._read("batches", await self._insist("batches", send), _Page)
            if found := next((one for one in page.data if one.input_file_id == file), None):
                return found
            # the newest come first
            if not page.has_more or not page.data or (page.data[-1].created_at or since) < since - _A_DAY:
                return None
            query["after"] = page.data[-1].id

    async def _insist(self, what: str, send: Callable[[], Awaitable[Any]]) -> bytes:
        """The body of the answer to a request that may be sent again."""
        attempt = 0
        while isinstance(outcome := await self._send(send), Fault):
            if attempt == self._config.max_retries:
                raise self._failed(what, outcome)
            attempt += 1
            await self._pause(attempt, outcome.wait)
        return outcome

    async def _send(self, send: Callable[[], Awaitable[Any]]) -> bytes | Fault:
        try:
            raw = await send()
            return raw.http_response.content
        except (TimeoutError, openai.APITimeoutError):
            return Fault("timeout")
        except openai.APIConnectionError:
            return Fault("connection")
        except openai.APIStatusError as error:
            if error.status_code in _WITHOUT and error.request.url.path.endswith(("/batches", "/files")):
                what = f"{self.host} has no Batch API ({error.status_code} at {error.request.url.path})"
                raise JudgeError(what, hint="run without --batch") from None
            outcome = read_status(error, self.host, self.redactor)
        outcome = outcome.otherwise if isinstance(outcome, Refusal) else outcome
        if isinstance(outcome, Fault):
            return outcome
        raise outcome if isinstance(outcome, JudgeError) else JudgeError(f"{self.host} refused the batch")

    async def _pause(self, attempt: int, wait: float | None) -> None:
        await self._sleep(_PAUSE * 2 ** (attempt - 1) if wait is None else wait)

    def _read(self, what: str, body: bytes, kind: type[T]) -> T:
        try:
            return kind.model_validate_json(body)
        except ValidationError:
            raise self._unreadable(what, body) from None

    def _unreadable(self, what: str, body: bytes) -> JudgeError:
        shown = self.redactor.clean(read_reason(body))
        return JudgeError(
            f"{self.host}: {what} is not answered as a Batch API does: {shown}", hint="run without --batch"
        )

    def _failed(self, what: str, fault: Fault) -> JudgeError:
        reason = f": {fault.reason}" if fault.reason else ""
        hint = "run again later: batches on record are found, and none is created twice"
        return JudgeError(f"{self.host}: {what} failed with all retries ({fault.kind}{reason})", hint=hint)


def read_lines(content: bytes, redactor: Redactor) -> dict[str, Reply | Fault]:
    """What each request of a batch brought, by its code; lines that are none, and requests that it did not come to,
    are left out."""
    found: dict[str, Reply | Fault] = {}
    for line in content.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and isinstance(value.get("custom_id"), str):
            outcome = _read_line(value, redactor)
            found |= {value["custom_id"]: outcome} if outcome else {}
    return found


def _read_line(value: Mapping[str, Any], redactor: Redactor) -> Reply | Fault | None:
    """None for a request that the batch did not come to."""
    response = value.get("response")
    if isinstance(response, Mapping):
        body = json.dumps(response.get("body")).encode()
        return read_completion(body, redactor) if response.get("status_code") == 200 else read_refused(body, redactor)
    body = json.dumps({"error": value.get("error")}).encode()
    return None if read_codes(body) & _NOT_REACHED else read_refused(body, redactor)
