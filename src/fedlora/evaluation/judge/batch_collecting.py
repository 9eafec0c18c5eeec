"""What a batch brought: verdicts for the log, what it cost, and which questions have none."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from fedlora.console import say
from fedlora.errors import JudgeError
from fedlora.evaluation.judge.batch_state import MOST_TIMES, SentBatch, SentRequest, Tried
from fedlora.evaluation.judge.desks import Desk
from fedlora.evaluation.judge.error_body import read_reason
from fedlora.evaluation.judge.replies import FailureKind, Fault, Reply
from fedlora.evaluation.judge.spending import Prices, Spending, Spent
from fedlora.plain_text import counted

if TYPE_CHECKING:
    from fedlora.evaluation.judge.batch_client import BatchClient, RemoteBatch
    from fedlora.evaluation.judge.judging import Unusable

_AGAIN = "verdicts so far are kept; run again to submit the rest again"


async def collect_batch(
    client: BatchClient, batch: SentBatch, remote: RemoteBatch, desk: Desk, prices: Prices | None, spending: Spending
) -> None:
    """Fetch the replies of a batch that is over and take it off the record.

    Requests without a reply, as in a batch that expired, are open again and cost nothing. JudgeError where the batch
    failed, was cancelled, or brought nothing.
    """
    from fedlora.evaluation.judge.batch_client import read_lines
    from fedlora.evaluation.judge.judging import Unusable

    found: dict[str, Reply | Fault] = {}
    for file in filter(None, (remote.error_file_id, remote.output_file_id)):
        found |= read_lines(await client.fetch(file), client.redactor)
    unusable = Unusable(desk.unusable_file, goes_on=True, has_verdicts=True)
    is_first = any(one.key not in desk.batches.tried for request in batch.requests for one in request.questions)
    spent, replies, verdicts, reason = Spent(), 0, 0, ""
    for request in batch.requests:
        outcome = found.get(request.code)
        most = prices.of(request.most) if prices else 0.0
        if isinstance(outcome, Reply):
            replies += 1
            verdicts += _store(outcome, request, batch, client, desk, unusable)
            spent = spent.plus(Spent.on(outcome.usage, most, prices, calls=1))
        elif outcome is not None:
            reason = reason or outcome.reason
            _count_tries(request, set(), outcome.kind, desk)
            spent = spent.plus(Spent.on(None, most, prices, calls=1) if outcome.may_be_charged else Spent(calls=1))
    desk.batches.remove(batch, spent)
    spending.add(spent)
    answered = f"{replies} of {counted(len(batch.requests), 'request')} answered"
    say(f"judge: batch {batch.id} of {batch.model} at {client.host}: {remote.status}, {answered}")
    name = f"{client.host}: batch {batch.id} of {batch.model}"
    if remote.status == "failed":
        raise JudgeError(f"{name} failed: {client.redactor.clean(_faults(remote))}", hint=_AGAIN)
    if remote.status == "cancelled":
        raise JudgeError(f"{name} was cancelled, {answered}", hint=_AGAIN)
    if not replies and remote.status != "expired" and (is_first or not reason):
        raise JudgeError(f"{name}, {answered}: {reason or 'its files have no replies'}", hint=_AGAIN)
    if replies and not verdicts and is_first:
        what = f"{name}: no reply brought a verdict"
        first = f"; the first: {unusable.first} ({unusable.file})" if unusable.first else ""
        raise JudgeError(what + first, hint=f"choose another --gpt_model, or lower --batch_size; {_AGAIN}")


def _store(
    reply: Reply, request: SentRequest, batch: SentBatch, client: BatchClient, desk: Desk, unusable: Unusable
) -> int:
    """Put the verdicts of a reply into the log, and on record which questions it has none on; how many it has."""
    from fedlora.evaluation.judge.judging import store_opinions

    reply = replace(reply, dropped=tuple(desk.batches.known(batch.model, batch.host) or ()))
    stored = store_opinions(reply, request.questions, desk.log, request.code, client.redactor)
    if not stored and reply.failure != "refused":
        unusable.add(reply.text, client.redactor, {question.row for question in request.questions})
    _count_tries(request, stored, reply.failure or "invalid", desk)
    return len(stored)


def _count_tries(request: SentRequest, stored: Collection[str], kind: FailureKind, desk: Desk) -> None:
    """Put on record which questions have no verdict."""
    tried = desk.batches.tried
    # the same request would be refused again
    is_last = kind == "refused" and len(request.questions) == 1
    for question in request.questions:
        before = tried.pop(question.key, None)
        if question.key not in stored:
            times = MOST_TIMES if is_last else before.times + 1 if before else 1
            tried[question.key] = Tried(times=times, kind=kind)


def _faults(remote: RemoteBatch) -> str:
    """Why a batch failed, as the endpoint has it."""
    errors = remote.errors.get("data", remote.errors) if isinstance(remote.errors, Mapping) else remote.errors
    return read_reason(json.dumps(errors).encode()) if errors else "no reason given"
