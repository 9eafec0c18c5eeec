"""The models of a report as rows of a picture, under the names that its tables have."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.plain_text import counted
from fedlora.reporting.drawing import clip
from fedlora.reporting.findings import Findings
from fedlora.reporting.main_table import short_label
from fedlora.reporting.summary import ModelRow

_WIDTH = 48


def scored_rows(findings: Findings) -> list[ModelRow]:
    """The rows whose exact match is known."""
    return [row for row in findings.rows if row.categories]


def experiment_labels(findings: Findings) -> dict[str, str]:
    """Experiment -> what its global adapter is called, or all of it where it has none."""
    whole = {row.experiment: row.label for row in findings.rows if row.subject == "global"}
    return {name: clip(whole.get(name, title)) for name, title in findings.titles.items()}


def visible_labels(rows: Sequence[ModelRow], most_clients: int) -> dict[int, str]:
    """Label by the id of its row; of more than `most_clients` clients the one in the middle of each run stands for
    all."""
    clients: dict[str, list[ModelRow]] = {}
    for row in rows:
        if row.subject == "client":
            clients.setdefault(row.experiment, []).append(row)
    if sum(map(len, clients.values())) <= most_clients:
        return {id(row): clip(short_label(row), _WIDTH) for row in rows}
    others = {id(row): clip(short_label(row), _WIDTH) for row in rows if row.subject != "client"}
    titles = {row.experiment: row.label for row in rows if row.subject == "mean"}
    return others | {
        id(group[len(group) // 2]): f"{_title(titles.get(name, ''))}each of {counted(len(group), 'client')}"
        for name, group in clients.items()
    }


def _title(mean_label: str) -> str:
    return f"{clip(mean_label.partition(' mean of ')[0])}, " if mean_label else ""
