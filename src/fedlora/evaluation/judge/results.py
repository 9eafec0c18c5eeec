"""From verdicts in two orders to one result per sample, and to the tables of a comparison.

A sample counts as won or lost only when both orders agree; everything else is a tie. Everything here
comes from the stored verdicts, so a second run that asks nothing writes the same bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedlora.evaluation.judge.verdict_log import StoredVerdict
from fedlora.plain_text import Table, counted, one_line, table_text

Outcome = Literal["win", "tie", "loss"]
OUTCOMES: tuple[Outcome, ...] = ("win", "tie", "loss")
_HEADS = ("samples", "baseline", "proposed", "ratio", *OUTCOMES)


@dataclass(frozen=True)
class JudgedSample:
    """One sample after both orders; scores (1 to 100) are means of the two, `outcome` is ours against the baseline."""

    category: str
    baseline_score: float
    proposed_score: float
    outcome: Outcome
    flipped: bool


def combine(category: str, baseline_first: StoredVerdict, proposed_first: StoredVerdict) -> JudgedSample:
    """One result from two verdicts; `flipped` when the judge preferred the same position, so the other answer."""
    positions = (baseline_first.verdict, proposed_first.verdict)
    outcome: Outcome = "tie"
    if positions == ("B", "A"):
        outcome = "win"
    elif positions == ("A", "B"):
        outcome = "loss"
    return JudgedSample(
        category=category,
        baseline_score=(baseline_first.score_a + proposed_first.score_b) / 2,
        proposed_score=(baseline_first.score_b + proposed_first.score_a) / 2,
        outcome=outcome,
        flipped=positions in (("A", "A"), ("B", "B")),
    )


def summarise(samples: Sequence[JudgedSample]) -> dict[str, Any]:
    """Averages, counts and rates over `samples` (at least one), overall and by category.

    `overall_ratio` and `ratio` are our mean score over the baseline's; `win_rate` is wins over all judged samples;
    `position_flip_rate` is the share in which the judge chose a position, not an answer.
    """
    overall = _averages(samples)
    categories = sorted({sample.category for sample in samples})
    counts = _counts(samples)
    return {
        "overall_pred_avg": overall["avg_prediction_score"],
        "overall_prop_avg": overall["avg_proposed_score"],
        "overall_ratio": overall["ratio"],
        "num_samples": len(samples),
        **counts,
        "win_rate": counts["win"] / len(samples),
        "position_flip_rate": sum(sample.flipped for sample in samples) / len(samples),
        "categories": {
            category: _summarise_category([sample for sample in samples if sample.category == category])
            for category in categories
        },
    }


def _summarise_category(samples: Sequence[JudgedSample]) -> dict[str, Any]:
    return {"num_samples": len(samples), **_averages(samples), **_counts(samples)}


def _averages(samples: Sequence[JudgedSample]) -> dict[str, float]:
    baseline = math.fsum(sample.baseline_score for sample in samples) / len(samples)
    proposed = math.fsum(sample.proposed_score for sample in samples) / len(samples)
    return {"avg_prediction_score": baseline, "avg_proposed_score": proposed, "ratio": proposed / baseline}


def _counts(samples: Sequence[JudgedSample]) -> dict[str, int]:
    found = Counter(sample.outcome for sample in samples)
    return {outcome: found[outcome] for outcome in OUTCOMES}


def describe_judges(verdicts: Sequence[StoredVerdict]) -> dict[str, Any]:
    """Who answered: model names and fingerprints as the endpoint gave them, and the parameters it refused."""
    return {
        "models_returned": sorted({verdict.model for verdict in verdicts if verdict.model}),
        "system_fingerprints": sorted({verdict.fingerprint for verdict in verdicts if verdict.fingerprint}),
        "parameters_dropped": sorted({name for verdict in verdicts for name in verdict.dropped}),
    }


def results_parts(result: Mapping[str, Any]) -> list[str]:
    """The result as lines of text for a person."""
    rows = [_cells(one_line(name), values) for name, values in result["categories"].items()]
    table = table_text(("category", *_HEADS), [*rows, _cells("overall", _overall(result))], rules=(len(rows),))
    footer = (
        f"judged {result['num_samples']} of {counted(result['total_in_files'], 'sample')} in both orders; "
        f"win rate {result['win_rate']:.3f}, position flips {result['position_flip_rate']:.3f}"
    )
    lines: list[str] = [table, footer]
    if failures := result["failures_by_kind"]:
        lines.append("without a verdict: " + ", ".join(f"{kind} {count}" for kind, count in failures.items()))
    return lines


def pairs_table(pairs: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Table:
    """A row for each pair: who was judged, against whom, and the result over all categories."""
    rows = [[one_line(of), *_cells(one_line(against), _overall(result))] for of, against, result in pairs]
    return table_text(("of", "against", *_HEADS), rows, left=(0, 1))


def _overall(result: Mapping[str, Any]) -> dict[str, Any]:
    means = {"avg_prediction_score": "overall_pred_avg", "avg_proposed_score": "overall_prop_avg"}
    ratio = {"ratio": result["overall_ratio"]}
    return {**{name: result[key] for name, key in means.items()}, **ratio, **result}


def _cells(name: str, values: Mapping[str, Any]) -> list[str]:
    means = [f"{values['avg_prediction_score']:.2f}", f"{values['avg_proposed_score']:.2f}", f"{values['ratio']:.3f}"]
    return [name, str(values["num_samples"]), *means, *(str(values[outcome]) for outcome in OUTCOMES)]
