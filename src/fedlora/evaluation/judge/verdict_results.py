"""Two sets of answers, the questions that comparing them takes, and the result once the judges have answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.errors import JudgeError
from fedlora.evaluation.judge.asking import Asked
from fedlora.evaluation.judge.bradley_terry import Compared
from fedlora.evaluation.judge.judge_statistics import JudgedSample
from fedlora.evaluation.judge.protocol import PROMPT_VERSION, Question, Sample
from fedlora.evaluation.judge.replies import FailureKind
from fedlora.evaluation.judge.results import combine, describe_judges, summarise
from fedlora.evaluation.judge.samples import ComparedFiles
from fedlora.evaluation.judge.verdict_log import StoredVerdict, VerdictLog
from fedlora.plain_text import counted

_ENOUGH = 0.95
"""Share of the samples below which verdicts are no result: those that fail are rarely like the others."""


@dataclass(frozen=True)
class ComparedAnswers:
    """What is compared, and the questions that this takes of one judge: as many for each sample."""

    files: ComparedFiles
    samples: Sequence[Sample]
    questions: Sequence[tuple[Question, ...]]

    def outcomes(self, judged: Sequence[JudgedSample]) -> Compared:
        """For a ranking: files are one model only where they are the same file."""
        return Compared(str(self.files.proposed), str(self.files.baseline), judged)

    def open_questions(self, log: VerdictLog) -> list[Question]:
        """Questions without a verdict, each once: equal rows share theirs."""
        every = {question.key: question for question in self.every_question}
        return [question for question in every.values() if question.key not in log]

    @property
    def every_question(self) -> Iterator[Question]:
        """Those of every sample; equal rows have equal questions."""
        return (question for each in self.questions for question in each)

    @property
    def keys(self) -> set[str]:
        """Those of all questions."""
        return {question.key for question in self.every_question}

    def left(self, log: VerdictLog) -> int:
        """Samples that lack a verdict."""
        return sum(any(question.key not in log for question in each) for each in self.questions)


@dataclass(frozen=True)
class Said:
    """What a judge said of two sets of answers: of each sample the result, or why there is none."""

    judge: str
    place: str
    samples: Sequence[JudgedSample | FailureKind]
    verdicts: Sequence[Sequence[StoredVerdict]]
    """What the log has on each sample."""
    votes: int
    """Verdicts for a sample."""
    asked: Asked

    @property
    def judged(self) -> list[JudgedSample]:
        """The samples that have a result."""
        return [sample for sample in self.samples if isinstance(sample, JudgedSample)]


def read_verdicts(compared: ComparedAnswers, log: VerdictLog, asked: Asked, *, judge: str, place: str) -> Said:
    """What the log has; `asked` says why questions got no verdict."""
    samples: list[JudgedSample | FailureKind] = []
    verdicts: list[Sequence[StoredVerdict]] = []
    for sample, questions in zip(compared.samples, compared.questions, strict=True):
        failed: list[FailureKind] = [
            asked.failures[question.key] for question in questions if question.key in asked.failures
        ]
        # a part of the verdicts is none: without the other order it is unknown whether the position decided
        verdicts.append([log[question.key] for question in questions if question.key in log])
        samples.append(failed[0] if failed else combine(sample, *verdicts[-1]))
    return Said(judge, place, samples, verdicts, len(compared.questions[0]), asked)


def make_result(config: EvaluateLlmConfig, compared: ComparedAnswers, said: Said) -> dict[str, Any]:
    """What a result file holds. JudgeError where too few samples got a verdict."""
    judged, kinds = said.judged, [one for one in said.samples if not isinstance(one, JudgedSample)]
    by_kind = dict(sorted(Counter(kinds).items()))
    if len(judged) < (_ENOUGH * len(compared.samples) if not config.allow_partial else 1):
        raise _too_few(len(judged), len(compared.samples), by_kind, said, of_several=len(config.judges) > 1)
    verdicts = [
        verdict
        for sample, each in zip(said.samples, said.verdicts, strict=True)
        if isinstance(sample, JudgedSample)
        for verdict in each
    ]
    return {
        **summarise(judged),
        "votes_per_sample": said.votes,
        "eval_failures": len(kinds),
        "failures_by_kind": by_kind,
        "total_in_files": len(compared.samples),
        "batch_size": config.batch_size,
        "calls": len({verdict.request for verdict in verdicts}),
        "judge": {
            "model_asked": said.judge,
            "host": said.place,
            **describe_judges(verdicts),
        },
        "prompt_version": PROMPT_VERSION,
        "files": compared.files.record(),
    }


def _too_few(judged: int, samples: int, by_kind: Mapping[str, int], said: Said, *, of_several: bool) -> JudgeError:
    reasons = ", ".join(f"{kind} {count}" for kind, count in by_kind.items())
    what = "no sample got a verdict" if not judged else f"only {judged} of {counted(samples, 'sample')} got a verdict"
    text = f"{said.judge}: {what} ({reasons})" if of_several else f"{what} ({reasons})"
    if said.asked.file:
        text += f"; the first reply that could not be used: {said.asked.unusable} ({said.asked.file})"
    hint = "check --judge_url and --judge_model, or lower --batch_size; no result was written, verdicts so far are kept"
    return JudgeError(text, hint=hint + ("; --allow_partial takes fewer" if judged else ""))
