"""Who gains by joining, from private metrics: means and standard errors that the owners of the test rows gave.

A gain over the base is paired row by row, because its owner had both models. A gain over the adapter that a client
trained alone is of two runs, whose rows cannot be paired any more: its interval is Welch's, and wider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.evaluate import ReportConfig
from fedlora.config.private_metrics import PRIVATE_METRICS
from fedlora.data.client_names import name_of_file
from fedlora.evaluation.private_numbers import difference_estimate, estimate, mean_of, unpaired
from fedlora.evaluation.score_table import Estimate
from fedlora.reporting.experiments import Experiment
from fedlora.reporting.own_rows import BASE, LOWER_IS_BETTER, ClientGains, MeanGain
from fedlora.reporting.summary import experiment_titles, global_title, in_report_order, personal_title

Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class _Model:
    """One model of a client: its label, what a line of private metrics calls it, and that line."""

    label: str
    name: str
    is_joint: bool
    numbers: Numbers


def find_private_gains(config: ReportConfig, experiments: Sequence[Experiment]) -> list[ClientGains]:
    """One entry for each client that gave numbers of a joint model; runs with privacy flags only where asked for.

    A client's numbers of several runs are compared where they are of equally many rows.
    """
    titles = experiment_titles(experiments)
    found: dict[str, list[_Model]] = {}
    for experiment in in_report_order(experiments):
        if _is_left_out(config, experiment):
            continue
        for client in experiment.clients:
            if (numbers := _last(experiment, client["client_id"])) is not None:
                models = found.setdefault(name_of_file(client["file"]), [])
                models += _models(experiment, titles[experiment.name], numbers)
    return [gains for name, models in found.items() if (gains := _compare(name, _of_same_rows(models)))]


def private_notes(config: ReportConfig, experiments: Sequence[Experiment]) -> list[str]:
    """What a reader must know of private metrics: what was withheld, and numbers that epsilon does not cover."""
    notes = []
    for one in experiments:
        if one.private_rows and _is_left_out(config, one):
            notes.append(
                f"{one.name}: private metrics are left out: they carry no noise and are not in epsilon; "
                "--noiseless_metrics shows them"
            )
            continue
        if one.private_rows and _is_private(one):
            notes.append(f"{one.name}: private metrics carry no noise: what they reveal is not in epsilon")
        last = max((row["round"] for row in one.private_rows), default=0)
        notes += [
            f"{one.name}: no private metrics of {one.shown(row['client_id'])}: {row['withheld']}"
            for row in one.private_rows
            if row["round"] == last and "withheld" in row
        ]
    return notes


def _is_private(experiment: Experiment) -> bool:
    names = ("dp_noise_multiplier", "dp_example_noise_multiplier")
    return any(experiment.run["config"].get(name) is not None for name in names)


def _is_left_out(config: ReportConfig, experiment: Experiment) -> bool:
    return _is_private(experiment) and not config.noiseless_metrics


def _last(experiment: Experiment, client: int) -> Numbers | None:
    """A client's numbers after the last round that was measured; None where they were withheld."""
    rows = [row for row in experiment.private_rows if row["client_id"] == client]
    return rows[-1] if rows and "withheld" not in rows[-1] else None


def _models(experiment: Experiment, title: str, numbers: Numbers) -> list[_Model]:
    is_joint = experiment.method.combines
    own = f"alone ({title})"
    if is_joint:
        own = personal_title(experiment, title) if experiment.has_personal_models else f"{title}, its own"
    labels = {"base": BASE, "global": global_title(experiment, title), "personal": own}
    return [
        _Model(label, name, is_joint and name != "base", numbers)
        for name, label in labels.items()
        if name in numbers["models"]
    ]


def _of_same_rows(models: Sequence[_Model]) -> list[_Model]:
    """One model a label, of as many rows as the first joint model."""
    first = next((one for one in models if one.is_joint), None)
    alike = [one for one in models if first is not None and _counts(one) == _counts(first)]
    return list({one.label: one for one in reversed(alike)}.values())[::-1]


def _counts(model: _Model) -> tuple[int, int]:
    return model.numbers["num_rows"], model.numbers["num_prompts"]


def _compare(client: str, models: Sequence[_Model]) -> ClientGains | None:
    joint, others = ([one for one in models if one.is_joint is wanted] for wanted in (True, False))
    if not joint or not others:
        return None
    reference = next((one for one in others if one.label != BASE), others[0])
    num_rows, num_prompts = _counts(reference)
    scores: dict[str, dict[str, Estimate]] = {}
    gains: dict[str, dict[str, MeanGain]] = {}
    for measure in PRIVATE_METRICS:
        means = {one.label: one.numbers["models"][one.name].get(measure) for one in models}
        scores[measure] = {
            label: estimate(measure, mean_of(mean), num_prompts) for label, mean in means.items() if mean is not None
        }
        found = {one.label: _gain(measure, one, reference, num_prompts) for one in joint}
        gains[measure] = {label: gain for label, gain in found.items() if gain is not None}
    return ClientGains(client, num_rows, scores, reference.label, gains)


def _gain(measure: str, one: _Model, reference: _Model, num_prompts: int) -> MeanGain | None:
    if reference.label == BASE:
        known = one.numbers["differences"].get(f"{one.name}-base", {}).get(measure)
        apart = None if known is None else difference_estimate(mean_of(known), num_prompts - 1)
    else:
        pair = [each.numbers["models"][each.name].get(measure) for each in (one, reference)]
        mine, theirs = (None if found is None else mean_of(found) for found in pair)
        apart = unpaired(mine, theirs, (num_prompts, num_prompts)) if mine and theirs else None
    if apart is None:
        return None
    if measure in LOWER_IS_BETTER:
        low, high = apart.interval
        apart = Estimate(0.0 - apart.mean, (0.0 - high, 0.0 - low))
    return MeanGain(apart)
