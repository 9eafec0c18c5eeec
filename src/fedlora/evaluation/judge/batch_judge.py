"""A judge that is asked through the Batch API of its endpoint: requests are handed over, and collected later.

One ordinary request comes first: it finds out what the endpoint does not take and whether its replies can be used,
which a batch would show a day later, for every request. Questions that a batch brings no verdict on go into the next
one, in requests of half the size, three times at most.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.console import say
from fedlora.errors import BudgetError
from fedlora.evaluation.judge.asking import Asked, Forecast, JudgeEndpoint, Sleep
from fedlora.evaluation.judge.batch_collecting import collect_batch
from fedlora.evaluation.judge.batch_state import MOST_TIMES, SentBatch, SentQuestion, SentRequest, Tried
from fedlora.evaluation.judge.completion import complete
from fedlora.evaluation.judge.desks import Desk
from fedlora.evaluation.judge.key import load_key
from fedlora.evaluation.judge.protocol import Question, Sample, request_code, write_messages
from fedlora.evaluation.judge.replies import FailureKind
from fedlora.evaluation.judge.spending import Spending, Spent, most_tokens
from fedlora.plain_text import counted
from fedlora.redaction import redacted_logs

if TYPE_CHECKING:
    from fedlora.evaluation.judge.batch_client import BatchClient, RemoteBatch

_MOST_REQUESTS, _MOST_BYTES = 50_000, 90_000_000
"""Of one batch; endpoints take 100 MB or more."""

Line = tuple[SentRequest, bytes]


class BatchJudge:
    """One model at an endpoint with a Batch API, during one command."""

    def __init__(self, config: EvaluateLlmConfig, endpoint: JudgeEndpoint, spending: Spending, *, sleep: Sleep) -> None:
        self._config = config
        self._endpoint = endpoint
        self._spending = spending
        self._sleep = sleep
        self._is_checked = False

    @property
    def name(self) -> str:
        """The model."""
        return self._endpoint.name

    @property
    def place(self) -> str:
        """The endpoint's host."""
        return self._endpoint.place

    def questions(self, sample: Sample) -> tuple[Question, ...]:
        """What is asked about a sample."""
        return self._endpoint.questions(sample)

    def forecast(self, questions: Sequence[Question]) -> Forecast:
        """What asking `questions` takes, at the prices of ordinary requests."""
        return self._endpoint.forecast(questions)

    def open(self, desk: Desk) -> None:
        """Collect the batches of this judge that are over; those that are not keep their cost set aside.

        JudgeError where a batch failed, was cancelled, or brought nothing; what it brought is kept.
        """
        if not desk.batches.of(self.name, self.place):
            return

        async def collect() -> None:
            async with self._client() as client:
                for recorded in desk.batches.of(self.name, self.place):
                    batch, remote = await self._look(client, recorded, desk)
                    if not remote.is_running:
                        await collect_batch(client, batch, remote, desk, self._endpoint.prices, self._spending)
                        continue
                    for request in batch.requests:
                        self._spending.hold(self._price(request))
                    done = f"{remote.done} of {counted(len(batch.requests), 'request')} done"
                    say(f"judge: batch {batch.id} of {self.name} at {client.host}: {remote.status}, {done}")

        with redacted_logs():
            complete(collect())

    def ask(self, questions: Sequence[Question], desk: Desk, *, of: str, total: int) -> Asked:
        """Hand those of `questions` that are in no batch to the endpoint; verdicts of the first request go to the log.

        Raises UsageError (key), JudgeError (the endpoint refuses or has no Batch API), BudgetError where a limit leaves
        no room for any request and no batch is worked on.
        """
        there, tried = desk.batches.keys, desk.batches.tried
        failures: dict[str, FailureKind] = {
            one.key: tried[one.key].kind for one in questions if one.key in tried and tried[one.key].times >= MOST_TIMES
        }
        waiting = [one for one in questions if one.key not in there and one.key not in failures]
        is_pending = len(waiting) + len(failures) < len(questions)
        if not waiting:
            return Asked(failures, is_pending=is_pending)
        if not self._is_checked:
            with redacted_logs():
                complete(self._check())
        try:
            asked, requests = self._begin(waiting, desk, of=of, total=total)
            lines = self._fitting(requests, desk)
        except BudgetError as error:
            if not desk.batches.batches:
                raise
            say(f"judge: {error}; what is left waits for the batches")
            return Asked(failures, is_pending=True)
        if lines:
            desk.log.keep_forgotten()
            with redacted_logs():
                complete(self._submit(lines, desk))
            say(f"judge: {self._spending.text()}")
        return replace(asked, failures=failures | dict(asked.failures), is_pending=is_pending or bool(requests))

    def _client(self) -> BatchClient:
        # it brings in the client library, which takes a second
        from fedlora.evaluation.judge.batch_client import BatchClient

        return BatchClient(self._config, load_key(self._config.api_key_file, os.environ), sleep=self._sleep)

    async def _check(self) -> None:
        async with self._client() as client:
            await client.check()
        self._is_checked = True

    def _begin(
        self, questions: Sequence[Question], desk: Desk, *, of: str, total: int
    ) -> tuple[Asked, list[tuple[Sequence[Question], int]]]:
        """Make ordinary requests until it is known what the endpoint takes; then the other requests, with how often
        their questions were tried."""
        from fedlora.evaluation.judge.judging import make_batches

        tried, state, shape = desk.batches.tried, desk.batches, self._endpoint.shape
        groups: dict[int, list[Question]] = {}
        for question in questions:
            groups.setdefault(tried[question.key].times if question.key in tried else 0, []).append(question)
        size = self._config.batch_size
        requests = [
            (batch, times) for times in sorted(groups) for batch in make_batches(groups[times], max(1, size >> times))
        ]
        known = state.known(self.name, self.place)
        if known is not None and not shape.is_settled:
            shape.adopt(known)
        if shape.is_settled or 0 not in groups:
            return Asked({}), requests
        before = self._spending.spent
        try:
            asked, rest = self._endpoint.begin(groups[0], desk, of=of, total=total, concurrency=0)
        finally:
            state.count(self._spending.spent.minus(before))
        if "not_asked" not in asked.failures.values():
            # it had its repairs
            tried |= {key: Tried(times=MOST_TIMES, kind=kind) for key, kind in asked.failures.items()}
        if shape.is_settled:
            state.learn(self.name, self.place, shape.dropped)
        return asked, [(batch, 0) for batch in rest] + [one for one in requests if one[1]]

    def _fitting(self, requests: Sequence[tuple[Sequence[Question], int]], desk: Desk) -> list[Line]:
        """The lines of as many requests as the limits have room for."""
        lines: list[Line] = []
        tried = desk.batches.tried
        for batch, times in requests:
            code = request_code(batch, self._config.seed, times)
            repair = any(one.key in tried and tried[one.key].kind == "invalid" for one in batch)
            body = self._endpoint.shape.write(write_messages(batch, code, repair=repair))
            most = most_tokens(body)
            sent = [
                SentQuestion(key=one.key, row=one.row, order=one.order, reasons=one.reasons, repeat=one.repeat)
                for one in batch
            ]
            request = SentRequest(code=code, questions=sent, most_in=most.tokens_in, most_out=most.tokens_out)
            try:
                self._spending.reserve(self._price(request))
            except BudgetError as error:
                if not lines:
                    raise
                say(f"judge: {len(requests) - len(lines)} of {counted(len(requests), 'request')} wait: {error}")
                break
            line = {"custom_id": code, "method": "POST", "url": "/v1/chat/completions"}
            lines.append((request, json.dumps({**line, "body": {"model": self.name, **body}}).encode() + b"\n"))
        return lines

    async def _submit(self, lines: Sequence[Line], desk: Desk) -> None:
        async with self._client() as client:
            for part in _cut(lines):
                file = await client.upload(b"".join(line for _, line in part))
                requests = [request for request, _ in part]
                batch = SentBatch(
                    model=self.name, host=self.place, file=file, since=int(time.time()), requests=requests
                )
                desk.batches.add(batch)
                batch = await self._create(client, batch, desk, may_be_there=False)
                say(f"judge: {counted(len(part), 'request')} to {self.name} at {client.host} in batch {batch.id}")

    async def _look(self, client: BatchClient, batch: SentBatch, desk: Desk) -> tuple[SentBatch, RemoteBatch]:
        there = batch if batch.id else await self._create(client, batch, desk, may_be_there=True)
        return there, await client.look(there.id)

    async def _create(self, client: BatchClient, batch: SentBatch, desk: Desk, *, may_be_there: bool) -> SentBatch:
        """The batch with the id that the endpoint gave it."""
        from fedlora.evaluation.judge.batch_client import BatchRefusedError

        try:
            remote = await client.create(batch.file, since=batch.since, may_be_there=may_be_there)
        except BatchRefusedError:
            # nothing was created, so nothing is worked on
            desk.batches.remove(batch, Spent())
            raise
        return desk.batches.name(batch, remote.id)

    def _price(self, request: SentRequest) -> float:
        """The most that a request can cost."""
        return self._endpoint.prices.of(request.most) if self._endpoint.prices else 0.0


def _cut(lines: Sequence[Line]) -> Iterator[list[Line]]:
    """The lines of one batch each."""
    part: list[Line] = []
    size = 0
    for request, line in lines:
        if part and (len(part) == _MOST_REQUESTS or size + len(line) > _MOST_BYTES):
            yield part
            part, size = [], 0
        part.append((request, line))
        size += len(line)
    if part:
        yield part
