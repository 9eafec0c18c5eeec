"""The compared answers with the verdicts on them, as a text that a person can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedlora.console import printable
from fedlora.evaluation.judge.protocol import Question, Sample
from fedlora.evaluation.judge.results import combine
from fedlora.evaluation.judge.verdict_log import StoredVerdict, VerdictLog
from fedlora.evaluation.judge.verdict_results import ComparedAnswers
from fedlora.plain_text import one_line

_RULE = "-" * 80
_ANSWERS = {"baseline_first": ("baseline", "proposed"), "proposed_first": ("proposed", "baseline")}


def readable_text(compared: ComparedAnswers, log: VerdictLog) -> str:
    """Every sample in the order of the file: what was asked, both answers, the result, and what the judge said."""
    samples = zip(compared.samples, compared.questions, strict=True)
    return "\n".join(line for sample, pair in samples for line in _lines(sample, pair, log))


def _lines(sample: Sample, pair: Sequence[Question], log: VerdictLog) -> Iterator[str]:
    verdicts = [log[question.key] for question in pair if question.key in log]
    result = combine(sample, *verdicts).outcome if len(verdicts) == len(pair) else "no verdict"
    yield f"sample {sample.row}, {one_line(sample.category) or 'no category'}: {result}"
    asked = "text" if sample.continues else "instruction"
    shown = [(turn.role, turn.content) for turn in sample.before]
    shown += [(asked, sample.instruction), ("input", sample.input), ("reference", sample.reference or "")]
    shown = [one for one in shown if one[1]] + [("baseline", sample.baseline), ("proposed", sample.proposed)]
    for title, text in shown:
        yield f"  {title}:"
        # every line is indented, so no answer can pose as a heading
        yield from (f"    {line}" for line in printable(text).split("\n"))
    yield from map(_verdict_line, verdicts)
    yield _RULE


def _verdict_line(verdict: StoredVerdict) -> str:
    first, second = _ANSWERS[verdict.order]
    chosen = {"A": first, "B": second, "tie": "neither"}[verdict.verdict]
    line = f"  {first} shown first: {chosen} ({first} {verdict.score_a}, {second} {verdict.score_b})"
    return f"{line}: {verdict.reason}" if verdict.reason else line
