"""Who wins: the best federated model of a report, the next one, and how far they lie apart on the same test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.config.evaluate import ReportConfig
from fedlora.evaluation.score_table import Difference, Measure, ScoreTable
from fedlora.paths import OutputName
from fedlora.reporting.experiments import Experiment
from fedlora.reporting.own_rows import ScoredRows
from fedlora.reporting.summary import ModelRow

EXACT = "exact"


@dataclass(frozen=True)
class Standing:
    """The best model by exact match over all categories or, where nothing was scored, by held-out loss.

    A federated model wins wherever there is one; the next is another federated one, else the clients alone, else the
    base. `lead` is there where `score` left both models' test rows one by one.
    """

    winner: ModelRow
    next: ModelRow | None
    num_federated: int
    is_scored: bool
    lead: Difference | None = None
    alone: ModelRow | None = None
    """The mean over clients that trained alone."""


def find_standing(config: ReportConfig, experiments: Sequence[Experiment], rows: Sequence[ModelRow]) -> Standing | None:
    """None where no model but the base was measured."""
    known = {one.name: one for one in experiments}
    is_scored = any(row.all is not None for row in rows if row.subject != "base")
    measured = [row for row in rows if (row.all if is_scored else row.held_out_loss) is not None]
    groups: dict[str, list[ModelRow]] = {"federated": [], "alone": [], "base": []}
    for row in measured:
        if row.subject == "base":
            groups["base"].append(row)
        elif row.subject in ("global", "mean") and not (method := known[row.experiment].method).pools_rows:
            groups["federated" if method.combines else "alone"].append(row)
    for group in groups.values():
        group.sort(key=lambda row: _rank(row, is_scored))
    order = [row for group in groups.values() for row in group]
    if not order or order[0].subject == "base":
        return None
    winner, other = order[0], order[1] if len(order) > 1 else None
    lead = _find_lead(config, known, winner, other) if is_scored and other is not None else None
    alone = groups["alone"][0] if groups["alone"] else None
    return Standing(winner, other, len({row.experiment for row in groups["federated"]}), is_scored, lead, alone)


def _rank(row: ModelRow, is_scored: bool) -> float:
    value = row.all if is_scored else row.held_out_loss
    assert value is not None
    return -value if is_scored else value


def _find_lead(
    config: ReportConfig, known: Mapping[str, Experiment], winner: ModelRow, other: ModelRow
) -> Difference | None:
    """How much more of the same test rows the winner answers right, with its interval."""
    scored = ScoredRows(config)
    found = {}
    for row in (winner, other):
        if row.subject not in ("global", "base"):
            return None
        found[row.label] = scored.rows_of(known[row.experiment], OutputName(row.subject))
    if not all(found.values()) or winner.label == other.label:
        return None
    measured = {
        label: {EXACT: Measure(np.array([row[EXACT] for row in own], dtype=float), is_share=True)}
        for label, own in found.items()
    }
    rows = found[winner.label]
    groups = [row["category"] or row.get("client", "") for row in rows]
    return ScoreTable(measured, groups, range(len(rows))).difference(winner.label, other.label)[EXACT]
