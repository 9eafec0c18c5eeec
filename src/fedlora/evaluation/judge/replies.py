"""What came back from the judge's endpoint, and what it means.

Four things can be meant: an answer (also a refusal or a cut one), a fault that another try may mend, a part of the
request that this endpoint does not take, or the end of the run. Text from the endpoint is cleaned of the key here,
before anything else sees it.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from fedlora.errors import JudgeError
from fedlora.evaluation.judge.error_body import read_codes, read_reason
from fedlora.evaluation.judge.key import Redactor

if TYPE_CHECKING:
    from openai import APIStatusError

FailureKind = Literal[
    "invalid", "truncated", "refused", "rate_limited", "server_error", "timeout", "connection", "not_asked"
]

LONGEST_WAIT = 120.0
"""Seconds: the most that a Retry-After is honoured with."""

_RETRIED_STATUSES = frozenset({408, 409, 425})
_FILTER_CODES = frozenset({"content_filter", "content_policy_violation"})
_SPENT_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_NOT_A_PART = re.compile(
    r"context.?length|context.?window|too long|too large|too many tokens|maximum.{0,30}tokens|api.?key|quota|credit"
    r"|billing|model\b.{0,80}(not found|not exist|unknown|not available|not loaded)|(no such|unknown|invalid) model",
    re.IGNORECASE,
)
"""What no optional part of a request is to blame for."""
_NAMES_A_FORMAT = re.compile(r"response.?format|json.?schema|json.?object|grammar|guided", re.IGNORECASE)
_KEPT = "verdicts so far are kept"
_HINTS = {
    401: "check the key",
    402: "the account has no credit: add some, or choose another judge",
    403: "the key may not use this model or address",
    405: "check the path of --base_url: most endpoints end in /v1",
    413: "lower --batch_size",
    429: "the quota of this key is spent",
}


@dataclass(frozen=True)
class Usage:
    """Tokens of one request as the endpoint counts them."""

    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Reply:
    """What one request brought in the end: text, or the kind of failure it ended with."""

    text: str = ""
    failure: FailureKind | None = None
    model: str = ""
    fingerprint: str = ""
    usage: Usage | None = None
    dropped: tuple[str, ...] = ()
    """What the request lacked because the endpoint does not take it."""


@dataclass(frozen=True)
class Fault:
    """A failure that another try may mend; `wait` is what the server asked for, in seconds."""

    kind: FailureKind
    wait: float | None = None
    reason: str = ""
    may_be_charged: bool = False


@dataclass(frozen=True)
class Refusal:
    """The endpoint may not take an optional part of the request; `otherwise` is what it is if no part is to blame."""

    complaint: str
    otherwise: JudgeError | Fault


class _Part(BaseModel):
    type: str = "text"
    text: str | None = None


class _Message(BaseModel):
    content: str | list[_Part | str] | None = None
    refusal: str | None = None

    @property
    def text(self) -> str:
        """The text of the answer; of a list the parts of type text, one after the other: others are thoughts."""
        if not isinstance(self.content, list):
            return self.content or ""
        parts = [part if isinstance(part, str) else part.text or "" for part in self.content if _is_text(part)]
        return "".join(parts)


def _is_text(part: _Part | str) -> bool:
    return isinstance(part, str) or part.type in ("text", "output_text")


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    model: Any = None
    system_fingerprint: Any = None
    usage: Any = None


def read_completion(body: bytes, redactor: Redactor) -> Reply | Fault:
    """The reply in the body of a successful response."""
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError:
        # cut off, a proxy's page, an error under a status of success: not a word from the judge
        return Fault("server_error", reason=redactor.clean(read_reason(body)), may_be_charged=True)
    choice = completion.choices[0]
    failure: FailureKind | None = None
    if choice.finish_reason == "length":
        failure = "truncated"
    elif choice.message.refusal or choice.finish_reason == "content_filter":
        failure = "refused"
    names = (name if isinstance(name, str) else "" for name in (completion.model, completion.system_fingerprint))
    model, fingerprint = map(redactor.clean, names)
    return Reply(choice.message.text, failure, model, fingerprint, _read_usage(completion.usage))


def _read_usage(value: Any) -> Usage | None:
    match value:
        case {"prompt_tokens": int(tokens_in), "completion_tokens": int(tokens_out)} if min(tokens_in, tokens_out) >= 0:
            return Usage(tokens_in, tokens_out)
    return None


def read_status(error: APIStatusError, host: str, redactor: Redactor) -> Reply | Fault | Refusal | JudgeError:
    """What a response of 3xx, 4xx or 5xx means."""
    status, body = error.status_code, error.response.content
    codes, reason = read_codes(body), redactor.clean(read_reason(body))
    if status == 429 and not codes & _SPENT_CODES:
        return Fault("rate_limited", read_retry_after(error.response.headers.get("retry-after")), reason)
    if status >= 500 or status in _RETRIED_STATUSES:
        fault = Fault("server_error", read_retry_after(error.response.headers.get("retry-after")), reason)
        return Refusal(reason, fault) if status in (500, 501) and _NAMES_A_FORMAT.search(reason) else fault
    if status == 400 and codes & _FILTER_CODES:
        return Reply(failure="refused")
    if 300 <= status < 400:
        there = redactor.clean(error.response.headers.get("location", "nowhere"))
        what = f"{host} redirects ({status}) to {there}; nothing was sent there"
        return JudgeError(what, hint="set --base_url to the final address if you trust it")
    ended = JudgeError(f"{host} answered {status}: {reason or 'no reason given'}", hint=_hint(status, reason))
    may_be_a_part = status in (400, 415, 422) or (status == 404 and "parameter" in reason.lower())
    return Refusal(reason, ended) if may_be_a_part and not _NOT_A_PART.search(reason) else ended


def read_refused(body: bytes, redactor: Redactor) -> Reply | Fault:
    """What the body of an error means for a request of a batch, which is not sent again by itself."""
    if read_codes(body) & _FILTER_CODES:
        return Reply(failure="refused")
    return Fault("server_error", reason=redactor.clean(read_reason(body)))


def _hint(status: int, reason: str) -> str:
    if status == 404:
        names_model = "model" in reason.lower()
        hint = "check --gpt_model" if names_model else "check the path of --base_url: most endpoints end in /v1"
    else:
        hint = _HINTS.get(status, "if the request is too long for the model, lower --batch_size")
    return f"{hint}; {_KEPT}"


def read_retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a Retry-After in seconds or as a date, at most LONGEST_WAIT; None when it says nothing."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return None if seconds != seconds else min(max(seconds, 0.0), LONGEST_WAIT)
