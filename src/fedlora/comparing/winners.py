"""Who wins a comparison, setting by setting: by the own loss, paired over seeds with the next method and with clients
alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.comparing.tables import summarise
from fedlora.methods.table import ALONE, BASELINES
from fedlora.plain_text import counted

METRIC = "loss_own"


@dataclass(frozen=True)
class Winner:
    """Rows of the result, and differences as `summarise` has them: below zero the winner's loss is lower."""

    setting: str
    row: Mapping[str, Any]
    next: Mapping[str, Any] | None
    lead: Mapping[str, Any] | None
    against_alone: Mapping[str, Any] | None
    num_federated: int


def find_winners(result: Mapping[str, Any]) -> list[Winner]:
    """The federated method with the lowest own loss in every setting where one was measured."""
    found = []
    for setting in result["settings"]:
        rows = [row for row in result["rows"] if row["setting"] == setting and METRIC in row["metrics"]]
        federated = sorted((row for row in rows if row["mode"] not in ("base", *BASELINES)), key=_mean)
        alone = next((row for row in rows if row["mode"] == ALONE), None)
        base = next((row for row in rows if row["mode"] == "base"), None)
        if federated:
            row, *others = federated
            other = next(iter(others), alone or base)
            number = len({one["method"] for one in federated})
            found.append(Winner(setting, row, other, _difference(row, other), _difference(row, alone), number))
    return found


def winner_sentences(winners: Sequence[Winner]) -> list[str]:
    """The answer in two sentences: who wins and by how much, and whether joining pays."""
    if not winners:
        return ["No federated method was measured yet."]
    if len(winners) == 1:
        return [_who_wins(winners[0]), _does_joining_pay(winners[0])]
    counts: dict[str, int] = {}
    for one in winners:
        counts[one.row["label"]] = counts.get(one.row["label"], 0) + 1
    (first, most), *others = sorted(counts.items(), key=lambda item: -item[1])
    more = "".join(f", {label} in {number}" for label, number in others)
    pays = [one.against_alone for one in winners if one.against_alone is not None]
    clear = [one for one in pays if is_clear(one)]
    better = sum(one["mean"] < 0 for one in clear)
    settings = counted(len(winners), "setting")
    return [
        f"On local rows {first} has the lowest held-out loss in {most} of {settings}{more}.",
        f"Joining the best method pays in {better} of {counted(len(pays), 'setting')} and costs in "
        f"{len(clear) - better}, where the 95 % interval against each client alone excludes 0.",
    ]


def difference_text(difference: Mapping[str, Any] | None) -> str:
    """`-0.151 (95 % interval -0.200 to -0.102)`."""
    if difference is None:
        return ""
    if difference["low"] is None:
        return f"{difference['mean']:+.3f} (one seed, no interval)"
    return f"{difference['mean']:+.3f} (95 % interval {difference['low']:+.3f} to {difference['high']:+.3f})"


def is_clear(difference: Mapping[str, Any]) -> bool:
    """Whether the interval excludes 0; one seed has none."""
    return difference["low"] is not None and (difference["low"] > 0 or difference["high"] < 0)


def _who_wins(winner: Winner) -> str:
    found = winner.row["metrics"][METRIC]
    ends = f" (95 % interval {found['low']:.3f} to {found['high']:.3f})" if found["low"] is not None else ""
    which = winner.row["label"]
    if winner.num_federated > 1:
        which = f"Of {counted(winner.num_federated, 'federated method')} {which}"
    beside = ""
    if winner.next is not None and winner.lead is not None:
        beside = f", {difference_text(winner.lead)} against {winner.next['label']}"
        beside += "" if is_clear(winner.lead) or winner.lead["low"] is None else "; the interval includes 0"
    return f"{which} has the lowest held-out loss on local rows: {found['mean']:.3f}{ends}{beside}."


def _does_joining_pay(winner: Winner) -> str:
    against = winner.against_alone
    if against is None:
        return f"Whether joining pays is open: no run of {ALONE} was measured."
    verdict = "pays" if against["mean"] < 0 else "costs"
    if not is_clear(against):
        verdict = "changes nothing that these seeds can show"
    return f"Joining {verdict}: {difference_text(against)} against each client alone."


def _mean(row: Mapping[str, Any]) -> float:
    return row["metrics"][METRIC]["mean"]


def _difference(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Seed by seed; None where no seed has both."""
    if other is None:
        return None
    now, then = (one["metrics"][METRIC]["values"] for one in (row, other))
    paired = {seed: value - then[seed] for seed, value in now.items() if seed in then}
    return summarise(paired) if paired else None
