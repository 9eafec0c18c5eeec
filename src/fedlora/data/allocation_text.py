"""An allocation as text: who holds how much of what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.console import printable
from fedlora.paths import DataPaths
from fedlora.plain_text import counted, one_line, table_text

_SHOWN_CLIENTS, _SHOWN_CATEGORIES = 32, 3


def allocation_parts(manifest: Mapping[str, Any], paths: DataPaths, test_per_cat: int | None) -> list[str]:
    """The table of clients, what was left out, and where the files lie."""
    clients = manifest["clients"]
    by = manifest["config"].get("by")
    silos = [(str(client["client_id"]), client) for client in clients[:_SHOWN_CLIENTS]]
    silos.append(("test", manifest["test"]))
    rows = [
        (name, *([one_line(silo.get("value", ""))] if by else []), str(silo["num_examples"]), _mix(silo["categories"]))
        for name, silo in silos
    ]
    if len(clients) > _SHOWN_CLIENTS:
        more = f"and {counted(len(clients) - _SHOWN_CLIENTS, 'client')} more, see the manifest"
        rows.insert(-1, ("...", *([""] if by else []), "", more))
    columns = ("client", one_line(by), "rows", "categories") if by else ("client", "rows", "categories")
    dropped = manifest["duplicates"]
    return [
        table_text(columns, rows, left=(1, 3) if by else (2,), rules=()),
        f"input: {counted(manifest['input']['num_rows'], 'row')}, {manifest['num_empty']} without an answer left out, "
        f"{dropped['dropped']} repeated prompts dropped ({dropped['under_another_category']} under another category)",
        *([f"bad rows left out: {manifest['num_skipped']}"] if "num_skipped" in manifest else []),
        f"label skew: {manifest['label_skew']:.3f} (0 is the pool's mix at every client)",
        printable(f"clients: {paths.client_file(len(clients), 0).parent}"),
        printable(f"test set: {paths.test_file(test_per_cat)}"),
    ]


def _mix(counts: Mapping[str, int]) -> str:
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{category or '(none)'} {count}" for category, count in largest[:_SHOWN_CATEGORIES])
    more = len(largest) - _SHOWN_CATEGORIES
    return one_line(shown + (f" and {more} more" if more > 0 else ""))
