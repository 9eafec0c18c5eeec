"""What `score` and `loss` measured of one model, as fields of its row in a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from fedlora.data.client_names import name_of_file
from fedlora.evaluation.intervals import macro_interval, share_interval
from fedlora.reporting.experiments import Answers, Experiment


def scores_of(experiment: Experiment, output_name: str, clients: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that was measured of one model's answers, as fields of its row; `clients` are those whose test rows
    are its own."""
    answers = experiment.answers[output_name]
    found, intervals = _with_intervals(answers)
    rouge = answers.rouge
    if rouge is None:
        return {**found, "intervals": intervals}
    exact = rouge["fedlora"]["exact_match"]
    shares, counts = exact["categories"], rouge["fedlora"]["num_samples"]
    return {
        **found,
        "intervals": intervals,
        "own": mean_of(_own_score(client, rouge["fedlora"]) for client in clients),
        "all": exact["macro"],
        "all_interval": macro_interval(shares, counts),
        "rouge_l": rouge["overall"]["avg_rougeL"],
        "categories": dict(sorted(shares.items())),
        "category_intervals": {name: share_interval(share, counts[name]) for name, share in sorted(shares.items())},
    }


def _with_intervals(answers: Answers) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """What `score` and `loss` measured, and its intervals."""
    overall = (answers.scores or {}).get("overall", {})
    known = {"rouge_l": overall.get("rougeL"), "f1": overall.get("f1"), "chrf": overall.get("chrf")}
    found = {name: one for name, one in known.items() if one is not None}
    if answers.losses is not None:
        found["test_loss"] = {"mean": answers.losses["loss"], "interval": answers.losses["interval"]}
    means = {name: one["mean"] for name, one in found.items()}
    return means, {name: tuple(one["interval"]) for name, one in found.items()}


def _own_score(client: Mapping[str, Any], scores: Mapping[str, Any]) -> float | None:
    """Exact match on a client's test rows where they are known; else weighed by its training rows per category. None
    where the test set has none of its rows, or lacks one of the categories."""
    if "clients" in scores:
        own = scores["clients"].get(name_of_file(client["file"]))
        return None if own is None else own["exact_match"]
    counts, exact = client["categories"], scores["exact_match"]["categories"]
    if not set(counts) <= set(exact):
        return None
    return sum(count * exact[name] for name, count in counts.items()) / sum(counts.values())


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean, None where a part of it is."""
    every = list(values)
    present = [value for value in every if value is not None]
    return fmean(present) if present and len(present) == len(every) else None
