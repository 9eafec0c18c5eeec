"""The compared answers with the verdicts on them, as a text that a person can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedlora.console import printable
from fedlora.evaluation.judge.judge_statistics import JudgedSample
from fedlora.evaluation.judge.protocol import Sample
from fedlora.evaluation.judge.verdict_log import StoredVerdict
from fedlora.evaluation.judge.verdict_results import Said
from fedlora.plain_text import one_line

_RULE = "-" * 80
_ANSWERS = {"baseline_first": ("baseline", "proposed"), "proposed_first": ("proposed", "baseline")}


def readable_text(samples: Sequence[Sample], result: Said, judges: Sequence[Said]) -> str:
    """Every sample in the order of the file: what was asked, both answers, the result, and what each judge said."""
    return "\n".join(
        line
        for at, sample in enumerate(samples)
        for line in _lines(sample, result.samples[at], [(one, one.verdicts[at]) for one in judges])
    )


def _lines(
    sample: Sample, found: JudgedSample | str, said: Sequence[tuple[Said, Sequence[StoredVerdict]]]
) -> Iterator[str]:
    outcome = found.outcome if isinstance(found, JudgedSample) else "no verdict"
    yield f"sample {sample.row}, {one_line(sample.category) or 'no category'}: {outcome}"
    asked = "text" if sample.continues else "instruction"
    shown = [(turn.role, turn.content) for turn in sample.before]
    shown += [(asked, sample.instruction), ("input", sample.input), ("reference", sample.reference or "")]
    shown = [one for one in shown if one[1]] + [("baseline", sample.baseline), ("proposed", sample.proposed)]
    for title, text in shown:
        yield f"  {title}:"
        # every line is indented, so no answer can pose as a heading
        yield from (f"    {line}" for line in printable(text).split("\n"))
    for one, verdicts in said:
        name = f"{one_line(one.judge)}, " if len(said) > 1 else ""
        yield from (f"  {name}{_verdict_text(verdict)}" for verdict in verdicts)
    yield _RULE


def _verdict_text(verdict: StoredVerdict) -> str:
    first, second = _ANSWERS[verdict.order]
    chosen = {"A": first, "B": second, "tie": "neither"}[verdict.verdict]
    text = f"{first} shown first: {chosen} ({first} {verdict.score_a}, {second} {verdict.score_b})"
    return f"{text}: {verdict.reason}" if verdict.reason else text
