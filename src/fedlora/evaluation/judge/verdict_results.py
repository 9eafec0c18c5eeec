"""Two sets of answers, the questions that comparing them takes, and the result once the judge has answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.evaluate import EvaluateLlmConfig
from fedlora.errors import JudgeError
from fedlora.evaluation.judge.asking import Asked
from fedlora.evaluation.judge.bradley_terry import Compared
from fedlora.evaluation.judge.judge_statistics import JudgedSample
from fedlora.evaluation.judge.protocol import ORDERS, PROMPT_VERSION, Question, Sample
from fedlora.evaluation.judge.results import combine, describe_judges, summarise
from fedlora.evaluation.judge.samples import ComparedFiles
from fedlora.evaluation.judge.verdict_log import VerdictLog
from fedlora.plain_text import counted

_ENOUGH = 0.95
"""Share of the samples below which verdicts are no result: those that fail are rarely like the others."""


@dataclass(frozen=True)
class ComparedAnswers:
    """What is compared, and the questions that this takes: two for each sample."""

    files: ComparedFiles
    samples: Sequence[Sample]
    questions: Sequence[tuple[Question, ...]]

    def outcomes(self, judged: Sequence[JudgedSample]) -> Compared:
        """For a ranking: files are one model only where they are the same file."""
        return Compared(str(self.files.proposed), str(self.files.baseline), judged)

    def open_questions(self, log: VerdictLog) -> list[Question]:
        """Questions without a verdict, each once: equal rows share theirs."""
        every = {question.key: question for pair in self.questions for question in pair}
        return [question for question in every.values() if question.key not in log]

    @property
    def num_verdicts(self) -> int:
        """How many verdicts there are once all are given."""
        return len({question.key for pair in self.questions for question in pair})

    def left(self, log: VerdictLog) -> int:
        """Samples that lack a verdict in one order or both."""
        return sum(any(question.key not in log for question in pair) for pair in self.questions)


def make_result(
    config: EvaluateLlmConfig, compared: ComparedAnswers, log: VerdictLog, asked: Asked, place: str
) -> tuple[list[JudgedSample], dict[str, Any]]:
    """The judged samples, and what a result file holds; `place` is the judge's.

    JudgeError where too few samples got a verdict.
    """
    judged, verdicts, kinds, failures = [], {}, [], asked.failures
    for sample, pair in zip(compared.samples, compared.questions, strict=True):
        failed = [failures[question.key] for question in pair if question.key in failures]
        if failed:
            # half a verdict is none: without the other order nobody knows whether the position decided
            kinds.append(failed[0])
            continue
        first, second = (log[question.key] for question in pair)
        judged.append(combine(sample, first, second))
        verdicts.update({first.key: first, second.key: second})
    by_kind = dict(sorted(Counter(kinds).items()))
    if len(judged) < (_ENOUGH * len(compared.samples) if not config.allow_partial else 1):
        raise _too_few(len(judged), len(compared.samples), by_kind, asked)
    return judged, {
        **summarise(judged),
        "votes_per_sample": len(ORDERS),
        "eval_failures": len(kinds),
        "failures_by_kind": by_kind,
        "total_in_files": len(compared.samples),
        "batch_size": config.batch_size,
        "calls": len({verdict.request for verdict in verdicts.values()}),
        "judge": {
            "model_asked": config.gpt_model,
            "host": place,
            **describe_judges(list(verdicts.values())),
        },
        "prompt_version": PROMPT_VERSION,
        "files": compared.files.record(),
    }


def _too_few(judged: int, samples: int, by_kind: Mapping[str, int], asked: Asked) -> JudgeError:
    reasons = ", ".join(f"{kind} {count}" for kind, count in by_kind.items())
    what = "no sample got a verdict" if not judged else f"only {judged} of {counted(samples, 'sample')} got a verdict"
    text = f"{what} ({reasons})"
    if asked.file:
        text += f"; the first reply that could not be used: {asked.unusable} ({asked.file})"
    hint = "check --base_url and --gpt_model, or lower --batch_size; no result was written, verdicts so far are kept"
    return JudgeError(text, hint=hint + ("; --allow_partial takes fewer" if judged else ""))
