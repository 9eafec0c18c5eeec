"""What a judge said of each row: the verdicts of both orders as one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedlora.evaluation.judge.protocol import ORDERS, Sample, make_question
from fedlora.evaluation.judge.results import combine
from fedlora.evaluation.judge.samples import make_sample
from fedlora.evaluation.judge.verdict_log import StoredVerdict
from fedlora.rows import Row

_OUTCOMES = {"win": "{proposed} is better than {baseline}", "loss": "{baseline} is better than {proposed}",
             "tie": "{baseline} and {proposed} are alike"}  # fmt: skip


class Answered(Protocol):
    """Whose answers a file holds, in the order of the rows."""

    @property
    def label(self) -> str: ...

    @property
    def answers(self) -> Sequence[str]: ...


def verdicts_of(
    result: Mapping[str, Any],
    log: Mapping[str, StoredVerdict],
    rows: Sequence[Row],
    references: Sequence[str | None],
    answered: Mapping[Path, Answered],
) -> dict[int, list[str]]:
    """Place of a row -> what was said of it, for one judged pair: nothing where a file of the pair is not among those
    shown, or the log has no verdict on a row as it is now."""
    files = result["files"]
    baseline, proposed = (answered.get(Path(files[side]["path"]).resolve()) for side in ("baseline", "proposed"))
    if baseline is None or proposed is None:
        return {}
    judges = result.get("judges", [result["judge"]])
    votes = result.get("votes_per_sample", len(ORDERS)) // len(judges)
    found: dict[int, list[str]] = {}
    for place, row in enumerate(rows):
        shown = references[place] if files.get("target") else None
        sample = make_sample(place + 1, _said(row, proposed.answers[place]), _said(row, baseline.answers[place]), shown)
        for judge in judges:
            for reasons in (False, True):
                if verdicts := _verdicts_on(sample, judge, votes, log, reasons=reasons):
                    outcome = combine(sample, *verdicts)
                    text = _OUTCOMES[outcome.outcome].format(baseline=baseline.label, proposed=proposed.label)
                    scores = f"{outcome.proposed_score:g} against {outcome.baseline_score:g} of 100"
                    why = "".join(f" \u201c{each.reason}\u201d" for each in verdicts if each.reason)
                    said = f"{judge['model_asked']}: {text} ({scores}).{why}"
                    found.setdefault(place, []).append(said)
    return found


def _verdicts_on(
    sample: Sample, judge: Mapping[str, Any], votes: int, log: Mapping[str, StoredVerdict], *, reasons: bool
) -> list[StoredVerdict]:
    """All verdicts of one judge on a sample, in both orders and as often as it was asked; none where one is missing."""
    keys = [
        make_question(sample, order, judge=judge["model_asked"], host=judge["host"], reasons=reasons, repeat=repeat).key
        for repeat in range(1, votes // len(ORDERS) + 1)
        for order in ORDERS
    ]
    return [log[key] for key in keys] if keys and all(key in log for key in keys) else []


def _said(row: Row, answer: str) -> Row:
    return Row(row.instruction, row.input, answer, row.category, row.before, row.kind)
