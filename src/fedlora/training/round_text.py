"""The message about a finished round."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedlora.console import say
from fedlora.data.client_names import shown_client
from fedlora.plain_text import counted
from fedlora.types import ClientId

LONG_UPDATE = 10
"""An update so many times as long as the cohort's median is reported."""


def say_round(
    row: Mapping[str, Any], records: Sequence[Mapping[str, Any]], rounds: int, files: Mapping[ClientId, str]
) -> None:
    """Say the lines of `describe_round`."""
    for line in describe_round(row, records, rounds, files):
        say(line)


def say_numbers(found: Mapping[ClientId, Mapping[str, Any]], files: Mapping[ClientId, str]) -> None:
    """How many clients gave private metrics, and why the others did not."""
    say(f"private metrics of {sum('withheld' not in one for one in found.values())} of {counted(len(found), 'client')}")
    for client, one in sorted(found.items()):
        if "withheld" in one:
            say(f"  none of {shown_client(client, files)}: {one['withheld']}")


def describe_round(
    row: Mapping[str, Any], records: Sequence[Mapping[str, Any]], rounds: int, files: Mapping[ClientId, str]
) -> Iterator[str]:
    """Losses, epsilon, excluded clients and long updates, a line each; `row` is the round's line in metrics.jsonl,
    `records` are those of its clients, and `files` has the name of every client's file."""
    held_out = f", held-out loss {row['val_loss']:.3f}" if "val_loss" in row else ""
    loss = "empty cohort" if row["loss"] is None else f"training loss {row['loss']:.3f}"
    spent = f", {_describe_spent(row['privacy'])}" if "privacy" in row else ""
    if row.get("privacy", {}).get("without_noise"):
        spent += " (private metrics carry no noise and are not in it)"
    yield f"round {row['round']} of {rounds}: {loss}{held_out}{spent}, {row['seconds']:.0f} s"
    for failure in row["quarantined"]:
        yield f"  {shown_client(failure['client_id'], files)} is left out of the round: {failure['reason']}"
    median = statistics.median([record["update_norm"] for record in records] or [0.0])
    for record in records:
        if record["update_norm"] > LONG_UPDATE * median and "clipped_to" not in record:
            times = f"{record['update_norm'] / median:.0f} times as long as the median" if median else "not zero"
            name = shown_client(record["client_id"], files)
            yield f"  the update of {name} is {times}: --max_update_norm_ratio would limit it"


def _describe_spent(privacy: Mapping[str, Any]) -> str:
    # imports torch, which who watches a run would wait for
    from fedlora.federated.privacy.budget import describe_spent

    return describe_spent(privacy)
