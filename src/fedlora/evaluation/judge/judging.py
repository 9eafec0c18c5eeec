"""Asking all open questions: batches, both orders, repairs, a limit on concurrency.

Requests go one by one until the endpoint has taken one and a reply could be used: a wrong key then costs one call, and
what the endpoint does not take is dropped once. A reply that covers a part of its samples is asked again for the rest
as long as that brings some; one that cannot be used is repaired once, and one that was cut or refused in two halves.
When something ends the run, requests in flight finish first, since they are paid for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from fedlora.errors import FedloraError
from fedlora.evaluation.judge.client import Halted, JudgeClient
from fedlora.evaluation.judge.key import Redactor
from fedlora.evaluation.judge.opinions import parse_reply
from fedlora.evaluation.judge.protocol import ORDERS, Question, SentText, request_code, write_messages
from fedlora.evaluation.judge.replies import FailureKind, Reply
from fedlora.evaluation.judge.verdict_log import StoredVerdict, VerdictLog
from fedlora.files import write_text

Batch = Sequence[Question]

_LONGEST_REASON = 1000
"""Characters that are kept."""
_STOP_AFTER = 4
"""Replies that could not be used: the first of a run, or in a row by arrival."""


def make_batches(questions: Sequence[Question], batch_size: int) -> list[Batch]:
    """Questions in batches of one order and one repeat each; the two orders of a batch follow one another."""
    kinds = [(repeat, order) for repeat in sorted({one.repeat for one in questions}) for order in ORDERS]
    queues = [[one for one in questions if (one.repeat, one.order) == kind] for kind in kinds]
    cut = [[queue[i : i + batch_size] for i in range(0, len(queue), batch_size)] for queue in queues]
    longest = max((len(batches) for batches in cut), default=0)
    return [batches[i] for i in range(longest) for batches in cut if i < len(batches)]


def store_opinions(
    reply: Reply, questions: Sequence[SentText], log: VerdictLog, code: str, redactor: Redactor
) -> set[str]:
    """Put what a reply says of `questions` into the log; the keys of those that it has a verdict on."""
    opinions = {} if reply.failure else parse_reply(reply.text, questions)
    for question in questions:
        if opinion := opinions.get(question.key):
            log.append(
                StoredVerdict(
                    key=question.key,
                    row=question.row,
                    order=question.order,
                    score_a=opinion.score_a,
                    score_b=opinion.score_b,
                    verdict=opinion.verdict,
                    model=reply.model,
                    fingerprint=reply.fingerprint,
                    dropped=list(reply.dropped),
                    request=code,
                    repeat=question.repeat,
                    reason=redactor.clean(opinion.reason if question.reasons else "", _LONGEST_REASON),
                )
            )
    return set(opinions)


class StoppedEarly(Exception):  # noqa: N818
    """Replies that cannot be used came one after another, so asking on is no use."""


class Unusable:
    """Replies that could not be used: the first of them, kept in `file`, and how many came in a row.

    A refusal to judge is not among them: it is an answer to what was asked. Replies on one sample alone end a run only
    where none could be used before, and with `goes_on` so do others.
    """

    def __init__(self, file: Path, *, goes_on: bool, has_verdicts: bool) -> None:
        self.file = file
        self.first = ""
        self._goes_on = goes_on
        self._used = has_verdicts
        self._in_a_row = 0
        self._rows: set[int] = set()

    @property
    def none_used(self) -> bool:
        """Whether no reply of this judge could be used yet."""
        return not self._used

    def used(self) -> None:
        """A reply brought a verdict."""
        self._used, self._in_a_row = True, 0
        self._rows.clear()

    def add(self, text: str, redactor: Redactor, rows: set[int]) -> None:
        """A reply on `rows` brought none; raises StoppedEarly where it is the last of too many."""
        if not self.first:
            self.first = redactor.clean(text) or "nothing"
            write_text(self.file, redactor.keep(text) + "\n")
        self._in_a_row += 1
        self._rows |= rows
        is_about_the_judge = not self._used or (len(self._rows) > 1 and not self._goes_on)
        if self._in_a_row >= _STOP_AFTER and is_about_the_judge:
            raise StoppedEarly


class Judging:
    """One pass over the open questions; verdicts go to the log as they come, failures are kept here by key."""

    def __init__(
        self,
        client: JudgeClient,
        log: VerdictLog,
        unusable: Unusable,
        *,
        seed: int,
        advance: Callable[[int], None],
    ) -> None:
        self.failures: dict[str, FailureKind] = {}
        self._client = client
        self._log = log
        self._unusable = unusable
        self._seed = seed
        self._advance = advance
        self._stopped_by: FedloraError | StoppedEarly | None = None

    async def run(self, batches: Sequence[Batch], concurrency: int) -> list[Batch]:
        """Judge every batch, or as many as are of use; with a `concurrency` of 0 only the first, and return the others.

        Raises what ended the run early: JudgeError, BudgetError, StorageError.
        """
        waiting = deque(batches)
        while waiting and self._stopped_by is None and (not self._client.is_settled or self._unusable.none_used):
            await self._work(deque([waiting.popleft()]))
        await asyncio.gather(*(self._work(waiting) for _ in range(concurrency)))
        if isinstance(self._stopped_by, FedloraError):
            raise self._stopped_by
        if self._stopped_by is not None:
            open_keys = (question.key for batch in batches for question in batch if question.key not in self._log)
            self.failures = {**dict.fromkeys(open_keys, "not_asked"), **self.failures}
            return []
        return list(waiting)

    async def _work(self, waiting: deque[Batch]) -> None:
        while waiting and self._stopped_by is None:
            try:
                await self._judge(waiting.popleft())
            except Halted:
                return
            except (FedloraError, StoppedEarly) as error:
                self._stopped_by = self._stopped_by or error
                self._client.halt()

    async def _judge(self, batch: Batch) -> None:
        failed, kind = await self._ask(batch)
        attempt = 1
        while failed and len(failed) < len(batch):
            # a part of them got a verdict: ask for the rest, which the next reply may again bring in part
            batch = failed
            failed, kind = await self._ask(batch, attempt)
            attempt += 1
        parts = _repairs(failed, kind) if attempt == 1 or kind != "invalid" else []
        if not parts:
            self._fail(failed, kind)
        for part in parts:
            self._fail(*await self._ask(part, attempt))

    async def _ask(self, batch: Batch, attempt: int = 0) -> tuple[Batch, FailureKind]:
        """The questions of one request that got no verdict (none, when all is well), and why."""
        code = request_code(batch, self._seed, attempt)
        reply = await self._client.ask(write_messages(batch, code, repair=attempt > 0))
        opinions = store_opinions(reply, batch, self._log, code, self._client.redactor)
        kind = reply.failure or "invalid"
        if opinions:
            for key in opinions:
                self.failures.pop(key, None)
            self._unusable.used()
            self._advance(len(opinions))
        elif kind in ("invalid", "truncated"):
            self.failures.update((question.key, kind) for question in batch)
            self._unusable.add(reply.text, self._client.redactor, {question.row for question in batch})
        return [question for question in batch if question.key not in opinions], kind

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
