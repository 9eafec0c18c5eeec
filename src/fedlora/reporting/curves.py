"""Losses, quality and drift of an experiment by round, and the losses that its tables show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.config.evaluate import ReportConfig
from fedlora.paths import OutputName, ResultPaths
from fedlora.reporting.experiments import Experiment, read_result


def loss_curves(experiment: Experiment) -> dict[str, list[tuple[int, float]]]:
    """(round, loss) points: `training` from round 1, `held_out` from round 0 where validation was on; and
    `held_out_personal`, the mean over a round's clients, where they have models beside a global one."""
    curves = {
        "training": [(row["round"], row["loss"]) for row in experiment.round_rows if row.get("loss") is not None],
        "held_out": [(row["round"], row["val_loss"]) for row in experiment.round_rows if "val_loss" in row],
    }
    losses = [(row["round"], _personal_loss(row)) for row in experiment.round_rows]
    if personal := [(number, loss) for number, loss in losses if loss is not None]:
        curves["held_out_personal"] = personal
    return curves


def drift_curves(experiment: Experiment) -> dict[str, list[tuple[int, float]]]:
    """(round, value) points of the error meter, as far as the method has them."""
    return {
        name: [(row["round"], row[name]) for row in experiment.round_rows if name in row]
        for name in ("aggregation_error", "drift_cosine_mean", "drift_norm_mean")
    }


def quality_curve(config: ReportConfig, experiment: Experiment) -> list[tuple[int, float]]:
    """(round, exact match over all categories) of every round that was scored: of the global adapter, else the mean
    where all clients were."""
    names = [OutputName("client", client["client_id"]) for client in experiment.clients]
    if experiment.has_global_adapter:
        names = [OutputName("global")]
    points = []
    for number in ResultPaths(config.rouge_dir, experiment.name, experiment.round_number).rounds:
        paths = ResultPaths(config.rouge_dir, experiment.name, number)
        found = [read_result(paths.rouge(name), "fedlora", "fedlora score") for name in names]
        shares = [one["fedlora"]["exact_match"]["macro"] for one in found if one is not None]
        if number <= experiment.round_number and shares and len(shares) == len(names):
            points.append((number, sum(shares) / len(shares)))
    return points


def last_loss(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The last validation loss in `rows`, None when the run has not reached the compared round."""
    losses = [row["val_loss"] for row in rows if "val_loss" in row and row["round"] > 0]
    return losses[-1] if losses and experiment.rounds_done == experiment.round_number else None


def last_personal_loss(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The same of a client's personal model."""
    if not experiment.has_global_adapter:
        return last_loss(experiment, rows)
    losses = [loss for row in rows if (loss := _personal_loss(row)) is not None]
    return losses[-1] if losses and experiment.rounds_done == experiment.round_number else None


def _personal_loss(row: Mapping[str, Any]) -> float | None:
    """Of the rows for everybody where it was measured on some, as a global adapter's is; else of the held-back ones."""
    return row.get("val_loss_personal_shared", row.get("val_loss_personal"))
