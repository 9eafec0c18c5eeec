"""What a comparison on a folder of silos says of its clients and their rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.plain_text import NOTHING, counted, one_line, table_text

Silos = Mapping[str, Any]

_UNDER = (
    "under the global adapter, or under each client's own where the method leaves no global one or the row is marked "
    "(personal)."
)
OWN = {
    "client": f"nats per response token on each client's test rows, the mean over clients; {_UNDER}",
    "category": "nats per response token on the test rows, the categories weighed as each client's training rows are, "
    f"the mean over clients; {_UNDER}",
    "file": f"nats per response token on all test rows, the mean over clients; {_UNDER}",
}
"""By what losses are grouped by: what a client's own loss is."""
MOST = 12
"""Clients that a terminal shows."""


def silo_plan(silos: Silos) -> str:
    """The clients and their rows, before anything is trained."""
    shown = [
        f"{one_line(name)} {training} + {validation} + {test}"
        for name, (training, validation, test) in list(silos["rows"].items())[:MOST]
    ]
    more = f" and {counted(len(silos['rows']) - MOST, 'client')} more" if len(silos["rows"]) > MOST else ""
    shared = "" if silos["grouped_by"] == "client" else f"; {counted(silos['num_test'], 'test row')} for all"
    return f"rows (training + validation + test): {', '.join(shown)}{more}{shared}"


def silo_intro(silos: Silos) -> str:
    """Where the held-out rows come from, for the page."""
    validation = sum(rows[1] for rows in silos["rows"].values())
    whose = "of the clients" if silos["grouped_by"] == "client" else "of one file for all clients"
    return (
        f"learning rates were chosen on {counted(validation, 'validation row')} of the "
        f"{counted(len(silos['rows']), 'client')}, everything "
        f"here is measured on {counted(silos['num_test'], 'other row')} {whose}."
    )


def silo_remarks(silos: Silos | None) -> list[str]:
    """What a reader must know of the rows."""
    if silos is None:
        return []
    remarks = []
    if silos["num_leaks"]:
        remarks.append(
            f"{silos['num_leaks']} of {counted(silos['num_test'], 'test row')} have a prompt that a client "
            f"trains on: losses on "
            "them measure memory; `fedlora plan` names the rows"
        )
    without = [name for name, rows in silos["rows"].items() if not rows[2]]
    if without and silos["grouped_by"] == "client":
        remarks.append(f"no test rows of {', '.join(map(one_line, without))}: no loss of theirs is in the means")
    return remarks


def own_losses_parts(result: Mapping[str, Any]) -> list[str]:
    """Every client's own loss under every method, setting by setting, where clients have names."""
    parts: list[str] = []
    for table in result["clients"]:
        if not table.get("names"):
            continue
        methods = table["methods"]
        clients = list(methods["base"]["own"])[:MOST]
        rows = [
            [one_line(table["names"][client]), *(_loss(method, client) for method in methods.values())]
            for client in clients
        ]
        what = "held-out loss of" + (f", {table['setting']}" if table["setting"] else "")
        parts.append(table_text([what, *methods], rows))
    return parts


def _loss(method: Mapping[str, Any], client: str) -> str:
    return f"{method['own'][client]:.3f}" if client in method["own"] else NOTHING
