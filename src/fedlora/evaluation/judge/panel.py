"""Several judges of the same answers: their majority, and how far they agree.

The majority's result of a sample is what more than half of the judges say, else a tie; two judges that differ make a
tie. Samples that a judge has no verdict on are in neither the majority nor the agreement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.evaluation.judge.agreement import describe_agreement, describe_pairs
from fedlora.evaluation.judge.asking import Asked
from fedlora.evaluation.judge.judge_statistics import OUTCOMES, JudgedSample, Outcome
from fedlora.evaluation.judge.replies import FailureKind
from fedlora.evaluation.judge.results import majority
from fedlora.evaluation.judge.verdict_results import Said
from fedlora.plain_text import counted, one_line, table_text

_NAMES = {"cohen": "Cohen's", "fleiss": "Fleiss'"}


@dataclass(frozen=True)
class JudgeResult:
    """What one of several judges said of a pair, as its result file holds it."""

    judge: str
    file: Path
    record: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"judge": self.judge, "file": str(self.file), "scores": dict(self.record)}


def majority_of(said: Sequence[Said]) -> Said:
    """What the majority of two judges or more says of each sample."""
    samples: list[JudgedSample | FailureKind] = []
    for results in zip(*(one.samples for one in said), strict=True):
        judged = [one for one in results if isinstance(one, JudgedSample)]
        failed = [one for one in results if not isinstance(one, JudgedSample)]
        samples.append(failed[0] if failed else combine_judges(judged))
    verdicts = [[verdict for one in said for verdict in one.verdicts[at]] for at in range(len(samples))]
    places = dict.fromkeys(one.place for one in said)
    names, votes = ", ".join(one.judge for one in said), sum(one.votes for one in said)
    return Said(names, ", ".join(places), samples, verdicts, votes, Asked({}))


def combine_judges(results: Sequence[JudgedSample]) -> JudgedSample:
    """One result from several judges' on the same sample; scores are means.

    Whether the orders agree, and whether a position decided, is what more than half of the judges show.
    """
    repeats = [one.repeats_agreed for one in results if one.repeats_agreed is not None]
    first = results[0]
    outcomes: list[Outcome] = [one.outcome for one in results]
    return JudgedSample(
        category=first.category,
        baseline_score=math.fsum(one.baseline_score for one in results) / len(results),
        proposed_score=math.fsum(one.proposed_score for one in results) / len(results),
        outcome=majority(outcomes, "tie"),
        flipped=majority([one.flipped for one in results], False),
        prompt=first.prompt,
        baseline_length=first.baseline_length,
        proposed_length=first.proposed_length,
        slots=(sum(one.slots[0] for one in results), sum(one.slots[1] for one in results)),
        agreed=majority([one.agreed for one in results], False),
        contradictions=sum(one.contradictions for one in results),
        repeats_agreed=math.fsum(repeats) / len(repeats) if repeats else None,
    )


def describe_panel(said: Sequence[Said], results: Sequence[JudgeResult]) -> dict[str, Any]:
    """Of two judges or more: what each said, and their agreement on the samples that all have a result on."""
    complete = [
        judged
        for every in zip(*(one.samples for one in said), strict=True)
        if len(judged := [one for one in every if isinstance(one, JudgedSample)]) == len(said)
    ]
    outcomes: list[list[Outcome]] = [[judged[number].outcome for judged in complete] for number in range(len(said))]
    prompts = [judged[0].prompt for judged in complete]
    agreement = describe_agreement(outcomes, prompts)
    if len(said) > 2:
        agreement["pairs"] = describe_pairs([one.judge for one in said], outcomes, prompts)
    return {"judges": [_describe(one) for one in results], "agreement": agreement}


def _describe(result: JudgeResult) -> dict[str, Any]:
    names = ("num_samples", *OUTCOMES)
    measured = ("win_rate_ties_half", "interval", "order_consistency", "first_slot_preference")
    record, found = result.record, result.record["statistics"]
    return {
        "model_asked": result.judge,
        "host": record["judge"]["host"],
        "file": str(result.file),
        **{name: record[name] for name in names},
        **{name: found[name] for name in measured},
    }


def panel_parts(record: Mapping[str, Any]) -> list[str]:
    """A row for each judge and for the majority, then the agreement, for a person."""
    majority_row = {"model_asked": "majority", **record, **record["statistics"]}
    heads = ("judge", "samples", *OUTCOMES, "win rate", "95 % interval", "orders agree", "first slot")
    rows = [_row(one) for one in (*record["judges"], majority_row)]
    parts: list[str] = [table_text(heads, rows, rules=(len(rows) - 1,)), _agreement_text(record["agreement"])]
    if pairs := record["agreement"].get("pairs"):
        cells = [[one_line(" and ".join(one["judges"])), *_kappa_cells(one)] for one in pairs]
        parts.append(table_text(("judges", "Cohen's kappa", "95 % interval", "same outcome"), cells))
    return parts


def _row(of: Mapping[str, Any]) -> list[str]:
    first = of["first_slot_preference"]
    low, high = of["interval"]
    return [
        one_line(of["model_asked"]),
        *(str(of[name]) for name in ("num_samples", *OUTCOMES)),
        f"{of['win_rate_ties_half']:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{of['order_consistency']:.3f}",
        "-" if first is None else f"{first:.3f}",
    ]


def _kappa_cells(found: Mapping[str, Any]) -> list[str]:
    if found["kappa"] is None:
        return ["-", "-", f"{found['same_outcome']:.3f}"]
    low, high = found["interval"]
    return [f"{found['kappa']:.3f}", f"{low:.3f} to {high:.3f}", f"{found['same_outcome']:.3f}"]


def _agreement_text(found: Mapping[str, Any]) -> str:
    on = counted(found["num_samples"], "sample")
    kappa, interval, same = _kappa_cells(found)
    if found["kappa"] is None:
        return f"agreement: all outcomes on {on} are alike, which leaves kappa without a value"
    name = _NAMES[found["kappa_of"]]
    return f"agreement: {name} kappa {kappa} ({interval}) on {on}; two judges say the same in {same} of the cases"
