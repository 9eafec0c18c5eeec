"""Asking all open questions: batches, both orders, repairs, a limit on concurrency.

The first request goes alone: a wrong key then costs one call, and a parameter that the endpoint refuses
is dropped once. A reply that cannot be used is repaired once: bad entries are asked again, a
reply that was cut or refused in two halves. When something ends the run, requests in flight finish first,
since they are paid for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from fedlora.errors import FedloraError
from fedlora.evaluation.judge.client import Halted, JudgeClient
from fedlora.evaluation.judge.protocol import ORDERS, Question, parse_reply, request_code, write_messages
from fedlora.evaluation.judge.replies import FailureKind
from fedlora.evaluation.judge.verdict_log import StoredVerdict, VerdictLog

Batch = Sequence[Question]


def make_batches(questions: Sequence[Question], batch_size: int) -> list[Batch]:
    """Questions in batches of one order each; the two orders of a batch follow one another."""
    queues = [[question for question in questions if question.order == order] for order in ORDERS]
    cut = [[queue[i : i + batch_size] for i in range(0, len(queue), batch_size)] for queue in queues]
    longest = max(len(batches) for batches in cut)
    return [batches[i] for i in range(longest) for batches in cut if i < len(batches)]


class Judging:
    """One pass over the open questions; verdicts go to the log as they come, failures are kept here by key."""

    def __init__(self, client: JudgeClient, log: VerdictLog, *, seed: int, advance: Callable[[int], None]) -> None:
        self.failures: dict[str, FailureKind] = {}
        self._client = client
        self._log = log
        self._seed = seed
        self._advance = advance
        self._stopped_by: FedloraError | None = None

    async def run(self, batches: Sequence[Batch], concurrency: int) -> None:
        """Judge every batch. Raises what ended the run early: JudgeError, BudgetError, StorageError."""
        waiting = deque(batches)
        await self._work(deque([waiting.popleft()]) if waiting else waiting)
        await asyncio.gather(*(self._work(waiting) for _ in range(concurrency)))
        if self._stopped_by is not None:
            raise self._stopped_by

    async def _work(self, waiting: deque[Batch]) -> None:
        while waiting and self._stopped_by is None:
            try:
                await self._judge(waiting.popleft())
            except Halted:
                return
            except FedloraError as error:
                self._stopped_by = self._stopped_by or error
                self._client.halt()

    async def _judge(self, batch: Batch) -> None:
        failed, kind = await self._ask(batch)
        parts = _repairs(failed, kind)
        if not parts:
            self._fail(failed, kind)
        for part in parts:
            self._fail(*await self._ask(part, attempt=1))

    async def _ask(self, batch: Batch, attempt: int = 0) -> tuple[Batch, FailureKind]:
        """The questions of one request that got no verdict (none, when all is well), and why."""
        code = request_code(batch, self._seed, attempt)
        reply = await self._client.ask(write_messages(batch, code, repair=attempt > 0))
        if reply.failure:
            return batch, reply.failure
        opinions = parse_reply(reply.text, batch)
        for question in batch:
            if opinion := opinions.get(question.key):
                self._log.append(
                    StoredVerdict(
                        key=question.key,
                        row=question.sample.row,
                        order=question.order,
                        score_a=opinion.score_a,
                        score_b=opinion.score_b,
                        verdict=opinion.verdict,
                        model=reply.model,
                        fingerprint=reply.fingerprint,
                        dropped=sorted(self._client.dropped),
                        request=code,
                    )
                )
        if opinions:
            self._advance(len(opinions))
        return [question for question in batch if question.key not in opinions], "invalid"

    def _fail(self, questions: Batch, kind: FailureKind) -> None:
        self.failures.update((question.key, kind) for question in questions)
        if questions:
            self._advance(len(questions))


def _repairs(questions: Batch, kind: FailureKind) -> list[Batch]:
    """The requests that may still bring verdicts; none where the same request would fail the same way again."""
    half = len(questions) // 2
    if kind in ("truncated", "refused") and half:
        return [questions[:half], questions[half:]]
    # faults of the network had their retries already, and a single refusal is an answer
    return [questions] if questions and kind in ("invalid", "truncated") else []
