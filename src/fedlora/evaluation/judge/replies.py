"""What came back from the judge's endpoint, and what it means.

Four things can be meant: an answer (also a refusal or a cut one), a fault that another try may mend, a
parameter this endpoint does not take, or the end of the run. Text from the endpoint is cleaned of the key here,
before anything else sees it.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, ValidationError

from fedlora.errors import JudgeError
from fedlora.evaluation.judge.key import Redactor

if TYPE_CHECKING:
    from openai import APIStatusError

FailureKind = Literal["invalid", "truncated", "refused", "rate_limited", "server_error", "timeout", "connection"]

LONGEST_WAIT = 120.0
"""Seconds: the most that a Retry-After is honoured with."""

_RETRIED_STATUSES = frozenset({408, 409, 425})
_FILTER_CODES = frozenset({"content_filter", "content_policy_violation"})
_SPENT_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_PARAMETER_WORDS = {"temperature": ("temperature",), "response_format": ("response_format", "json_schema")}
_DEFAULT_HINT = "if the request is too long for the model, lower --batch_size; verdicts so far are kept"
_HINTS = {
    401: "check the key; verdicts so far are kept",
    403: "the key may not use this model or address; verdicts so far are kept",
    404: "check --gpt_model and --base_url; verdicts so far are kept",
    429: "the quota of this key is spent; verdicts so far are kept",
}


@dataclass(frozen=True)
class Reply:
    """What one request brought in the end: text, or the kind of failure it ended with."""

    text: str = ""
    failure: FailureKind | None = None
    model: str = ""
    fingerprint: str = ""


@dataclass(frozen=True)
class Fault:
    """A failure that another try may mend; `wait` is what the server asked for, in seconds."""

    kind: FailureKind
    wait: float | None = None


@dataclass(frozen=True)
class RefusedParameter:
    """The endpoint does not take this optional parameter of the request."""

    name: str


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    model: str | None = None
    system_fingerprint: str | None = None


def read_completion(body: bytes, redactor: Redactor) -> Reply | Fault:
    """The reply in the body of a successful response."""
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError:
        # cut off, or a proxy's page: not a word from the judge
        return Fault("server_error")
    choice = completion.choices[0]
    failure: FailureKind | None = None
    if choice.finish_reason == "length":
        failure = "truncated"
    elif choice.message.refusal or choice.finish_reason == "content_filter":
        failure = "refused"
    return Reply(
        text=choice.message.content or "",
        failure=failure,
        model=redactor.clean(completion.model or ""),
        fingerprint=redactor.clean(completion.system_fingerprint or ""),
    )


def read_status(
    error: APIStatusError, sent: Collection[str], host: str, redactor: Redactor
) -> Reply | Fault | RefusedParameter | JudgeError:
    """What a response of 3xx, 4xx or 5xx means; `sent` names the optional parameters of the request."""
    status = error.status_code
    # servers send what they like: a number as a code, a list as a type
    codes = {str(error.code), str(error.type)}
    if status == 429 and not codes & _SPENT_CODES:
        return Fault("rate_limited", read_retry_after(error.response.headers.get("retry-after")))
    if status >= 500 or status in _RETRIED_STATUSES:
        return Fault("server_error", read_retry_after(error.response.headers.get("retry-after")))
    if status == 400 and codes & _FILTER_CODES:
        return Reply(failure="refused")
    if status in (400, 422) and (name := _refused_parameter(error, sent)):
        return RefusedParameter(name)
    if 300 <= status < 400:
        there = redactor.clean(error.response.headers.get("location", "nowhere"))
        what = f"{host} redirects ({status}) to {there}; nothing was sent there"
        return JudgeError(what, hint="set --base_url to the final address if you trust it")
    reason = redactor.clean(str(error.message).removeprefix(f"Error code: {status} - "))
    what = f"{host} answered {status}: {reason or 'no reason given'}"
    return JudgeError(what, hint=_HINTS.get(status, _DEFAULT_HINT))


def _refused_parameter(error: APIStatusError, sent: Collection[str]) -> str | None:
    complaint = str(error.param or error.message)
    for name in sent:
        if any(word in complaint for word in _PARAMETER_WORDS[name]):
            return name
    return None


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
