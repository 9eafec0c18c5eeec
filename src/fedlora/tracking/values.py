"""The numbers of a run as trackers take them: from the lines of metrics.jsonl, so that a run that is sent while it
trains and one that is sent afterwards have the same.

Of a run with differential privacy a tracker receives only what its guarantee covers: how much was spent, and the loss
on held-out rows that are no client's. Losses, norms, counts and names of clients have no noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.data.client_names import shown_client
from fedlora.plain_text import Table, number_text, table_text
from fedlora.runs.run_records import RunRecord

NOT_MEASURED = {"kind", "round", "client_id", "wave", "check", "cohort", "quarantined", "privacy", "by_layer"}
COVERED = ("privacy/epsilon", "round/seconds")


def values_by_round(
    record: RunRecord, rows: Sequence[Mapping[str, Any]], *, shares_private: bool = False
) -> dict[int, dict[str, float]]:
    """Round -> its numbers by name: `round/...` of the round, `clients/<name>/...` of each client that took part.

    `rows` are lines of metrics.jsonl. Units are those of docs/reference/metrics.md.
    """
    files = {facts.client_id: facts.file for facts in record.clients}
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "round":
            values = {f"round/{name}": value for name, value in _numbers(row).items()}
            if "privacy" in row:
                values["privacy/epsilon"] = float(row["privacy"]["epsilon"])
            if row["round"] > 0:
                values["round/clients"] = float(len(row["cohort"]))
                values["round/excluded"] = float(len(row["quarantined"]))
        elif row["kind"] == "client":
            name = shown_client(row["client_id"], files)
            values = {f"clients/{name}/{measure}": value for measure, value in _numbers(row).items()}
        else:
            continue
        found.setdefault(row["round"], {}).update(values)
    if record.privacy is None or shares_private:
        return found
    # rows that clients hold back are theirs; others come from a file of the server's
    held_out = () if any(facts.num_validation for facts in record.clients) else ("round/val_loss",)
    covered = (*COVERED, *held_out)
    return {number: {name: values[name] for name in covered if name in values} for number, values in found.items()}


def table_of(values: Mapping[int, Mapping[str, float]]) -> Table:
    """The rounds as a table, a column for each number of the round."""
    names = sorted({name for each in values.values() for name in each if not name.startswith("clients/")})
    rows = [
        [str(number), *(number_text(each.get(name), 4) for name in names)] for number, each in sorted(values.items())
    ]
    return table_text(["round", *(name.removeprefix("round/") for name in names)], rows, left=())


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in sorted(row.items())
        if name not in NOT_MEASURED
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }
