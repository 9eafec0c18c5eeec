"""From verdicts in two orders to one result per sample, and to the tables of a comparison.

A sample counts as won or lost only when both orders agree; everything else is a tie. Everything here
comes from the stored verdicts, so a second run that asks nothing writes the same bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from fedlora.evaluation.judge.judge_statistics import OUTCOMES, JudgedSample, Outcome, describe_verdicts
from fedlora.evaluation.judge.protocol import ORDERS, Sample
from fedlora.evaluation.judge.verdict_log import StoredVerdict
from fedlora.plain_text import Table, counted, one_line, table_text

T = TypeVar("T")

_HEADS = ("samples", *OUTCOMES, "win rate", "95 % interval", "baseline", "proposed", "ratio")


def combine(sample: Sample, *verdicts: StoredVerdict) -> JudgedSample:
    """One result from equally many verdicts in each order.

    The verdict of an order is what more than half of its repeats say, else a tie. `flipped` when the judge preferred
    the same position in both orders, so the other answer.
    """
    orders = [[one for one in verdicts if one.order == order] for order in ORDERS]
    theirs = [(one.score_a, one.score_b) if one.order == ORDERS[0] else (one.score_b, one.score_a) for one in verdicts]
    said = [one.verdict for one in verdicts]
    positions = tuple(majority([one.verdict for one in repeats], "tie") for repeats in orders)
    outcome: Outcome = "tie"
    if positions == ("B", "A"):
        outcome = "win"
    elif positions == ("A", "B"):
        outcome = "loss"
    return JudgedSample(
        category=sample.category,
        baseline_score=sum(baseline for baseline, _ in theirs) / len(verdicts),
        proposed_score=sum(proposed for _, proposed in theirs) / len(verdicts),
        outcome=outcome,
        flipped=positions in (("A", "A"), ("B", "B")),
        prompt=(sample.before, sample.instruction, sample.input),
        baseline_length=len(sample.baseline),
        proposed_length=len(sample.proposed),
        slots=(said.count("A"), said.count("B")),
        agreed=positions in (("B", "A"), ("A", "B"), ("tie", "tie")),
        contradictions=sum(map(_contradicts_its_scores, verdicts)),
        repeats_agreed=sum(map(_share_alike, orders)) / len(orders) if len(orders[0]) > 1 else None,
    )


def majority(values: Sequence[T], otherwise: T) -> T:
    """What more than half of the values are, else `otherwise`."""
    value, count = Counter(values).most_common(1)[0]
    return value if 2 * count > len(values) else otherwise


def _share_alike(repeats: Sequence[StoredVerdict]) -> float:
    """The share of pairs of repeats that say the same."""
    counts = Counter(one.verdict for one in repeats).values()
    return sum(count * (count - 1) for count in counts) / (len(repeats) * (len(repeats) - 1))


def _contradicts_its_scores(verdict: StoredVerdict) -> bool:
    lead = verdict.score_a - verdict.score_b
    return (verdict.verdict == "A" and lead < 0) or (verdict.verdict == "B" and lead > 0)


def summarise(samples: Sequence[JudgedSample]) -> dict[str, Any]:
    """Averages, counts and rates over `samples` (at least one), overall and by category.

    `overall_ratio` and `ratio` are our mean score over the baseline's; `win_rate` is wins over all judged samples;
    `position_flip_rate` is the share in which the judge chose a position, not an answer. `statistics` has the win rate
    with ties as halves, and its interval.
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
        "statistics": describe_verdicts(samples),
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
    found = result["statistics"]
    rows = [
        _cells(one_line(name), {**values, **found["categories"][name]}) for name, values in result["categories"].items()
    ]
    table = table_text(("category", *_HEADS), [*rows, _cells("overall", _overall(result))], rules=(len(rows),))
    lines: list[str] = [table, *_statistics_lines(result, found)]
    if failures := result["failures_by_kind"]:
        lines.append("without a verdict: " + ", ".join(f"{kind} {count}" for kind, count in failures.items()))
    return lines


def _statistics_lines(result: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"judged {result['num_samples']} of {counted(result['total_in_files'], 'sample')} in both orders; win rate "
        f"{found['win_rate_ties_half']:.3f} with ties as halves, 95 % interval {_interval(found['interval'])}, "
        f"sign test p = {found['sign_test_p']:.2g}"
    )
    yield (
        f"{counted(found['num_prompts'], 'prompt')} show a win rate that is {found['smallest_difference']:.3f} "
        "or more from 0.5 (in 80 % of cases)"
    )
    positions = f"orders agree on {found['order_consistency']:.3f} of the samples"
    if found["first_slot_preference"] is not None:
        interval = _interval(found["first_slot_interval"])
        positions += f"; of verdicts for an answer, {found['first_slot_preference']:.3f} ({interval}) chose the first"
    if found["score_contradictions"]:
        positions += f"; {counted(found['score_contradictions'], 'verdict')} for the answer with the lower score"
    if "repeat_consistency" in found:
        interval = _interval(found["repeat_consistency_interval"])
        positions += f"; repeats say the same in {found['repeat_consistency']:.3f} of the cases ({interval})"
    yield positions
    length = found["length"]
    by = [
        f"{of['win_rate_ties_half']:.3f} of {of['num_samples']} where {name}"
        for key, name in (("proposed", "ours is longer"), ("baseline", "the baseline's is longer"))
        for of in (length["win_rate_by_longer"][key],)
        if of["num_samples"]
    ]
    yield "; ".join(
        [
            f"length {length['proposed_mean']:.0f} characters against {length['baseline_mean']:.0f}",
            *(["win rate " + ", ".join(by)] if by else []),
            f"length-controlled {length['controlled_win_rate']:.3f} ({_interval(length['controlled_interval'])})",
        ]
    )


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def pairs_table(pairs: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Table:
    """A row for each pair: who was judged, against whom, and the result over all categories."""
    rows = [[one_line(of), *_cells(one_line(against), _overall(result))] for of, against, result in pairs]
    return table_text(("of", "against", *_HEADS), rows, left=(0, 1))


def _overall(result: Mapping[str, Any]) -> dict[str, Any]:
    means = {"avg_prediction_score": "overall_pred_avg", "avg_proposed_score": "overall_prop_avg"}
    ratio = {"ratio": result["overall_ratio"]}
    return {**{name: result[key] for name, key in means.items()}, **ratio, **result["statistics"], **result}


def _cells(name: str, values: Mapping[str, Any]) -> list[str]:
    rates = [f"{values['win_rate_ties_half']:.3f}", _interval(values["interval"])]
    means = [f"{values['avg_prediction_score']:.2f}", f"{values['avg_proposed_score']:.2f}", f"{values['ratio']:.3f}"]
    return [name, str(values["num_samples"]), *(str(values[outcome]) for outcome in OUTCOMES), *rates, *means]
