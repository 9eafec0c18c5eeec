"""Pairs that are compared in both directions: each text pair is asked about once, and both results are made of it.

The baseline of one direction is the proposed answer of the other. The same two texts in the same places have the same
verdict in both, so a verdict of one is copied to the log of the other with the order turned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from fedlora.evaluation.judge.desks import Desk
from fedlora.evaluation.judge.protocol import Question, other_order
from fedlora.evaluation.judge.replies import FailureKind
from fedlora.evaluation.judge.verdict_log import VerdictLog


class Mirrors:
    """The desks of one command; with `only`, verdicts under other keys than these are not taken."""

    def __init__(self, desks: Sequence[Desk], *, only: Collection[str] | None = None) -> None:
        self._desks = desks
        self._only = only
        self._failures: dict[str, FailureKind] = {}

    def copy(self, questions: Iterable[Question], log: VerdictLog) -> None:
        """Give `log` the verdicts on `questions` that another log has from the other direction."""
        for question in questions:
            if question.key in log or (self._only is not None and question.mirror not in self._only):
                continue
            if found := next((one.log[question.mirror] for one in self._desks if question.mirror in one.log), None):
                changed = {"key": question.key, "row": question.row, "order": other_order(found.order)}
                log.append(found.model_copy(update=changed))

    def pending(self) -> set[str]:
        """Keys of questions that are in a batch."""
        return {key for desk in self._desks for key in desk.batches.keys}

    def add_failures(self, failures: Mapping[str, FailureKind]) -> None:
        """Why questions of one direction got no verdict, by key: the other direction does not ask again."""
        self._failures |= failures

    def failures(self, questions: Sequence[Question]) -> dict[str, FailureKind]:
        """Why the other direction of `questions` got no verdict, by the key of the question."""
        return {one.key: self._failures[one.mirror] for one in questions if one.mirror in self._failures}
